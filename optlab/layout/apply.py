"""Leaves opened as matrices and closed again; `on_matrix` applies a function leaf by leaf."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from optlab.layout.view import MatrixView, Policy, map_with_view

MatrixFn = Callable[[jax.Array], jax.Array]


def on_matrix(fn: MatrixFn, policy: Policy) -> Callable[[Any], Any]:
    """Return a function of a tree that applies `fn` to every leaf with a view, as matrices.

    `fn` maps (..., m, n) to (..., m, n): the batch axes in their order, the merged input axes, the
    merged output axes. Leaves without a view, and empty ones, come back as the same object.

    A view of one row axis and one column axis costs a transposition, no reshape. In an Explicit
    mesh any sharding works: the result has the type of the leaf; merging gathers a leaf over an
    axis that is sharded but not the first (not empty) of its side.

    Raises:
        ValueError: at the call, if `fn` does not keep the shape; the leaf is named.
    """

    def one(view: MatrixView | None, path: str, leaf: Any) -> Any:
        if view is None or not leaf.size:
            return leaf
        groups = (*((axis,) for axis in view.batch(leaf.ndim)), view.rows, view.cols)
        opened = open_leaf(leaf, groups)
        return close_leaf(_call(fn, opened.matrices, path), opened)

    return lambda tree: map_with_view(one, tree, policy=policy)


class Opened(NamedTuple):
    """A leaf as matrices, and what is needed to close it again."""

    matrices: jax.Array
    order: tuple[int, ...]
    apart: jax.Array  # the leaf transposed, before its axes were merged
    leaf: Any


def _call(fn: MatrixFn, matrices: jax.Array, path: str) -> jax.Array:
    out = fn(matrices)
    if jnp.shape(out) != matrices.shape:
        raise ValueError(
            f"layout: fn must keep the shape of its matrices, {matrices.shape} at leaf '{path}', "
            f"got {jnp.shape(out)}. Return (..., m, n) for (..., m, n)."
        )
    return out


def _is_explicit(kind: Any) -> bool:
    return AxisType.Explicit in kind.sharding.mesh.axis_types


def open_leaf(leaf: Any, groups: tuple[tuple[int, ...], ...]) -> Opened:
    """Transpose `leaf` to the order of `groups` and merge each group into one axis."""
    order = tuple(axis for group in groups for axis in group)
    x = jnp.asarray(leaf)
    x = x if order == tuple(range(x.ndim)) else jnp.transpose(x, order)
    if all(len(group) == 1 for group in groups):
        return Opened(x, order, x, leaf)
    kind, spec = jax.typeof(x), None
    if _is_explicit(kind):
        spec = _merged_sharding(kind, [len(group) for group in groups])
    shape = tuple(math.prod(leaf.shape[axis] for axis in group) for group in groups)
    return Opened(jax.lax.reshape(x, shape, out_sharding=spec), order, x, leaf)


def _merged_sharding(kind: Any, lengths: list[int]) -> NamedSharding:
    """Sharding after a merge: of each group only the first axis that is longer than 1 keeps its."""
    specs, start = [], 0
    for length in lengths:
        axes = range(start, start + length)
        first = next((axis for axis in axes if kind.shape[axis] != 1), start)
        specs.append(kind.sharding.spec[first] if length else None)
        start += length
    return NamedSharding(kind.sharding.mesh, PartitionSpec(*specs))


def close_leaf(matrices: jax.Array, opened: Opened) -> jax.Array:
    """Take merged axes apart, put them back in their places and restore the leaf's sharding."""
    x, apart = matrices, jax.typeof(opened.apart)
    if x.shape != apart.shape:
        sharding = apart.sharding if _is_explicit(apart) else None
        x = jax.lax.reshape(x, apart.shape, out_sharding=sharding)
    inverse = sorted(range(len(opened.order)), key=opened.order.__getitem__)
    x = x if inverse == list(range(x.ndim)) else jnp.transpose(x, inverse)
    wanted = jax.typeof(opened.leaf).sharding
    restore = _is_explicit(apart) and jax.typeof(x).sharding != wanted
    return reshard(x, wanted) if restore else x
