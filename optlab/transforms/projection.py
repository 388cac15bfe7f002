"""Which matrices of a tree are projected, in what buckets, and the maps down to coordinates and up.

A side of a matrix is projected: "rows" (its inputs, the first axis of the matrix) or "cols". All
bases for matrices of one shape lie in one stack, outside the tree of the parameters.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed.shardings import Placement, by_path, fitted, placement_of
from optlab.layout.apply import open_leaf
from optlab.transforms.subspace import Projector

Rank = int | float | str | Callable[[str, Any], Any] | Any
"""A number, a fraction of the projected side, "full", a function (path, leaf), or a tree."""

SIDES = ("short", "long", "rows", "cols", "both")


class Side(NamedTuple):
    """One projected side of one leaf."""

    name: str  # "rows" or "cols"
    size: int  # a
    rank: int  # r
    bucket: int
    place: int  # in the bucket


class Low(NamedTuple):
    """A projected leaf."""

    index: int
    path: str
    shape: tuple[int, ...]
    view: _layout.MatrixView
    sides: tuple[Side, ...]
    placement: Placement | None

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Axes of the leaf: every batch axis, the input side, the output side."""
        return (*((a,) for a in self.view.batch(len(self.shape))), self.view.rows, self.view.cols)

    @property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of the coordinates: r in the last axis of a projected side, 1 in its others.

        The rank stays, so a layout reads coordinates as it reads the leaf.
        """
        shape = list(self.shape)
        for side in self.sides:
            for axis in self.axes(side.name):
                shape[axis] = 1
            shape[self.axes(side.name)[-1]] = side.rank
        return tuple(shape)

    def axes(self, side: str) -> tuple[int, ...]:
        """Axes of the leaf on that side."""
        return self.view.rows if side == "rows" else self.view.cols


class Bucket(NamedTuple):
    """Sides of one shape: their bases are one stack, and found by one compiled computation."""

    batch: tuple[int, ...]
    size: int
    rank: int
    dtype: Any
    members: tuple[tuple[int, int], ...]  # leaf among the projected ones, side of the leaf


@dataclasses.dataclass(frozen=True)
class Reading:
    """The projected leaves of a tree, and their buckets."""

    name: str
    lows: tuple[Low, ...]
    buckets: tuple[Bucket, ...]

    @property
    def sides(self) -> int:
        """Number of projected sides, the units in which bases are refreshed."""
        return sum(len(b.members) for b in self.buckets)


def _as_tree(rank: Rank, tree: Any, name: str) -> list[Any]:
    if isinstance(rank, int | float | str) or callable(rank):
        return [rank] * len(jax.tree.leaves(tree, is_leaf=_leafwise.is_hole))
    try:
        spread = jax.tree.broadcast(rank, tree, is_leaf=_leafwise.is_hole)
    except ValueError:
        raise ValueError(
            f"{name}: rank is no prefix of the parameter tree. Give a number, a fraction, "
            '"full", a function (path, leaf), or a tree of these with a leaf per parameter.'
        ) from None
    return jax.tree.leaves(spread, is_leaf=_leafwise.is_hole)


def check_rank(name: str, rank: Any, argument: str = "rank") -> None:
    """Refuse a rank that is no positive number, fraction or "full"."""
    if isinstance(rank, bool) or not (isinstance(rank, int | float) or rank == "full"):
        must = 'a number >= 1, a fraction in (0, 1), "full", a function (path, leaf) or a tree'
        raise _checks.refusal(TypeError, name, argument, must, rank)
    whole = isinstance(rank, int) and rank >= 1
    if not (rank == "full" or whole or (isinstance(rank, float) and 0 < rank < 1)):
        must = 'a number >= 1, a fraction in (0, 1) or "full"'
        raise _checks.refusal(ValueError, name, argument, must, rank)


def check(name: str, projector: Any, rank: Any, side: Any, seed: Any, layout: Any) -> None:
    """Refuse what cannot say which subspaces are meant."""
    if not isinstance(projector, Projector):
        must, fix = "a projector", " Write optlab.power_projector()."
        raise _checks.refusal(TypeError, name, "projector", must, projector, fix)
    if isinstance(rank, int | float | str):
        check_rank(name, rank)
    if not callable(side):
        _checks.check_choice(name, "side", side, SIDES)
    _checks.check_steps(name, seed=seed)
    if not callable(layout):
        fix = " Write optlab.layout.flax."
        raise _checks.refusal(TypeError, name, "layout", "a function", layout, fix)


def _rank(name: str, path: str, leaf: Any, rank: Any, size: int, short: int) -> int | None:
    """Return r for one side of `size`, or None where that is full: the leaf is left whole."""
    rank = rank(path, leaf) if callable(rank) else rank
    if rank is None:
        return None
    check_rank(name, rank, f"rank of leaf '{path}'")
    if rank == "full":
        return short
    found = rank if isinstance(rank, int) else max(1, round(rank * size))
    return found if found < short else None


def _sides(name: str, path: str, side: Any, m: int, n: int) -> Sequence[str]:
    if callable(side):
        found = side(m, n)
        _checks.check_choice(name, f"side of leaf '{path}'", found, ("rows", "cols"))
        return (found,)
    if side == "both":
        return ("rows", "cols")
    if side in ("rows", "cols"):
        return (side,)
    return ("rows",) if (m <= n) == (side == "short") else ("cols",)


def read(
    name: str,
    tree: Any,
    *,
    rank: Rank,
    side: Any,
    layout: _layout.Policy,
    shardings: Any = None,
) -> Reading:
    """Return how the matrices of a tree are projected; missing leaves are no matrices."""
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_leafwise.is_hole)
    known, ranks = by_path(name, shardings), _as_tree(rank, tree, name)
    buckets: dict[Any, list[tuple[int, int]]] = {}
    lows: list[Low] = []
    for index, ((key_path, leaf), r) in enumerate(zip(keyed, ranks, strict=True)):
        path = _layout.path_str(key_path)
        absent = _leafwise.is_hole(leaf) or not leaf.size
        view = None if absent else _layout.view_of(path, leaf, layout)
        if view is None or view.role != "matrix":
            continue
        dims = view.dims(leaf.shape)
        wanted = {
            s: _rank(name, path, leaf, r, dims[s == "cols"], min(dims))
            for s in _sides(name, path, side, *dims)
        }
        placement = placement_of(name, path, leaf, known)
        batch = tuple(leaf.shape[a] for a in view.batch(leaf.ndim))
        sides = []
        for s, found in wanted.items():
            if found is not None:
                size = dims[s == "cols"]
                spec = placement and placement.spec
                key = (batch, size, dims[s == "rows"], found, leaf.dtype, spec)
                members = buckets.setdefault(key, [])
                sides.append(Side(s, size, found, list(buckets).index(key), len(members)))
                members.append((len(lows), len(sides) - 1))
        if sides:
            lows.append(Low(index, path, leaf.shape, view, tuple(sides), placement))
    made = (
        Bucket(key[0], key[1], key[3], key[4], tuple(members)) for key, members in buckets.items()
    )
    return Reading(name, tuple(lows), tuple(made))


def partitioned(fn: Callable[..., Any], out: Any, *args: Any) -> Any:
    """Call `fn` with the compiler free to partition it over an Explicit mesh; results go to `out`.

    `out` holds a `PartitionSpec` for every result. On other meshes the compiler is free anyway.
    """
    explicit = {
        axis: mesh
        for mesh in (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args))
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    if not explicit:
        return fn(*args)
    mesh = next(iter(explicit.values()))
    free = jax.sharding.auto_axes(fn, axes=tuple(explicit), out_sharding=_on(mesh, out))
    return free(*args)


def _on(mesh: Any, out: Any) -> Any:
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), out, is_leaf=is_spec)


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


def mesh_of(params: Any) -> Any:
    """Return the mesh in the types of a tree; None of an empty one."""
    leaves = jax.tree.leaves(params)
    return jax.typeof(leaves[0]).sharding.mesh if leaves else None


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


def projected(reading: Reading, tree: Any) -> list[Any]:
    """Return the projected leaves of a tree, in the order of the reading; None for missing ones."""
    leaves = jax.tree.leaves(tree, is_leaf=_leafwise.is_hole)
    return [leaves[low.index] for low in reading.lows]


def with_projected(reading: Reading, tree: Any, values: Sequence[Any], like: Any = None) -> Any:
    """Return the tree with these values in place of the projected leaves, in the boxes of `like`.

    Without `like` the values have no box: what Flax's boxes say of a leaf, its mesh axes, does not
    hold of coordinates, and Flax would fail on them.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_leafwise.is_hole_or_box)
    if like is not None:
        leaves, treedef = jax.tree.leaves(tree, is_leaf=_leafwise.is_hole), _structure(like)
    for low, value in zip(reading.lows, values, strict=True):
        leaves[low.index] = value
    return jax.tree.unflatten(treedef, leaves)


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=_leafwise.is_hole)


