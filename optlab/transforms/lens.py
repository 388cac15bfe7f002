"""The maps between leaves and their coordinates in the subspaces kept, down and up.

All bases for matrices of one shape lie in one stack, outside the tree of the parameters.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optlab import _leafwise
from optlab.distributed.shardings import fitted, partitioned
from optlab.layout.apply import open_leaf
from optlab.transforms.projection import (
    Bucket,
    Low,
    Reading,
    Side,
    checked,
    projected,
    with_projected,
)
from optlab.transforms.subspace import Projector


def oriented(x: jax.Array, side: Side) -> jax.Array:
    """Return matrices with the projected side first, or put them back."""
    return x if side.name == "rows" else x.mT


def turnable(x: jax.Array, low: Low, side: Side) -> jax.Array:
    """Ask that matrices (..., m, n) are not cut along a side of full rank.

    The cut moves to the other side, an all-to-all, and each device turns what it has. Left to
    itself a compiler gathers the matrix, or sums one of its size.
    """
    where = low.placement
    if where is None or side.rank < side.size:
        return x
    rows, cols = (tuple(n for a in axes for n in where.spec[a]) for axes in low.groups[-2:])
    kept = x.shape[-1 if side.name == "rows" else -2]
    if kept % where.size((*cols, *rows)):
        return x
    ends = ((), (*cols, *rows)) if side.name == "rows" else ((*rows, *cols), ())
    cuts = (*(where.spec[a] for a in low.view.batch(len(low.shape))), *ends)
    spec = PartitionSpec(*(names or None for names in cuts))
    explicit = AxisType.Explicit in where.mesh.axis_types
    return jax.lax.with_sharding_constraint(
        x, spec if explicit else NamedSharding(where.mesh, spec)
    )


class Kept(NamedTuple):
    """What is kept of the subspaces of one bucket, side by side."""

    basis: Any  # of the projector
    found: jax.Array  # int32, (sides, *batch): how often the subspace was found
    overlap: jax.Array  # float32, (sides, *batch): share of the subspace before in the last one


def kept_before(reading: Reading, projector: Projector, params: Any) -> Any:
    """Return what is kept before the first gradient: a tuple of `Kept`.

    For a tree without leaves it is a number: `optax.tree.map_params` takes its state for a prefix
    of any other's.
    """
    if not jax.tree.leaves(params):
        return jnp.zeros([], jnp.int32)

    def one(b: Bucket) -> Kept:
        shape = (len(b.members), *b.batch)
        basis = projector.init(shape, b.size, b.rank, b.dtype)
        return Kept(basis, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))

    return tuple(map(one, reading.buckets))


def check_kept(name: str, reading: Reading, kept: Sequence[Kept]) -> None:
    """Refuse a state of another tree."""
    if not isinstance(kept, tuple):
        kept = ()
    ours = [(len(b.members), *b.batch) for b in reading.buckets]
    if ours != [k.found.shape for k in kept]:
        raise ValueError(
            f"{name}: the updates hold {reading.sides} projected sides in {len(ours)} shapes, init "
            f"saw {sum(len(k.found) for k in kept)} in {len(kept)}. Pass gradients of the very "
            "parameters that init was given, and params where some are missing."
        )


def _placed(x: jax.Array, low: Low, shape: tuple[int, ...]) -> jax.Array:
    """Say where the result lies: on an Auto mesh with known shardings no type does."""
    where = low.placement
    if where is None or AxisType.Explicit in where.mesh.axis_types:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(where.mesh, _spec(low, shape)))


def placed_everywhere(tree: Any, low: Low) -> Any:
    """Say that a tree lies on all devices of a leaf, which no type does on an Auto mesh."""
    where = low.placement
    if where is None or AxisType.Explicit in where.mesh.axis_types:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(where.mesh, PartitionSpec()))


def _spec(low: Low, shape: tuple[int, ...]) -> PartitionSpec:
    if low.placement is None:
        return PartitionSpec()
    return fitted(low.placement.partition, low.shape, shape, low.placement.mesh)


def opened_for(low: Low, x: jax.Array) -> jax.Array:
    """Return a leaf, or coordinates, as matrices; it lies where leaves do, whatever comes after."""
    return open_leaf(_placed(x, low, x.shape), low.groups).matrices


def _close(low: Low, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return matrices as a leaf of `shape`: axes taken apart and put back in their places."""
    order = [axis for group in low.groups for axis in group]
    x = x.reshape([shape[axis] for axis in order])
    return jnp.transpose(x, sorted(range(len(order)), key=order.__getitem__))


