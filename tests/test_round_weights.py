"""Weights on a grid of few bits: where they land, that small steps count, and codes held alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_problem import mesh_of
from reference.rounding import weights

from optlab import layout
from optlab.transforms.round_weights import (
    PackedWeight,
    pack,
    pack_weights,
    round_weights,
    unpack,
    unpack_weights,
)

KEY = jax.random.key(0)


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def uniform(shape):
    # Multiples of 2^-24, as are drawn.
    whole = np.random.default_rng(1).integers(2**24, size=shape)
    return jnp.asarray(whole * 2.0**-24, jnp.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((8, 64), 32), ((8, 48), 64), ((3, 7, 5), 16), ((5, 3), 256), ((6, 10), 10)],
    ids=str,
)
def test_codes_are_those_of_the_paper(shape, block, bits):
    x, drawn = normal(shape), uniform(shape)
    x = x.at[0].set(jnp.abs(x[0]) + 1)  # a block of one sign
    for u in (None, drawn):
        packed = jax.jit(pack, static_argnums=(1, 2))(x, bits, block, u)
        found, want = unpack(packed), weights(x, bits, block, u)
        step = (np.max(np.abs(x)) * 2) / (2**bits - 1)
        # A number that is half a scale from two codes, to float32, may go to either.
        off = np.abs(found - want) > 1e-5
        assert off.mean() < 0.01
        np.testing.assert_allclose(found, want, rtol=0, atol=1.01 * step)
    assert packed.codes.codes.dtype == jnp.uint8
    padded = -(-x.size // min(block, x.size + x.size % 2)) * min(block, x.size + x.size % 2)
    assert packed.codes.codes.size == padded * bits // 8


def test_a_step_lands_on_the_grid_of_the_sum():
    p, u = {"kernel": normal((16, 512))}, {"kernel": 1e-3 * normal((16, 512), 1)}
    tx = round_weights()
    updates, _ = jax.jit(tx.update)(u, tx.init(p), p)
    total = p["kernel"] + u["kernel"]
    scale = np.asarray(pack(total, 8, 256).codes.scale)
    landed = np.reshape(optax.apply_updates(p, updates)["kernel"], (16, 2, 256)) / scale
    np.testing.assert_allclose(landed, np.round(landed), rtol=0, atol=1e-3)
    assert np.abs(landed - np.reshape(total, landed.shape) / scale).max() < 1
    assert (landed.max(-1) - landed.min(-1)).round().max() <= 255


def test_weights_on_a_grid_stay_there_at_rest():
    # Rounded to nearest the ends of a block are on its grid, and the next grid is the same one.
    p = unpack_weights(pack_weights({"kernel": normal((16, 512))}))
    tx = round_weights()
    still, _ = tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)
    # But to a rounding of float32: some number in a thousand misses its code.
    assert np.mean(np.abs(still["kernel"]) > 1e-5) < 1e-3


def test_rounding_is_right_on_average():
    count, p = 2000, normal((1, 256))
    keys = jax.random.split(KEY, count)
    found = jax.jit(jax.vmap(lambda k: unpack(pack(p, 8, 256, jax.random.uniform(k, p.shape)))))(
        keys
    )
    scale = float(pack(p, 8, 256).codes.scale[0, 0, 0])
    inside = np.asarray((p > p.min()) & (p < p.max()))
    x = np.asarray(p, "f8") / scale
    fraction = x - np.floor(x)
    bound = 5 * scale * np.sqrt(fraction * (1 - fraction) / count) + 1e-6
    off = np.abs(np.asarray(found, "f8").mean(0) - p)
    assert np.all(off[inside] <= bound[inside])
    assert np.all(off[~inside] <= scale / 2 + 1e-6)


def test_steps_of_a_fiftieth_of_a_scale_add_up_where_nearest_loses_them():
    # The ends of the block stay where they are: the scale is 1/255.
    start = jnp.full((1, 4096), 0.5).at[0, 0].set(1.0)
    u = {"kernel": jnp.full((1, 4096), -0.02 / 255).at[0, 0].set(0.0)}
    tx, steps = round_weights(block=4096), 200

    def body(carry, _):
        p, state = carry
        updates, state = tx.update(u, state, p)
        return (optax.apply_updates(p, updates), state), None

    first = unpack_weights(pack_weights({"kernel": start}, block=4096))
    run = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), length=steps)[0])
    last, state = run(first)
    assert state.count == steps
    moved = np.asarray(last["kernel"] - first["kernel"])[0, 1:] * 255
    std = np.sqrt(steps * 0.02 * 0.98)
    assert abs(moved.mean() + steps * 0.02) < 5 * std / np.sqrt(moved.size)
    assert abs(moved.std() / std - 1) < 5 / np.sqrt(2 * moved.size)
    nearest = pack_weights(optax.apply_updates(first, u), block=4096)
    np.testing.assert_allclose(unpack_weights(nearest)["kernel"], first["kernel"], atol=1e-6)


def test_only_matrices_are_rounded():
    params = {
        "dense": {"bias": normal((16,)), "kernel": normal((8, 16))},
        "embed": {"embedding": normal((10, 8))},
        "empty": {"kernel": jnp.zeros((0, 4))},
        "hole": None,
        "lm_head": {"kernel": normal((8, 10))},
    }
    tx = round_weights(4)
    zeros = jax.tree.map(jnp.zeros_like, params)
    u, _ = tx.update(zeros, tx.init(params), params)
    changed = jax.tree.map(lambda x: bool(np.any(x)), u)
    assert changed["dense"] == {"bias": False, "kernel": True}
    assert not any(jax.tree.leaves([changed[k] for k in ("embed", "empty", "lm_head")]))
    assert u["hole"] is None
    packed = pack_weights(params, bits=4)
    assert isinstance(packed["dense"]["kernel"], PackedWeight)
    assert packed["lm_head"]["kernel"] is params["lm_head"]["kernel"]
    assert packed["hole"] is None
    plain = pack_weights(params, layout=layout.by_ndim)
    assert isinstance(plain["lm_head"]["kernel"], PackedWeight)


def test_a_link_and_a_loop_that_holds_codes_take_the_same_steps():
    params, target = {"kernel": normal((8, 256))}, normal((8, 256), 1)
    sgd = optax.sgd(0.05)
    linked = optax.chain(optax.sgd(0.05), round_weights(seed=3))

    @jax.jit
    def by_link(p, state):
        u, state = linked.update({"kernel": p["kernel"] - target}, state, p)
        return optax.apply_updates(p, u), state

    @jax.jit
    def by_codes(packed, state, t):
        p = unpack_weights(packed)
        u, state = sgd.update({"kernel": p["kernel"] - target}, state, p)
        key = jax.random.fold_in(jax.random.key(3), t)
        return pack_weights(optax.apply_updates(p, u), key), state

    packed = pack_weights(params)
    p = unpack_weights(packed)
    states = linked.init(p), sgd.init(p)
    for t in range(60):
        p, first = by_link(p, states[0])
        packed, second = by_codes(packed, states[1], t)
        states = first, second
        if t == 0:
            np.testing.assert_allclose(unpack_weights(packed)["kernel"], p["kernel"], atol=1e-6)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(packed))
    assert nbytes == 8 * 256 + 8 * 8
    scale = float(np.max(packed["kernel"].codes.scale))
    for found in (p, unpack_weights(packed)):
        assert np.abs(found["kernel"] - target).mean() < 5 * scale
    assert np.abs(params["kernel"] - target).mean() > 1


def test_updates_are_bfloat16_for_bfloat16_weights_and_right_on_average():
    p = {"kernel": jnp.full((1, 4096), 0.5, jnp.bfloat16).at[0, 0].set(1.0)}
    u = {"kernel": jnp.full((1, 4096), 1e-3, jnp.bfloat16)}
    tx = round_weights(block=4096)
    updates, _ = tx.update(u, tx.init(p), p)
    assert updates["kernel"].dtype == jnp.bfloat16
    landed = optax.apply_updates(p, updates)["kernel"].astype(jnp.float32)
    # A scale of 1/255 beside bfloat16's 1/256 there.
    assert abs(float(jnp.mean(landed[0, 1:])) - 0.501) < 2**-9


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((16, 64), P("data", "model")),
        ((16, 64), P(None, ("fsdp", "model"))),  # 16 columns each: half a block
        ((8, 24), P("data", None)),  # no block fits a row
    ],
    ids=str,
)
def test_the_grid_does_not_depend_on_the_mesh(kind, shape, spec):
    p, u = {"kernel": normal(shape)}, {"kernel": 1e-3 * normal(shape, 1)}
    tx = round_weights(block=32)
    step = lambda u, state, p: tx.update(u, state, p)  # noqa: E731
    want, _ = jax.jit(step)(u, tx.init(p), p)
    with jax.set_mesh(mesh_of(kind)) as _:
        mesh = mesh_of(kind)
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (u, p)]
        got, _ = jax.jit(step)(placed[0], tx.init(placed[1]), placed[1])
        packed = jax.jit(functools.partial(pack_weights, block=32))(placed[1])
        back = unpack_weights(packed)
    np.testing.assert_allclose(got["kernel"], want["kernel"], rtol=0, atol=1e-6)
    if kind == AxisType.Explicit:
        assert jax.typeof(got["kernel"]) == jax.typeof(placed[1]["kernel"])
    expected = unpack_weights(pack_weights(p, block=32))
    np.testing.assert_allclose(back["kernel"], expected["kernel"], rtol=0, atol=1e-6)


def test_other_seeds_steps_and_leaves_draw_other_numbers():
    p = {"a": normal((4, 64)), "b": normal((4, 64))}
    zeros = jax.tree.map(jnp.zeros_like, p)
    tx = round_weights(4, block=64)
    first, state = tx.update(zeros, tx.init(p), p)
    again, _ = tx.update(zeros, tx.init(p), p)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = round_weights(4, block=64, seed=1)
    for u in (tx.update(zeros, state, p)[0], other.update(zeros, other.init(p), p)[0]):
        assert not np.array_equal(u["a"], first["a"])
    assert not np.array_equal(first["a"], first["b"])


WRONG = (
    ({"bits": 2}, ValueError, r"bits must be 4 or 8, got 2\."),
    ({"bits": True}, ValueError, "bits must be 4 or 8"),
    ({"block": 0}, ValueError, "block must be a whole number >= 2"),
    ({"block": 7}, ValueError, r"block must be an even number, got 7\."),
    ({"block": 2.5}, TypeError, "block must be a whole number"),
    ({"layout": "flax"}, TypeError, "layout must be a function or None"),
    ({"seed": -1}, ValueError, "seed must be a whole number >= 0"),
    ({"blocks": 64}, TypeError, r"unknown keyword 'blocks'\. Did you mean block\?"),
)


@pytest.mark.parametrize(("arguments", "kind", "text"), WRONG, ids=lambda x: str(x)[:30])
def test_wrong_arguments_are_refused(arguments, kind, text):
    with pytest.raises(kind, match=f"^round_weights: {text}"):
        round_weights(**arguments)
    if "seed" not in arguments:
        with pytest.raises(kind, match=f"^pack_weights: {text}"):
            pack_weights({}, **arguments)


def test_wrong_calls_are_refused():
    tx, p = round_weights(), {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="round_weights: update needs the current parameters"):
        tx.update(p, tx.init(p))
    with pytest.raises(TypeError, match=r"pack_weights: key must be one key of jax\.random, got 0"):
        pack_weights(p, 0)
    with pytest.raises(TypeError, match="pack_weights: leaf 'kernel' has dtype int32"):
        pack_weights({"kernel": jnp.ones((2, 2), jnp.int32)})