def only_projected(reading: Reading, tree: Any, values: Sequence[Any]) -> Any:
    """Return the tree with these values, and all other leaves masked."""
    masked = jax.tree.map(lambda _: optax.MaskedNode(), tree)
    return with_projected(reading, masked, values)


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

        def coordinates(leaf, opened):
            x = opened_for(low, leaf).astype(_leafwise.widen(leaf.dtype))
            for side, basis in zip(low.sides, opened, strict=True):
                x = oriented(turnable(x, low, side), side)
                x = oriented(self.projector.down(basis, x, side.rank), side)
                x = turnable(x, low, side)
            return _placed(_close(low, x, low.low_shape).astype(leaf.dtype), low, low.low_shape)

        return partitioned(coordinates, _spec(low, low.low_shape), leaf, self._opened(low))

    def up(self, low: Low, y: jax.Array) -> jax.Array:
        """Return the leaf with the coordinates y, in their dtype."""

        def leaf_of(y, opened):
            x = opened_for(low, y).astype(_leafwise.widen(y.dtype))
            for side, basis in zip(low.sides, opened, strict=True):
                x = oriented(turnable(x, low, side), side)
                x = oriented(self.projector.up(basis, x, side.size), side)
                x = turnable(x, low, side)
            return _placed(_close(low, x, low.shape).astype(y.dtype), low, low.shape)

        return partitioned(leaf_of, _spec(low, low.shape), y, self._opened(low))

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


def checked(reading: Reading, tree: Any) -> list[Any]:
    """Return the projected leaves of a tree, of the shapes that were read."""
    leaves = projected(reading, tree)
    for low, leaf in zip(reading.lows, leaves, strict=True):
        check_shape(reading.name, low, leaf)
    return leaves


def check_shape(name: str, low: Low, leaf: Any) -> None:
    """Refuse a leaf of another shape than the one that was read."""
    if leaf is not None and leaf.shape != low.shape:
        raise ValueError(
            f"{name}: leaf '{low.path}' has shape {leaf.shape} in the updates and {low.shape} in "
            "the parameters. Pass gradients of the very parameters that init was given."
        )