def zero_coordinates(reading: Reading, params: Any) -> Any:
    """Return the tree with zeros for the coordinates of projected leaves, placed as those."""
    pairs = zip(reading.lows, projected(reading, params), strict=True)
    return with_projected(reading, params, [_zeros(low, leaf) for low, leaf in pairs])


def _zeros(low: Low, leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.core.Tracer):
        # Spread as the leaf along the axes that it keeps.
        edge = tuple(
            slice(n if n == low_n else 1) for n, low_n in zip(low.shape, low.low_shape, strict=True)
        )

        def zeros(p):
            wide = jnp.broadcast_to(p[edge], low.low_shape)
            return _placed(_leafwise.zeros_like(wide), low, low.low_shape)

        return partitioned(zeros, _spec(low, low.low_shape), leaf)
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding):
        spec = fitted(sharding.spec, low.shape, low.low_shape, sharding.mesh)
        sharding = NamedSharding(sharding.mesh, spec)
    # An array put on a device stays there, and so does what is computed from it: a second program.
    told = sharding if getattr(leaf, "committed", True) else None
    return jnp.zeros(low.low_shape, leaf.dtype, device=told)


def along(low: Low, side: Side, fn: Callable[[jax.Array], jax.Array], y: jax.Array) -> jax.Array:
    """Apply a function of (..., r, b) to coordinates; it keeps their shape."""
    x = oriented(open_leaf(y, low.groups).matrices, side)
    return _close(low, oriented(fn(x), side), y.shape).astype(y.dtype)


def on_coordinates(low: Low, fn: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """Call `fn`, whose result is of the shape of coordinates, and place it as they are."""
    return partitioned(fn, _spec(low, low.low_shape), *args)


@dataclasses.dataclass(frozen=True)
class Lens:
    """The maps between leaves and their coordinates in the subspaces kept."""

    reading: Reading
    projector: Projector
    kept: tuple[Kept, ...]

    def down(self, low: Low, leaf: jax.Array) -> jax.Array:
        """Return the coordinates of a leaf, in its dtype, in the shape `low.low_shape`."""
        lengths = [side.rank for side in low.sides]
        return self._mapped(low, leaf, self.projector.down, lengths, low.low_shape)

    def up(self, low: Low, y: jax.Array) -> jax.Array:
        """Return the leaf with the coordinates y, in their dtype."""
        lengths = [side.size for side in low.sides]
        return self._mapped(low, y, self.projector.up, lengths, low.shape)

    def _mapped(
        self,
        low: Low,
        leaf: jax.Array,
        through: Callable[[Any, jax.Array, int], jax.Array],
        lengths: Sequence[int],
        shape: tuple[int, ...],
    ) -> jax.Array:
        """Take every projected side of a leaf through its basis, to that length."""

        def mapped(leaf, opened):
            x = opened_for(low, leaf).astype(_leafwise.widen(leaf.dtype))
            for side, basis, length in zip(low.sides, opened, lengths, strict=True):
                x = oriented(turnable(x, low, side), side)
                x = turnable(oriented(through(basis, x, length), side), low, side)
            return _placed(_close(low, x, shape).astype(leaf.dtype), low, shape)

        return partitioned(mapped, _spec(low, shape), leaf, self._opened(low))

    def raised(self, tree: Any) -> list[Any]:
        """Return the projected leaves of a tree of coordinates, whole; None for missing ones."""
        pairs = zip(self.reading.lows, projected(self.reading, tree), strict=True)
        return [y if y is None else self.up(low, y) for low, y in pairs]

    def lower(self, tree: Any) -> Any:
        """Return the tree with coordinates in place of its projected leaves."""
        leaves = checked(self.reading, tree)
        values = [
            leaf if leaf is None else self.down(low, leaf)
            for low, leaf in zip(self.reading.lows, leaves, strict=True)
        ]
        return with_projected(self.reading, tree, values)

    def residual(self, low: Low, rule: Callable[..., jax.Array], g: Any, r: Any, n: Any) -> Any:
        """Return the residual of one leaf, in its dtype, by a rule of `Residual`."""
        axes = tuple(a for side in low.sides for a in low.axes(side.name))
        matrix = (*low.view.rows, *low.view.cols)

        def of(*leaves):
            wide = (x.astype(_leafwise.widen(x.dtype)) for x in leaves)
            return rule(*wide, axes, matrix).astype(g.dtype)

        return partitioned(of, _spec(low, low.shape), g, self.up(low, r), r, n)

    def _opened(self, low: Low) -> list[Any]:
        def one(side: Side) -> Any:
            stored = jax.tree.map(lambda x: x[side.place], self.kept[side.bucket].basis)
            return placed_everywhere(self.projector.opened(stored, side.size, side.rank), low)

        return [one(side) for side in low.sides]
