"""Which matrices of a tree are projected, on what sides, to what rank and in what buckets.

A side of a matrix is projected: "rows" (its inputs, the first axis of the matrix) or "cols".
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed.shardings import Placement, by_path, placement_of
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
