"""Codecs: arrays as codes of 8 or 4 bits, with one scale for every block of their entries."""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optlab.linalg import blocks

Map = Literal["dynamic", "linear"]


class Coded(NamedTuple):
    """An array in few bits."""

    codes: jax.Array  # of the array's shape; of 4 bits, two to a byte along the last axis
    scales: tuple[jax.Array, ...]  # one entry per block, of the array's rank


@dataclasses.dataclass(frozen=True)
class Codec:
    """Numbers as codes, block by block; subclasses say what a code is.

    A block is `block` consecutive entries of the last axis, which is cut evenly: of 300, three of
    100. Where the last axis is shorter, a block takes in entries of the axes before it. So codes
    and scales have the rank of the array and can be cut over devices as it is. Code 0 means 0.

    A NaN is stored as 0, and what is larger than 2^126 as that: neither spoils its neighbours.
    """

    block: int = 128

    @property
    def even(self) -> bool:
        """Whether blocks need an even number of entries: two codes share a byte."""
        return False

    def __post_init__(self) -> None:
        """Refuse a block without entries."""
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(
                f"codecs: block must be a whole number >= 1, got {self.block!r}. Write block=128."
            )

    @functools.partial(jax.jit, static_argnames=("self", "signed"))
    def encode(
        self, x: jax.Array, *, signed: bool = True, uniform: jax.Array | None = None
    ) -> Coded:
        """Return x in few bits.

        Without `signed` x has no negative entry, as second moments have none, and no positive entry
        is stored as 0. Rounds to nearest; with `uniform` numbers in [0, 1) of x's shape, up with
        the probability of the fraction.
        """
        codes, *scales = self._encode(_bounded(x.astype(jnp.float32)), signed, uniform)
        return Coded(codes, tuple(scales))

    @functools.partial(jax.jit, static_argnames=("self", "length", "signed"))
    def decode(self, coded: Coded, length: int, *, signed: bool = True) -> jax.Array:
        """Return the array in float32; `length` is that of its last axis."""
        shape = (*coded.codes.shape[:-1], length)
        return self._decode(coded.codes, signed, coded.scales, self._grid(shape))

    def _grid(self, shape: tuple[int, ...]) -> blocks.Grid:
        return blocks.Grid(shape, blocks.tile_sizes(shape, self.block, even=self.even))

    def _encode(self, x: jax.Array, signed: bool, uniform: jax.Array | None) -> tuple:
        raise NotImplementedError

    def _decode(
        self,
        codes: jax.Array,
        signed: bool,
        scales: tuple[jax.Array, ...],
        grid: blocks.Grid,
    ) -> jax.Array:
        raise NotImplementedError


def _bounded(x: jax.Array) -> jax.Array:
    """Return numbers whose inverse is normal: XLA divides by a block's largest with it."""
    return jnp.clip(jnp.nan_to_num(x), -_LARGEST, _LARGEST)


def _relative(x: jax.Array, grid: blocks.Grid) -> tuple[jax.Array, jax.Array]:
    """Return x over the largest magnitude of its block, and that magnitude."""
    largest = grid.over(jnp.max, jnp.abs(x))
    return x / grid.spread(jnp.where(largest > 0, largest, 1)), largest


def _rounded(x: jax.Array, uniform: jax.Array | None, top: int) -> jax.Array:
    """Return codes; top + 0.9999999 is top + 1 in float32, which would be the code of -top."""
    return jnp.round(x) if uniform is None else jnp.minimum(jnp.floor(x + uniform), top)


@dataclasses.dataclass(frozen=True)
class Fp8(Codec):
    """e4m3, of magnitudes raised to a power that fits the range of the block to that of e4m3."""

    expand: bool = True

    def _encode(self, x, signed, uniform):
        grid = self._grid(x.shape)
        relative, largest = _relative(x, grid)
        if not self.expand:
            return _e4m3(_TOP * relative, uniform), largest
        power = _power(jnp.abs(x), largest, grid)
        # COAT keeps a centre c and a scale s as well; in 448 (|x|/max)^k both cancel.
        raised = jnp.sign(x) * jnp.exp(grid.spread(_exponent(power)) * jnp.log(jnp.abs(relative)))
        return _e4m3(_TOP * raised, uniform), largest, power

    def _decode(self, codes, signed, scales, grid):
        largest, *power = scales
        y = codes.astype(jnp.float32) / _TOP
        if power:
            y = jnp.sign(y) * jnp.exp(jnp.log(jnp.abs(y)) / grid.spread(_exponent(power[0])))
        return grid.spread(largest) * y


_LARGEST = 2.0**126
_TOP = 448.0  # largest number of e4m3
_RANGE = _TOP * _TOP / 2  # COAT's kernel: the smallest entry lands on 2.3 of e4m3's smallest steps


