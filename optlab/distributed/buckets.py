"""Leaves as stacks of matrices: what one device holds of them, and which ones go together."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from optlab import layout as _layout
from optlab.distributed.shardings import Placement

Axes = tuple[str, ...]


class Block(NamedTuple):
    """One leaf as matrices (rows, cols), and the part of them that one device holds."""

    index: int  # among the leaves of the tree
    path: str
    groups: tuple[tuple[int, ...], ...]  # axes of the leaf: batch, input side, output side
    rows: int
    cols: int
    count: int  # matrices on one device
    row_axes: Axes
    col_axes: Axes
    batch_axes: Axes
    placement: Placement | None
    kind: Any  # the type of an element: dtype, and inside a shard_map where devices differ
    swapped: bool  # its bucket holds the transposes

    @property
    def wide(self) -> tuple[int, int, Axes, Axes]:
        """Rows, columns and their mesh axes as the bucket has them, short side first."""
        if self.swapped:
            return self.cols, self.rows, self.col_axes, self.row_axes
        return self.rows, self.cols, self.row_axes, self.col_axes

    @property
    def dtype(self) -> Any:
        """The dtype of the leaf."""
        return self.kind.dtype

    @property
    def key(self) -> tuple:
        """What leaves of one bucket share."""
        where = self.placement
        mesh = (where.mesh, where.axes, where.replicated) if where else None
        return (*self.wide, self.batch_axes, self.kind, mesh)


def block(
    index: int,
    path: str,
    leaf: Any,
    view: _layout.MatrixView,
    placement: Placement | None,
    *,
    swap_squares: bool,
) -> Block:
    """Return the description of one leaf."""
    groups = (view.batch(leaf.ndim), view.rows, view.cols)
    rows, cols = view.dims(leaf.shape)
    count = math.prod(leaf.shape[axis] for axis in groups[0])
    batch_axes, row_axes, col_axes = (_mesh_axes(placement, group) for group in groups)
    if placement:
        count //= placement.size(batch_axes)
    # q, k, v on ('fsdp', 'model') and o on ('model', 'fsdp') are one bucket.
    turned = swap_squares and rows == cols and row_axes > col_axes
    return Block(
        index, path, groups, rows, cols, count, row_axes, col_axes, batch_axes, placement,
        _element(leaf), rows > cols or turned,
    )  # fmt: skip


def _element(leaf: Any) -> Any:
    kind = jax.typeof(leaf)
    everywhere = NamedSharding(kind.sharding.mesh, PartitionSpec())
    return kind.update(shape=(), sharding=everywhere, weak_type=False)


def _mesh_axes(placement: Placement | None, group: tuple[int, ...]) -> Axes:
    if placement is None:
        return ()
    used = (axis for i in group for axis in placement.spec[i])
    return tuple(axis for axis in used if placement.mesh.shape[axis] > 1)


@dataclasses.dataclass(frozen=True)
class Group:
    """Blocks that are stacked and processed together."""

    blocks: tuple[Block, ...]

    @property
    def count(self) -> int:
        """Matrices on one device."""
        return sum(b.count for b in self.blocks)

    @property
    def tall(self) -> bool:
        """Whether the stack holds m x n with m > n: all its leaves do, nothing is transposed."""
        return all(b.swapped for b in self.blocks)

    @property
    def sides(self) -> tuple[int, int, Axes, Axes]:
        """Rows, columns and their mesh axes as the stack has them."""
        rows, cols, row_axes, col_axes = self.blocks[0].wide
        return (cols, rows, col_axes, row_axes) if self.tall else (rows, cols, row_axes, col_axes)

    @property
    def placement(self) -> Placement | None:
        """Mesh and axes, the same for all blocks; the spec is the first one's."""
        return self.blocks[0].placement

    @property
    def shards(self) -> int:
        """Devices that one matrix is spread over."""
        _, _, first, second = self.sides
        return self.placement.size(first + second) if self.placement else 1

    @property
    def replicas(self) -> int:
        """Devices that hold the same."""
        return self.placement.size(self.placement.replicated) if self.placement else 1


def groups(blocks: Iterable[Block], itemsize: Callable[[Any], int], cap: int) -> list[Group]:
    """Return the buckets, largest first, cut into groups of at most `cap` bytes on one device.

    `itemsize` gives the bytes per element of a stack of leaves of a dtype. A leaf is never cut: one
    that is larger than the cap is a group of its own, which its scheme processes in chunks.
    """
    buckets: dict[tuple, list[Block]] = {}
    for b in blocks:
        buckets.setdefault(b.key, []).append(b)
    found = []
    for bucket in buckets.values():
        whole = Group(tuple(bucket))
        spread = whole.shards if whole.shards > 1 else whole.replicas
        matrix = bucket[0].rows * bucket[0].cols * itemsize(bucket[0].dtype)
        found += _cut(bucket, max(1, cap // max(matrix, 1)) * spread, spread)
    return sorted(found, key=_size, reverse=True)


def _size(group: Group) -> int:
    return group.count * group.blocks[0].rows * group.blocks[0].cols


def _cut(bucket: list[Block], most: int, spread: int) -> list[Group]:
    """Cut a bucket into groups of about equal size, of `most` matrices at most."""
    bucket = sorted(bucket, key=lambda b: b.swapped)  # groups of one orientation need no transpose
    total = sum(b.count for b in bucket)
    pieces = math.ceil(total / most)
    target = math.ceil(math.ceil(total / pieces) / spread) * spread
    cut: list[list[Block]] = [[]]
    for b in bucket:
        filled = sum(x.count for x in cut[-1])
        mixes = pieces > 1 and cut[-1] and cut[-1][-1].swapped != b.swapped
        if cut[-1] and (filled + b.count > target or mixes):
            cut.append([])
        cut[-1].append(b)
    return [Group(tuple(blocks)) for blocks in cut]
