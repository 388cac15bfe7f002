"""Several gradients of the same parameters: stacked, measured against each other, summed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optlab import _leafwise
from optlab.distributed.shardings import everywhere
from optlab.transforms.aggregate import whole


class Geometry(NamedTuple):
    """Lengths and angles of gradients; what is not finite counts as zero."""

    cosines: jax.Array  # (n, n)
    norms: jax.Array  # (n,), in units of the largest entry of all
    finite: jax.Array  # (n,), bool


def stacked(name: str, trees: tuple[Any, ...]) -> Any:
    """Return one tree with the tasks along the first axis of every leaf."""
    if len(trees) == 1:
        return trees[0]
    if not trees:
        raise TypeError(
            f"{name}: gradients are needed, got none. Pass one tree with the tasks along the first "
            "axis of every leaf, or a tree per task."
        )
    (tree,) = _leafwise.leafwise(
        name, lambda _, u, p, *others: (jnp.stack([u, *others]),), trees[0], others=trees[1:]
    )
    return tree


def named_leaves(name: str, tree: Any) -> list[tuple[str, jax.Array]]:
    """Return the leaves, float32 or wider, and refuse what has no axis of tasks."""
    _leafwise.check_tree(name, tree)
    pairs, _, _ = _leafwise.aligned(name, tree)
    leaves = [(path, u) for path, u in pairs if u is not None]
    counts = [u.shape[:1] for _, u in leaves]
    for path, u in leaves:
        if not u.ndim or not len(u) or u.shape[:1] != counts[0]:
            raise ValueError(
                f"{name}: leaf '{path}' needs the tasks along its first axis, got shape {u.shape} "
                f"beside {len(counts)} leaves that start with {counts[0]}. Stack the gradients: "
                "jax.tree.map(lambda *g: jnp.stack(g), *gradients)."
            )
    return [(path, whole(u.astype(_leafwise.widen(u.dtype)))) for path, u in leaves]


def _column(values: jax.Array, like: jax.Array) -> jax.Array:
    return values.reshape(-1, *(1,) * (like.ndim - 1)).astype(like.dtype)


@jax.jit
def _gram(u: jax.Array) -> jax.Array:
    """Return the inner products of rows; not by `dot`, which TPUs take 4 s to compile in full."""
    return jnp.sum(u[:, None] * u[None], axis=tuple(range(2, u.ndim + 1)))


def geometry(leaves: list[jax.Array]) -> Geometry:
    """Measure rows of leaves; each is first divided by its largest entry, so none overflows."""
    dtype = _leafwise.scalar_dtype(leaves)
    largest = [jnp.max(jnp.abs(u), axis=tuple(range(1, u.ndim)), initial=0) for u in leaves]
    size = jnp.max(jnp.stack([everywhere(x).astype(dtype) for x in largest]), axis=0)
    finite = jnp.isfinite(size)
    size = jnp.where(finite, size, 0)
    unit = jnp.where(size > 0, size, 1)
    rows = [jnp.where(_column(finite, u) > 0, u / _column(unit, u), 0) for u in leaves]
    gram = sum(everywhere(_gram(u)).astype(dtype) for u in rows)
    lengths = jnp.sqrt(jnp.diagonal(gram))
    scale = jnp.where(lengths > 0, lengths, 1)
    most = jnp.max(size)
    return Geometry(
        gram / scale[:, None] / scale[None, :],
        lengths * (size / jnp.where(most > 0, most, 1)),
        finite,
    )


def weighted(name: str, tree: Any, weights: jax.Array) -> Any:
    """Return the weighted sum over the tasks; what has no weight may be anything."""

    def leaf(_, u, p):
        w = _column(weights, u)
        return (jnp.sum(jnp.where(w != 0, w * whole(u), 0), axis=0),)

    return _leafwise.leafwise(name, leaf, tree)[0]
