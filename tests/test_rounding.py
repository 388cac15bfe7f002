"""Rounding of float32 to narrower floats, against the sorted list of their numbers."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference.rounding import neighbours

from optlab.linalg import rounding

BFLOAT16, FLOAT16 = ml_dtypes.bfloat16, np.float16
DTYPES = (BFLOAT16, FLOAT16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
by_half = pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: np.dtype(d).name)
ALL_BITS = np.uint32(2**32 - 1)


@functools.partial(jax.jit, static_argnames="dtype")
def stochastic(x, bits, dtype):
    return rounding.stochastic(x, jnp.broadcast_to(bits, x.shape), dtype)


def patterns(dtype):
    """Return every number, infinity and NaN of a dtype."""
    size = np.dtype(dtype).itemsize
    return np.arange(2 ** (8 * size), dtype=f"u{size}").view(dtype)


def draw(dtype, count=2000):
    """Return float32 numbers over the range of a dtype, and beyond its lower end."""
    rng, info = np.random.default_rng(0), ml_dtypes.finfo(dtype)
    low, high = float(info.smallest_subnormal) / 8, float(info.max) / 2
    low = max(low, 1e-37)  # XLA on CPU takes what is below for zero
    size = np.exp(rng.uniform(np.log(low), np.log(high), size=count))
    return (size * rng.choice([-1, 1], size=count)).astype("f4")


@by_dtype
def test_what_needs_no_rounding_never_moves(dtype):
    every = patterns(dtype)
    with np.errstate(invalid="ignore"):
        wide = every.astype("f4")
    for bits in np.uint32([0, 2**31, ALL_BITS]):
        found = np.asarray(stochastic(wide, bits, dtype))
        same = found.view(f"u{every.itemsize}") == every.view(f"u{every.itemsize}")
        assert np.all(same | (np.isnan(wide) & np.isnan(found.astype("f4"))))


@by_dtype
def test_a_number_goes_to_a_neighbour_up_where_the_bits_are_fewer_than_its_fraction(dtype):
    x = draw(dtype)
    low, high, fraction = neighbours(np.abs(x), dtype)
    for bits in np.uint32([0, 2**30, 3 * 2**30, ALL_BITS]):
        found = np.abs(np.asarray(stochastic(x, bits, dtype)).astype("f8"))
        # bfloat16 adds bits to what it drops: they carry where they are many.
        many = ALL_BITS - bits if dtype == BFLOAT16 else bits
        np.testing.assert_array_equal(found, np.where(many < fraction * 2**32, high, low))


@by_dtype
def test_the_mean_over_all_bits_is_the_number_itself(dtype):
    dropped = 23 - ml_dtypes.finfo(dtype).nmant  # bits: so many can matter
    bits = np.arange(2**dropped, dtype="u4") << (32 - dropped)
    for x in (1 / 3, -1.2345678, 2 - 2**-23, -0.0312345):
        found = np.asarray(stochastic(np.full(bits.shape, x, "f4"), bits, dtype))
        assert np.mean(found.astype("f8")) == np.float64(np.float32(x))
        assert len(np.unique(found.astype("f8"))) == 2


@by_dtype
def test_what_is_not_finite_stays_and_what_is_finite_stays_finite(dtype):
    top = float(ml_dtypes.finfo(dtype).max)
    beyond = np.float32(min(1.5 * top, float(np.finfo("f4").max)))
    x = np.array([beyond, -beyond, top, np.nan, 0.0, -0.0], "f4")
    found = np.asarray(stochastic(x, ALL_BITS, dtype)).astype("f8")
    np.testing.assert_array_equal(found, [top, -top, top, np.nan, 0, 0])
    assert list(np.signbit(found[4:])) == [False, True]
    endless = np.asarray(stochastic(np.float32([np.inf, -np.inf]), ALL_BITS, dtype))
    with np.errstate(invalid="ignore"):
        want = np.float32([np.inf, -np.inf]).astype(dtype)
    np.testing.assert_array_equal(endless.astype("f8"), want.astype("f8"))


@by_half
def test_nearest_is_the_cast_also_where_xla_could_drop_one(dtype):
    x = np.concatenate([draw(dtype), patterns(dtype).astype("f4")])
    with np.errstate(invalid="ignore"):
        want = x.astype(dtype).astype("f4")
    np.testing.assert_array_equal(jax.jit(lambda x: rounding.nearest(x, dtype))(x), want)


@by_half
def test_a_number_is_the_nearest_and_its_rest(dtype):
    normal = 2 * float(ml_dtypes.finfo(dtype).smallest_normal)
    x = np.float32([v for v in draw(dtype, 20_000) if abs(v) > normal])

    @jax.jit
    def apart(x):
        q = rounding.nearest_with_rest(x, dtype)
        r = rounding.rest(x, q)
        return q, r, rounding.with_rest(q, r)

    q, r, back = apart(x)
    assert r.dtype == jnp.int16
    low, high, _ = neighbours(x, dtype)
    assert np.all((q == low) | (q == high))
    assert np.all(np.abs(q - x) <= (high - low) / 2)
    np.testing.assert_array_equal(back, x)
    assert np.asarray(r).astype(int).min() < -4000 < 4000 < np.asarray(r).astype(int).max()


def test_a_rest_does_no_harm_beside_a_number_it_was_not_made_for():
    q = np.float32([0, -0.0, 1e-38, np.inf, -np.inf, np.nan, 3.3895314e38, -1])
    for more in (-(2**15), 2**15 - 1):
        found = np.asarray(rounding.with_rest(q, np.full(8, more, "i2")))
        np.testing.assert_allclose(found, q, rtol=2**-8, atol=1e-38)
        assert np.all(np.isfinite(found) == np.isfinite(q))
    assert not np.any(rounding.rest(np.float32([np.nan, np.inf, 1]), np.float32([1, 1, np.inf])))
