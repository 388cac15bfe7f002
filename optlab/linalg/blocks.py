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
    return Codes(packed(codes) if bits == 4 else codes, scale, zero)


def decode(stored: Codes, bits: int) -> jax.Array:
    """Return the rows of numbers, in float32."""
    codes = unpacked(stored.codes) if bits == 4 else stored.codes
    return stored.scale * (codes.astype(jnp.float32) - stored.zero)


def packed(codes: jax.Array) -> jax.Array:
    """Put two codes into a byte: a row's first half low, its second half high."""
    low, high = jnp.split(codes, 2, axis=-1)
    return low | (high << 4)


def unpacked(pairs: jax.Array) -> jax.Array:
    """Return the two codes of every byte."""
    return jnp.concatenate([pairs & 15, pairs >> 4], axis=-1)


def tile_sizes(shape: tuple[int, ...], block: int, *, even: bool = False) -> tuple[int, ...]:
    """Return the extents of blocks of about that many entries, one per axis of an array.

    The last axis is cut evenly into as few parts as it takes. One that is shorter than a block
    is whole, and the axis before it is cut, into equal parts; and so on. `even`: along the last
    axis, an even number.
    """
    parts = -(-shape[-1] // block)
    last = -(-shape[-1] // parts)
    sizes = [last + (last % 2 if even else 0)]
    room = block // sizes[0]
    for n in reversed(shape[:-1]):
        whole = sizes[0] >= shape[-len(sizes)]
        most = min(room, n) if whole else 1
        size = next(s for s in range(max(most, 1), 0, -1) if n % s == 0)
        room //= size
        sizes.insert(0, size)
    return tuple(sizes)


def tiled(x: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Return an array (n0, n1, ...) as blocks (n0/s0, s0, n1/s1, s1, ...), the last axis padded."""
    missing = -x.shape[-1] % sizes[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
    pairs = ((n // size, size) for n, size in zip(x.shape, sizes, strict=True))
    return x.reshape([n for pair in pairs for n in pair])


def untiled(tiles: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the array of that shape whose blocks they are."""
    return tiles.reshape(*shape[:-1], -1)[..., : shape[-1]]
