"""Numbers stored as small integers, with a scale and a zero point for every block of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Codes(NamedTuple):
    """Numbers as integers: value = scale (code - zero), block by block."""

    codes: jax.Array  # uint8, (..., blocks, size); two to a byte if of 4 bits, (..., size / 2)
    scale: jax.Array  # float32, (..., blocks, 1)
    zero: jax.Array  # float32, (..., blocks, 1): a whole number


def in_blocks(x: jax.Array, block: int, axes: int) -> jax.Array:
    """Return the last `axes` axes of x as rows of `block` numbers, the last one padded with 0."""
    flat = x.reshape(*x.shape[: x.ndim - axes], -1)
    missing = -flat.shape[-1] % block
    flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, missing)])
    return flat.reshape(*flat.shape[:-1], -1, block)


def from_blocks(rows: jax.Array, shape: tuple[int, ...], axes: int) -> jax.Array:
    """Return what `in_blocks` was given, of that shape."""
    size = 1
    for n in shape[len(shape) - axes :]:
        size *= n
    return rows.reshape(*shape[: len(shape) - axes], -1)[..., :size].reshape(shape)


def encode(rows: jax.Array, bits: int, uniform: jax.Array | None = None) -> Codes:
    """Return rows of numbers as codes of 4 or 8 bits.

    scale = (max - min)/(2^bits - 1) over the row and zero = -min/scale, with 0 taken into the
    range: a row of one sign, or of one value, keeps its numbers to within half a scale. Rounds half
    to even; with `uniform` numbers in [0, 1), of the shape of the rows, up with the probability of
    the fraction.
    """
    top = 2**bits - 1
    low = jnp.minimum(jnp.min(rows, -1, keepdims=True), 0)
    high = jnp.maximum(jnp.max(rows, -1, keepdims=True), 0)
    scale = jnp.maximum(high - low, 1e-5) / top
    zero = jnp.clip(-jnp.round(low / scale), 0, top)
    x = rows / scale
    whole = jnp.round(x) if uniform is None else jnp.floor(x) + (uniform < x - jnp.floor(x))
    codes = jnp.clip(whole + zero, 0, top).astype(jnp.uint8)
    return Codes(_packed(codes) if bits == 4 else codes, scale, zero)


def decode(stored: Codes, bits: int) -> jax.Array:
    """Return the rows of numbers, in float32."""
    codes = _unpacked(stored.codes) if bits == 4 else stored.codes
    return stored.scale * (codes.astype(jnp.float32) - stored.zero)


def _packed(codes: jax.Array) -> jax.Array:
    """Put two codes into a byte: a row's first half low, its second half high."""
    low, high = jnp.split(codes, 2, axis=-1)
    return low | (high << 4)


def _unpacked(packed: jax.Array) -> jax.Array:
    return jnp.concatenate([packed & 15, packed >> 4], axis=-1)
