"""Functions of matrices applied to trees: `on_matrix` leaf by leaf, `bucketed` shape by shape."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from optlab.layout.view import MatrixView, Policy, map_with_view, path_str, view_of

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
        opened = _open(leaf, groups)
        return _close(_call(fn, opened.matrices, path), opened)

    return lambda tree: map_with_view(one, tree, policy=policy)


def bucketed(
    fn: MatrixFn, policy: Policy, *, merge_transposed: bool = False
) -> Callable[[Any], Any]:
    """Like `on_matrix`, with one call of `fn` for all leaves of the same matrix type.

    Leaves whose matrices agree in (m, n), dtype and sharding are stacked into one (B, m, n) array
    and taken apart again, so compile time grows with the number of shapes, not of leaves. `fn` must
    treat the matrices of a batch independently; then the result is that of `on_matrix`.

    A leaf whose batch axis is sharded in an Explicit mesh is a bucket of its own: joining it with
    others would move it.

    Args:
        fn: maps (B, m, n) to (B, m, n).
        policy: layout policy.
        merge_transposed: join m x n with n x m by transposition (then m <= n in every call). Only
            for `fn` with f(X^T) = f(X)^T.

    Raises:
        ValueError: at the call, if `fn` does not keep the shape; a leaf of the bucket is named.
    """

    def apply(tree: Any) -> Any:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
        out = [leaf for _, leaf in leaves]
        for bucket in _buckets(leaves, policy, merge_transposed):
            batches = [item.matrices for item in bucket]
            stacked = batches[0] if len(batches) == 1 else jnp.concatenate(batches)
            result, start = _call(fn, stacked, bucket[0].path), 0
            for item, batch in zip(bucket, batches, strict=True):
                part = result[start : start + len(batch)] if len(bucket) > 1 else result
                start += len(batch)
                part = jnp.swapaxes(part, 1, 2) if item.swapped else part
                out[item.index] = _close(part, item.opened)
        return jax.tree.unflatten(treedef, out)

    return apply


class _Opened(NamedTuple):
    """A leaf as matrices, and what is needed to close it again."""

    matrices: jax.Array
    order: tuple[int, ...]
    apart: jax.Array  # the leaf transposed, before its axes were merged
    leaf: Any


class _Item(NamedTuple):
    """One leaf of a bucket."""

    index: int
    path: str
    opened: _Opened
    swapped: bool

    @property
    def matrices(self) -> jax.Array:
        x = self.opened.matrices
        return jnp.swapaxes(x, 1, 2) if self.swapped else x


def _buckets(
    leaves: list[tuple[Any, Any]], policy: Policy, merge_transposed: bool
) -> list[list[_Item]]:
    buckets: dict[Any, list[_Item]] = {}
    for index, (key_path, leaf) in enumerate(leaves):
        path = path_str(key_path)
        view = view_of(path, leaf, policy)
        if view is None or not leaf.size:
            continue
        opened = _open(leaf, (view.batch(leaf.ndim), view.rows, view.cols))
        _, m, n = opened.matrices.shape
        item = _Item(index, path, opened, merge_transposed and m > n)
        kind = jax.typeof(item.matrices)
        if _is_explicit(kind) and kind.sharding.spec[0] is not None:
            buckets[index] = [item]
        else:
            buckets.setdefault(kind.update(shape=(1, *kind.shape[1:])), []).append(item)
    return list(buckets.values())


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


def _open(leaf: Any, groups: tuple[tuple[int, ...], ...]) -> _Opened:
    """Transpose `leaf` to the order of `groups` and merge each group into one axis."""
    order = tuple(axis for group in groups for axis in group)
    x = jnp.asarray(leaf)
    x = x if order == tuple(range(x.ndim)) else jnp.transpose(x, order)
    if all(len(group) == 1 for group in groups):
        return _Opened(x, order, x, leaf)
    kind, spec = jax.typeof(x), None
    if _is_explicit(kind):
        spec = _merged_sharding(kind, [len(group) for group in groups])
    shape = tuple(math.prod(leaf.shape[axis] for axis in group) for group in groups)
    return _Opened(jax.lax.reshape(x, shape, out_sharding=spec), order, x, leaf)


def _merged_sharding(kind: Any, lengths: list[int]) -> NamedSharding:
    """Sharding after a merge: of each group only the first axis that is longer than 1 keeps its."""
    specs, start = [], 0
    for length in lengths:
        axes = range(start, start + length)
        first = next((axis for axis in axes if kind.shape[axis] != 1), start)
        specs.append(kind.sharding.spec[first] if length else None)
        start += length
    return NamedSharding(kind.sharding.mesh, PartitionSpec(*specs))


def _close(matrices: jax.Array, opened: _Opened) -> jax.Array:
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
