"""Codecs: what they keep of numbers, what they never do, and how their blocks lie."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from reference import coat

from optlab.linalg import blocks, codecs
from optlab.testing.sharding import mesh_of

# The median error of normal numbers and of lognormal ones (sigma 3) in blocks of 128, as measured:
# relative.
CODECS = {
    "fp8": (codecs.fp8(), 0.013, 0.033),
    "fp8-plain": (codecs.fp8(expand=False), 0.025, np.inf),
    "int8": (codecs.int8(), 0.013, 0.033),
    "int8-linear": (codecs.int8(map="linear"), 0.010, 0.08),
    "int4": (codecs.int4(), 0.17, np.inf),
}
SHAPES = ((64, 300), (7, 3, 10), (5,), (2, 257), (3, 1))


def numbers(shape, *, signed=True, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x if signed else np.exp(3 * x), jnp.float32)


def back(codec, x, **options):
    signed = options.get("signed", True)
    return np.asarray(codec.decode(codec.encode(x, **options), x.shape[-1], signed=signed))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("signed", [True, False])
def test_the_largest_of_a_block_is_exact_and_the_median_error_is_small(name, signed):
    codec, *bounds = CODECS[name]
    x = numbers((8, 256), signed=signed)
    got, want = back(codec, x, signed=signed), np.asarray(x)
    largest = np.argmax(np.abs(want).reshape(8, 2, 128), -1)[..., None]
    rows = [np.take_along_axis(y.reshape(8, 2, 128), largest, -1) for y in (got, want)]
    np.testing.assert_allclose(*rows, rtol=1e-6)
    error = np.median(np.abs(got - want) / np.abs(want))
    assert error <= bounds[0 if signed else 1], error


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_any_shape_comes_back(name, shape):
    codec, x = CODECS[name][0], numbers(shape)
    coded = codec.encode(x)
    assert all(s.ndim == x.ndim for s in coded.scales)
    got = back(codec, x)
    assert got.shape == shape
    assert np.max(np.abs(got - x)) <= np.max(np.abs(x)) / (12 if name == "int4" else 20)


@pytest.mark.parametrize("name", ["fp8", "int8", "int8-linear", "int4"])
def test_no_second_moment_above_zero_is_stored_as_zero(name):
    v = jnp.asarray(np.logspace(-30, 2, 128), jnp.float32).at[3].set(0)
    for uniform in (None, jnp.zeros_like(v)):
        got = back(CODECS[name][0], v, signed=False, uniform=uniform)
        assert got[3] == 0
        assert np.all(np.delete(got, 3) > 0)


def test_a_plain_cast_does_store_small_second_moments_as_zero():
    v = jnp.asarray(np.logspace(-30, 2, 128), jnp.float32)
    assert np.sum(back(codecs.fp8(expand=False), v, signed=False) == 0) > 64


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("signed", [True, False])
def test_code_zero_is_zero_and_a_block_of_zeros_stays(name, signed):
    codec, x = CODECS[name][0], numbers((2, 128), signed=signed)
    coded = codec.encode(x, signed=signed)
    zeroed = coded._replace(codes=jnp.zeros_like(coded.codes))
    assert not np.any(codec.decode(zeroed, 128, signed=signed))
    assert not np.any(back(codec, jnp.zeros((2, 128)), signed=signed))


@pytest.mark.parametrize("name", CODECS)
def test_what_is_not_finite_leaves_its_neighbours_alone(name):
    codec, x = CODECS[name][0], numbers((1, 128))
    holed = np.asarray(back(codec, x.at[0, 5].set(0)))
    np.testing.assert_array_equal(back(codec, x.at[0, 5].set(jnp.nan)), holed)
    with_inf = back(codec, x.at[0, 5].set(-jnp.inf))
    assert np.all(np.isfinite(with_inf))
    np.testing.assert_allclose(with_inf[0, 5], -(2.0**126), rtol=1e-6)


@pytest.mark.parametrize("x", [2.5, -1e-20, 8e37])
@pytest.mark.parametrize("name", CODECS)
def test_a_block_of_one_magnitude_is_exact(name, x):
    np.testing.assert_allclose(back(CODECS[name][0], jnp.full(7, x, jnp.float32)), x, rtol=1e-6)


@pytest.mark.parametrize("name", ["int8", "int8-linear", "int4", "fp8-plain"])
@pytest.mark.parametrize("signed", [True, False])
def test_decoded_numbers_have_the_codes_they_came_from(name, signed):
    codec, x = CODECS[name][0], numbers((4, 128), signed=signed)
    again = jnp.asarray(back(codec, x, signed=signed))
    first, second = (codec.encode(y, signed=signed).codes for y in (x, again))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize("name", ["fp8-plain", "int8", "int8-linear", "int4"])
def test_stochastic_rounding_is_right_on_average(name):
    codec, x = CODECS[name][0], jnp.asarray([1.0, 0.61, -0.333, 0.2])
    draws = jax.random.uniform(jax.random.key(0), (4000, 4))
    one = lambda u: codec.decode(codec.encode(x, uniform=u), 4)  # noqa: E731
    got = np.asarray(jax.vmap(one)(draws))
    spread = np.std(got, axis=0)
    assert np.all(spread[1:] > 0)
    # Five standard errors of the mean, and rounding.
    assert np.all(np.abs(got.mean(0) - x) <= 5 * spread / np.sqrt(4000) + 1e-6)


@pytest.mark.parametrize("expand", [True, False])
def test_fp8_is_the_reference(expand):
    x = numbers(128, seed=3)
    theirs = coat.encode(np.asarray(x, np.float64), expand)
    coded = codecs.fp8(expand=expand).encode(x)
    codes = np.asarray(coded.codes)
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    assert np.mean(codes == theirs[0]) >= 0.99
    got = codecs.fp8(expand=expand).decode(coded, 128)
    np.testing.assert_allclose(got, coat.decode(*theirs), rtol=0.07)


def test_the_dynamic_map_has_seven_decades_and_its_numbers_have_their_codes():
    for signed, count in ((True, 128), (False, 256)):
        values = codecs.dynamic_map(signed=signed)
        assert len(values) == count
        assert np.all(np.diff(values) > 0)
        assert values[0] == 0
        assert values[-1] == 1
        coded = codecs.Dynamic(count).encode(jnp.asarray(values, jnp.float32), signed=signed)
        np.testing.assert_array_equal(np.asarray(coded.codes, np.int32), np.arange(count) % count)
    # Published: the smallest number with a sign is 10^-6 times the middle of [0.1, 1].
    assert codecs.dynamic_map(signed=True)[1] == pytest.approx(0.55e-6)


def test_nearest_of_the_dynamic_map():
    values = codecs.dynamic_map(signed=False)
    x = np.sort(np.random.default_rng(0).uniform(0, 1, 256).astype(np.float32) ** 4)
    x[-1] = 1
    codes = np.asarray(codecs.Dynamic(256).encode(jnp.asarray(x), signed=False).codes)
    distance = np.abs(x[:, None] - values)
    mine = np.take_along_axis(distance, codes[:, None].astype(int), 1)[:, 0]
    np.testing.assert_allclose(mine, distance[:, 1:].min(1), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "even", "sizes"),
    [
        ((1024, 1024), False, (1, 128)),
        ((300,), False, (100,)),
        ((257,), False, (86,)),
        ((257,), True, (86,)),
        ((3, 129), True, (1, 66)),
        ((16, 64), False, (2, 64)),
        ((7, 64), False, (1, 64)),
        ((12, 2, 4), False, (12, 2, 4)),
        ((3, 3, 2, 8), False, (1, 3, 2, 8)),
        ((1024, 10), False, (8, 10)),
    ],
)
def test_blocks_are_whole_axes_or_equal_parts(shape, even, sizes):
    assert blocks.tile_sizes(shape, 128, even=even) == sizes


def test_blocks_hold_neighbours():
    x, grid = jnp.arange(24.0).reshape(4, 6), blocks.Grid((4, 6), (2, 3))
    largest = grid.over(jnp.max, x)
    np.testing.assert_array_equal(largest, [[8, 11], [20, 23]])
    np.testing.assert_array_equal(grid.spread(largest)[2], [20, 20, 20, 23, 23, 23])


IN_TILES = {
    (64, 512): {"over", "spread", "pack", "unpack"},
    (2, 64, 384): {"over", "spread"},
    (64, 300): set(),
    (32, 512): set(),  # eight devices may hold four rows each
    (16, 64): set(),
}


@pytest.mark.parametrize("shape", IN_TILES)
@pytest.mark.parametrize("of", ["over", "spread", "pack", "unpack"])
def test_tiles_of_a_tpu_give_the_same(of, shape, monkeypatch):
    grid = blocks.Grid(shape, blocks.tile_sizes(shape, 128, even=True))
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, shape), jnp.uint8)
    x, largest, pairs = numbers(shape), grid.over(jnp.max, numbers(shape)), grid.pack(codes)
    calls = {
        "over": lambda: grid.over(jnp.min, x, jnp.inf),
        "spread": lambda: grid.spread(largest),
        "pack": lambda: grid.pack(codes),
        "unpack": lambda: grid.unpack(pairs),
    }
    want, cut, whole = calls[of](), [], blocks._whole
    monkeypatch.setattr(blocks, "_on_platform", lambda x, fn: fn(x, tiled=True))
    monkeypatch.setattr(blocks, "_whole", lambda tiles: cut.append(tiles) or whole(tiles))
    np.testing.assert_array_equal(calls[of](), want)
    assert bool(cut) == (of in IN_TILES[shape])


def test_devices_that_hold_whole_arrays_share_no_rows():
    mesh = mesh_of(AxisType.Auto, (8,), ("x",))
    counted = []

    def local(x):
        counted.append(blocks._most_shards())
        return x

    jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x")))(jnp.zeros(8))
    assert (counted, blocks._most_shards()) == ([1], 8)


@pytest.mark.parametrize("name", ["int8", "int8-linear", "int4"])
@pytest.mark.parametrize("signed", [True, False])
def test_no_draw_takes_the_largest_beyond_the_last_code(name, signed):
    codec, x = CODECS[name][0], jnp.asarray([1.0, 0.5])
    draws = jnp.full(2, 1 - 2.0**-24)
    assert back(codec, x, signed=signed, uniform=draws)[0] == 1


@pytest.mark.parametrize("block", [0, 1.5, True])
def test_wrong_blocks_are_refused(block):
    with pytest.raises(ValueError, match=r"codecs: block must be .* got"):
        codecs.fp8(block=block)


def test_an_unknown_map_is_refused():
    with pytest.raises(ValueError, match="int8: map must be 'dynamic' or 'linear', got 'log'"):
        codecs.int8(map="log")
