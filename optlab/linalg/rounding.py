"""Rounding of float32 to narrower floats: at random without bias, or to the nearest with a rest."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SIGN, _INF = np.uint32(0x80000000), np.uint32(0x7F800000)
_KEPT = np.uint32(0xFFFF0000)  # by bfloat16
_TOP = np.uint32(0x7F7F0000)  # the largest finite bfloat16
_HALF = 2**15  # of what bfloat16 drops of float32


def is_narrow(dtype: Any) -> bool:
    """Tell whether a dtype is a float of fewer bits than float32."""
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def stochastic(x: jax.Array, bits: jax.Array, dtype: Any) -> jax.Array:
    """Round float32 x to one of its two neighbours in `dtype`, by random uint32 `bits`.

    Up with the probability of the fraction of the way: the mean is x, exactly, in the normal range
    of `dtype`; to 2^-32 of a spacing among its subnormals. What `dtype` can represent never moves.
    Finite numbers stay finite: beyond the largest they are the largest. Infinities and NaN stay.
    """
    if dtype == jnp.bfloat16:
        # Of float32 only the low half of the bits is dropped: what is added there carries over
        # into the rest with the right probability, also into the exponent.
        magnitude, sign = _magnitude(x)
        raised = jnp.minimum((magnitude + (bits >> 16)) & _KEPT, _TOP)
        special = magnitude | (magnitude > _INF).astype(jnp.uint32) << 22  # a NaN keeps a bit
        kept = jnp.where(magnitude < _INF, raised, special) | sign
        return jax.lax.bitcast_convert_type((kept >> 16).astype(jnp.uint16), jnp.bfloat16)
    size = jnp.abs(x)
    step = _spacing(x, dtype)
    whole = jnp.floor(size / step)  # a power of 2 divides: exact, and so is the fraction
    fraction = size / step - whole
    up = bits < (fraction * 2.0**32).astype(jnp.uint32)
    rounded = jnp.minimum((whole + up) * step, float(jnp.finfo(dtype).max))
    return jnp.where(jnp.isfinite(x), jnp.copysign(rounded, x), x).astype(dtype)


def nearest(x: jax.Array, dtype: Any) -> jax.Array:
    """Round float32 x to bfloat16 or float16, half to even, and return it in float32.

    XLA for a GPU drops a cast to `dtype` and back: x less that would be 0 (jax 0.10.2, H200).
    """
    if dtype == jnp.bfloat16:
        return jax.lax.reduce_precision(x, 8, 7)
    step, top = _spacing(x, dtype), float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(jnp.round(x / step) * step, -top, top), x)


def nearest_with_rest(x: jax.Array, dtype: Any) -> jax.Array:
    """Round float32 x to bfloat16 or float16 so that `rest` is exact; in float32.

    As `nearest`, but bfloat16 rounds half away from zero: the rest is then in [-2^15, 2^15).
    """
    if dtype != jnp.bfloat16:
        return nearest(x, dtype)
    magnitude, sign = _magnitude(x)
    raised = jnp.minimum((magnitude + _HALF) & _KEPT, _TOP)
    return _number(jnp.where(magnitude < _INF, raised, magnitude) | sign)


def rest(x: jax.Array, q: jax.Array) -> jax.Array:
    """Return by how many float32 numbers |x| is above |q|, as int16.

    Exact for x within half a spacing of bfloat16, or of float16's normal range, from q.
    """
    (high, _), (low, _) = _magnitude(x), _magnitude(q)
    away = jnp.clip(high.astype(jnp.int32) - low.astype(jnp.int32), -_HALF, _HALF - 1)
    return jnp.where(jnp.isfinite(x) & jnp.isfinite(q), away, 0).astype(jnp.int16)


def with_rest(q: jax.Array, more: jax.Array) -> jax.Array:
    """Return the float32 number that is `more` numbers farther from zero than q.

    For any q: it stays on q's side of zero, and infinities and NaN stay.
    """
    magnitude, sign = _magnitude(q)
    moved = jnp.maximum(magnitude.astype(jnp.int32) + more.astype(jnp.int32), 0)
    return jnp.where(magnitude < _INF, _number(moved.astype(jnp.uint32) | sign), q)


def _magnitude(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the bits of float32 x as uint32, without the sign and of the sign alone."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return bits & (_SIGN - 1), bits & _SIGN


def _number(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _spacing(x: jax.Array, dtype: Any) -> jax.Array:
    """Return the distance of neighbours in `dtype`, a float of less range than float32, at x."""
    info = jnp.finfo(dtype)
    lowest = np.uint32(127 + int(info.minexp))
    exponent = jnp.maximum(_magnitude(x)[0] >> 23, lowest)
    return _number((exponent - np.uint32(info.nmant)) << 23)