def _power(magnitudes: jax.Array, largest: jax.Array, grid: blocks.Grid) -> jax.Array:
    """Return 16 k as uint16: k = floor(16 log(range)/log(max/min))/16, min over what is not 0."""
    smallest = grid.over(jnp.min, jnp.where(magnitudes > 0, magnitudes, jnp.inf), jnp.inf)
    spread = jnp.log2(largest) - jnp.log2(smallest)
    sixteenths = jnp.floor(16 * np.log2(_RANGE).astype(np.float32) / spread)
    # Of one magnitude only, or none, spread is 0 or no number: any power does.
    return jnp.where(spread > 0, jnp.clip(sixteenths, 1, 2**16 - 1), 16).astype(jnp.uint16)


def _exponent(power: jax.Array) -> jax.Array:
    return power.astype(jnp.float32) / 16


def _e4m3(y: jax.Array, uniform: jax.Array | None) -> jax.Array:
    if uniform is not None:
        two_to = jax.lax.bitcast_convert_type(jnp.abs(y), jnp.uint32) & np.uint32(0x7F800000)
        binade = jax.lax.bitcast_convert_type(two_to, jnp.float32)
        step = jnp.maximum(binade, 2.0**-6) / 8
        y = jnp.sign(y) * jnp.minimum(jnp.floor(jnp.abs(y) / step + uniform) * step, _TOP)
    return y.astype(jnp.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class Linear(Codec):
    """Equal steps: of x from -max to max; without a sign, of the root of x.

    An update divides by the root of a second moment, so that is what should have equal errors.
    """

    bits: int = 8

    @property
    def even(self) -> bool:
        """Two codes of 4 bits do."""
        return self.bits == 4

    def _encode(self, x, signed, uniform):
        grid = self._grid(x.shape)
        relative, largest = _relative(x, grid)
        top = self._top(signed)
        if signed:
            codes = _rounded(top * relative, uniform, top)
        else:
            codes = _without_zero(_rounded(top * jnp.sqrt(relative), uniform, top), relative)
        if not self.even:
            return codes.astype(jnp.int8 if signed else jnp.uint8), largest
        return grid.pack(codes.astype(jnp.int8).astype(jnp.uint8) & 15), largest

    def _decode(self, codes, signed, scales, grid):
        (largest,) = scales
        if self.even:
            codes = grid.unpack(codes)
            # Two's complement of 4 bits: the upper half stands for the negative numbers.
            codes = codes.astype(jnp.int32) - 16 * (codes > 7) if signed else codes
        y = codes.astype(jnp.float32) / self._top(signed)
        return grid.spread(largest) * (y if signed else y * y)

    def _top(self, signed: bool) -> int:
        return 2 ** (self.bits - 1) - 1 if signed else 2**self.bits - 1


def _without_zero(codes: jax.Array, relative: jax.Array) -> jax.Array:
    """Return codes without a sign that are 0 for 0 only: m/eps would be a blow-up."""
    return jnp.where(relative > 0, jnp.maximum(codes, 1), 0)


@dataclasses.dataclass(frozen=True)
class Dynamic(Codec):
    """Steps that grow with the number: seven decades of max, the upper ones cut more finely."""

    def _encode(self, x, signed, uniform):
        relative, largest = _relative(x, self._grid(x.shape))
        code = _rounded(_place(jnp.abs(relative), signed), uniform, 127 if signed else 255)
        if signed:
            return (jnp.sign(x) * code).astype(jnp.int8), largest
        return _without_zero(code, relative).astype(jnp.uint8), largest

    def _decode(self, codes, signed, scales, grid):
        (largest,) = scales
        return grid.spread(largest) * _meaning(codes.astype(jnp.float32), signed)


def dynamic_map(*, signed: bool) -> np.ndarray:
    """Return the magnitudes that codes 0, 1, ... mean: 128 of them with a sign, 256 without.

    0; then for i = 0..6 the midpoints of 2^i equal parts (2^(i+1) without a sign) of [0.1, 1],
    times 10^(i - 6); and 1. With a sign, 1 takes the place of the last midpoint, 0.993.
    """
    values = [0.0]
    for i in range(7):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        values += list((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6))
    return np.asarray([*values[: 127 if signed else None], 1.0])


@functools.cache
def _lines(signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return slopes and heights at 0 of the lines through the map's codes over its numbers."""
    values = dynamic_map(signed=signed)
    slopes = 1 / np.diff(values)
    heights = np.arange(len(slopes)) - slopes * values[:-1]
    changes = np.flatnonzero(np.append(True, ~np.isclose(slopes[1:], slopes[:-1])))
    return slopes[changes].astype(np.float32), heights[changes].astype(np.float32)


def _place(x: jax.Array, signed: bool) -> jax.Array:
    """Return where numbers in [0, 1] lie among the codes: the map is linear in between.

    Steps grow with x, so the lowest line is the one: no search. Only the last step without a sign
    is half the one before.
    """
    slopes, heights = _lines(signed)
    *lower, last = (slope * x + height for slope, height in zip(slopes, heights, strict=True))
    lowest = functools.reduce(lambda a, b: jnp.where(b < a, b, a), lower)
    return jnp.where((last < lowest) == signed, last, lowest)


def _meaning(codes: jax.Array, signed: bool) -> jax.Array:
    """Return what codes stand for, by arithmetic that a table look-up would take longer for.

    With p = 2^i the largest power of two <= c and a sign, 10^(i - 7) (1 + 9 (c - p + 1/2)/p) is
    5^i (9 c - 8 p + 4.5)/10^7; without one, the same of c + 1 and half of it.
    """
    c = jnp.abs(codes) if signed else codes + 1
    bits = jax.lax.bitcast_convert_type(c, jnp.uint32) & np.uint32(0x7F800000)
    power = jax.lax.bitcast_convert_type(bits, jnp.float32)
    i = (bits >> 23) - np.uint32(127 if signed else 128)
    fives = jnp.where(i & 1, 5.0, 1.0) * jnp.where(i & 2, 25.0, 1.0) * jnp.where(i & 4, 625.0, 1.0)
    y = fives * (9 * c - 8 * power + 4.5) * (1e-7 if signed else 0.5e-7)
    y = jnp.where(c == (127 if signed else 256), 1.0, y)
    return jnp.sign(codes) * y if signed else jnp.where(codes > 0, y, 0)


def fp8(*, block: int = 128, expand: bool = True) -> Codec:
    """Store 8-bit floats (e4m3), with the range of every block expanded to theirs (COAT).

    With M the largest magnitude of a block and R the ratio of it to the smallest that is not 0:
    code = sign(x) 448 (|x|/M)^k,   k = floor(16 log(448^2/2)/log(R))/16.

    The smallest entry lands on a code above 0 however small it is, so a second moment is never
    lost. Median error of normal numbers 1.6 %, without expansion 2.2 %; it costs a logarithm and
    an exponential each way.

    Args:
        block: entries that share a scale: 4 bytes for M and 2 for k.
        expand: False for k = 1 everywhere, the plain cast, which loses small second moments.

    Returns:
        A codec for `quantize_state`: 8.375 bits per number at a block of 128.

    Example:
        >>> import jax.numpy as jnp
        >>> from optlab.linalg import codecs
        >>> coded = codecs.fp8().encode(jnp.array([1.0, 1e-3, 1e-9, 0.0]))
        >>> coded.codes.dtype.name, codecs.fp8().decode(coded, 4)[2] > 0
        ('float8_e4m3fn', Array(True, dtype=bool))

    Deviations:
        COAT stores max, min and k in other terms: a centre, a scale and k in 12 bytes; the numbers
        are the same. Its kernel gives NaN for a block of one magnitude, and a minimum that depends
        on the order of its threads for a block with zeros; here neither. Its blocks run over the
        flattened tensor.

    References:
        Xi et al., COAT, arXiv:2410.19313, 2024, section 4; NVlabs/COAT at 80ec99f.
    """
    return Fp8(block, expand)


def int8(*, map: Map = "dynamic", block: int = 128) -> Codec:
    """Store one of 256 multiples of the largest magnitude of the block.

    "dynamic" spans seven decades with steps of a few per cent; "linear" has equal steps (of the
    root, for second moments). Muon's momentum needs no more than "linear": its singular vectors do
    not see small entries.

    Args:
        map: "dynamic" or "linear".
        block: entries that share a scale of 4 bytes.

    Returns:
        A codec for `quantize_state`: 8.25 bits per number at a block of 128.

    Example:
        >>> import jax.numpy as jnp
        >>> from optlab.linalg import codecs
        >>> coded = codecs.int8(map="linear").encode(jnp.array([[-1.27, 0.01, 0.5, 0.004]]))
        >>> print(coded.codes)
        [[-127    1   50    0]]

    Deviations:
        bitsandbytes has blocks of 256 of the flattened tensor, and a zero among the codes of second
        moments, from which m/eps can blow up.

    References:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861, 2021.
        Linear codes of Muon's momentum: arXiv:2509.23106, 2025.
    """
    if map not in ("dynamic", "linear"):
        raise ValueError(f"int8: map must be 'dynamic' or 'linear', got {map!r}.")
    return Dynamic(block) if map == "dynamic" else Linear(block, 8)


def int4(*, block: int = 128) -> Codec:
    """Store one of 16 multiples of the largest magnitude of the block, two to a byte.

    x = M c/7, c = -7..7, with a sign; x = M (c/15)^2, c = 0..15, without.

    Args:
        block: entries that share a scale of 4 bytes.

    Returns:
        A codec for `quantize_state`: 4.25 bits per number at a block of 128.

    Example:
        >>> import jax.numpy as jnp
        >>> from optlab.linalg import codecs
        >>> codecs.int4().encode(jnp.ones((64, 128))).codes.shape
        (64, 64)

    Deviations:
        The second moments of the paper have one scale per row and one per column, and equal steps
        of themselves, not of their roots.

    References:
        Li et al., Memory Efficient Optimizers with 4-bit States, arXiv:2309.01507, 2023.
    """
    return Linear(block, 4)
