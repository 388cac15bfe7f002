"""Numbers stored as small integers, with a scale and a zero point for every block of them."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType


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


class Grid(NamedTuple):
    """The blocks of an array: their numbers from its entries, and back to the entries.

    Entries stay where they lie: only what is one number per block or per row of one is moved.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]  # of a block, from `tile_sizes`

    def over(self, reduce: Callable[..., jax.Array], x: jax.Array, fill: float = 0) -> jax.Array:
        """Return `reduce` of every block, one entry each; `fill` pads the last axis."""
        size = self.sizes[-1]
        cut = functools.partial(_over_rows, reduce=reduce, size=size)
        rows = _on_platform(_padded(x, size, fill), cut)
        pairs = [(n // size, size) for n, size in zip(x.shape, self.sizes, strict=True)][:-1]
        apart = rows.reshape(*(n for pair in pairs for n in pair), rows.shape[-1])
        return reduce(apart, tuple(range(1, apart.ndim, 2)))

    def spread(self, values: jax.Array) -> jax.Array:
        """Return one number for every block as an array."""
        for axis, size in enumerate(self.sizes[:-1]):
            values = jnp.repeat(values, size, axis) if size > 1 else values
        if values.shape[-1] == 1:
            return jnp.broadcast_to(values, self.shape)
        wide = _on_platform(values, functools.partial(_along_rows, size=self.sizes[-1]))
        return wide[..., : self.shape[-1]]

    def pack(self, codes: jax.Array) -> jax.Array:
        """Put two codes into a byte along the last axis, block by block as `packed` does."""
        size = self.sizes[-1]
        return _on_platform(_padded(codes, size), functools.partial(_packed_rows, size=size))

    def unpack(self, pairs: jax.Array) -> jax.Array:
        """Return what `pack` was given."""
        codes = _on_platform(pairs, functools.partial(_unpacked_rows, size=self.sizes[-1]))
        return codes[..., : self.shape[-1]]


# A TPU keeps an array in tiles of 8 rows by 128. Rows of 128 lie there as (m/8, n/128, 8, 128);
# taken as (m, n/128, 128) the array is copied: AdamW with int8 accessed 98 bytes per parameter,
# now 35, of which 9 are scales in on-chip memory. On a CPU such tiles cost a third of the step.
_SUBLANES, _LANES = 8, 128


def _on_platform(x: jax.Array, fn: Callable[..., jax.Array]) -> jax.Array:
    return jax.lax.platform_dependent(
        x, tpu=functools.partial(fn, tiled=True), default=functools.partial(fn, tiled=False)
    )


def _tileable(x: jax.Array, size: int) -> bool:
    """Tell whether rows of that size lie in whole tiles, whatever devices share the array."""
    rows = _SUBLANES * _most_shards()
    return x.ndim > 1 and x.shape[-2] % rows == 0 and size % _LANES == 0


def _most_shards() -> int:
    """Return how many devices may share an axis: eight rows of two of them would be sent around."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count()
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in kinds if kind != AxisType.Manual)


def _tiles(x: jax.Array, size: int) -> jax.Array:
    """Return (..., m, n) as (..., m/8, n/size, 8, size)."""
    rows = x.reshape(*x.shape[:-2], -1, _SUBLANES, x.shape[-1] // size, size)
    return rows.swapaxes(-3, -2)


def _whole(tiles: jax.Array) -> jax.Array:
    """Return what `_tiles` was given."""
    rows = tiles.swapaxes(-3, -2)
    return rows.reshape(*rows.shape[:-4], rows.shape[-4] * _SUBLANES, -1)


def _padded(x: jax.Array, size: int, fill: float = 0) -> jax.Array:
    missing = -x.shape[-1] % size
    pads = [(0, 0)] * (x.ndim - 1) + [(0, missing)]
    return jnp.pad(x, pads, constant_values=fill) if missing else x


def _over_rows(x: jax.Array, reduce: Any, size: int, tiled: bool) -> jax.Array:
    if x.shape[-1] == size:
        return reduce(x, -1)[..., None]
    if tiled and _tileable(x, size):
        return _whole(reduce(_tiles(x, size), -1)[..., None])
    return reduce(x.reshape(*x.shape[:-1], -1, size), -1)


def _along_rows(values: jax.Array, size: int, tiled: bool) -> jax.Array:
    if tiled and _tileable(values, size):
        columns = _tiles(values, 1)
        return _whole(jnp.broadcast_to(columns, (*columns.shape[:-1], size)))
    wide = jnp.broadcast_to(values[..., None], (*values.shape, size))
    return wide.reshape(*values.shape[:-1], -1)


def _packed_rows(codes: jax.Array, size: int, tiled: bool) -> jax.Array:
    if not (tiled and _tileable(codes, size) and _halved(size, codes.shape[-1])):
        rows = packed(codes.reshape(*codes.shape[:-1], -1, size))
        return rows.reshape(*codes.shape[:-1], -1)
    tiles = _tiles(codes, size)
    tiles = tiles.reshape(*tiles.shape[:-3], -1, 2, *tiles.shape[-2:])
    turned = jnp.roll(tiles, size // 2, -1)
    left = _iota(tiles[..., 0, :, :].shape, -1) < size // 2
    low = jnp.where(left, tiles[..., 0, :, :], turned[..., 1, :, :])
    high = jnp.where(left, turned[..., 0, :, :], tiles[..., 1, :, :])
    return _whole(low | (high << 4))


def _unpacked_rows(pairs: jax.Array, size: int, tiled: bool) -> jax.Array:
    if not (tiled and _tileable(pairs, size) and _halved(size, 2 * pairs.shape[-1])):
        rows = unpacked(pairs.reshape(*pairs.shape[:-1], -1, size // 2))
        return rows.reshape(*pairs.shape[:-1], -1)
    tiles = _tiles(pairs, size)
    shape = (*tiles.shape[:-2], 2, *tiles.shape[-2:])
    left, even = _iota(shape, -1) < size // 2, _iota(shape, -3) == 0
    turned = jnp.roll(tiles, size // 2, -1)
    both = jnp.where(left == even, jnp.expand_dims(tiles, -3), jnp.expand_dims(turned, -3))
    codes = jnp.where(left, both & 15, both >> 4)
    return _whole(codes.reshape(*codes.shape[:-4], -1, *codes.shape[-2:]))


def _halved(size: int, length: int) -> bool:
    """Tell whether the bytes of two blocks fill the lanes of a tile."""
    return size == _LANES and length % (2 * size) == 0


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis % len(shape))
