"""What `watch` can measure of a step: functions (updates, new, params) -> scalar.

`updates` go into the watched transformation, `new` come out of it. Every measure is finite where
its leaves are, also for entries of 1e30 or 1e-30, whose squares leave float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optlab import _leafwise
from optlab import layout as _layout
from optlab.distributed.shardings import partitioned
from optlab.layout.apply import open_leaf
from optlab.linalg import norms

_FAR = 2.0**80
_TINY = 2.0**-60  # below it, squares that were flushed to zero could have counted


def gradient_rms(updates: Any, new: Any, params: Any) -> jax.Array:
    """Return the root of the mean square of all entries that go in."""
    del new, params
    return _rms(updates)


def gradient_mean_abs(updates: Any, new: Any, params: Any) -> jax.Array:
    """Return the mean absolute value of all entries that go in: their l1 norm over their number.

    What `optlab.refine_schedule` reads of methods like Adam; `gradient_rms` of methods like SGD.
    """
    del new, params
    # Each entry is divided, not the sum, which may leave float32.
    share = 1 / max(_entries(updates), 1)
    sums = _leafwise.scalars("watch", lambda _, g, p: jnp.sum(jnp.abs(g) * share), updates)
    return jnp.sum(sums)


def update_rms(updates: Any, new: Any, params: Any) -> jax.Array:
    """Return the root of the mean square of all entries that come out."""
    del updates, params
    return _rms(new)


def relative_update(updates: Any, new: Any, params: Any) -> jax.Array:
    """Return |u|/|p| over all leaves: the size of the step in terms of the parameters; 0 at p = 0.

    Of what comes out, the learning rate included if it is inside.
    """
    del updates
    _leafwise.require_params("watch", params)
    return norms.safe_divide(_norm(_sizes(new)), _norm(_sizes(params)))


def trust_ratio_median(updates: Any, new: Any, params: Any) -> jax.Array:
    """Return the median over leaves of |p|/|u|; leaves where one of them is 0 do not count."""
    del updates
    ratios, count = _trust_ratios(new, params)
    low, high = (jnp.maximum(count - part, 0) // 2 for part in (1, 0))
    return jnp.where(count > 0, (ratios[low] + ratios[high]) / 2, 0)


def trust_ratio_min(updates: Any, new: Any, params: Any) -> jax.Array:
    """Return the smallest |p|/|u| of a leaf; leaves where one of them is 0 do not count."""
    del updates
    ratios, count = _trust_ratios(new, params)
    return jnp.where(count > 0, ratios[0], 0)


def trust_ratio_max(updates: Any, new: Any, params: Any) -> jax.Array:
    """Return the largest |p|/|u| of a leaf; leaves where one of them is 0 do not count."""
    del updates
    ratios, count = _trust_ratios(new, params)
    return jnp.where(count > 0, ratios[jnp.maximum(count - 1, 0)], 0)


def clip_rate(updates: Any, new: Any, params: Any) -> jax.Array:
    """Return the share of entries that came out smaller than they went in.

    For a clip; what scales all entries down has rate 1.
    """
    del params
    smaller = _leafwise.scalars(
        "watch", lambda _, g, p, u: jnp.sum(jnp.abs(u) < jnp.abs(g), dtype=g.dtype), updates, (new,)
    )
    return norms.safe_divide(jnp.sum(smaller), _entries(updates))


def nonfinite_entries(updates: Any, new: Any, params: Any) -> jax.Array:
    """Return how many entries that go in are infinite or no number; exact up to 2^24."""
    del new, params
    count = lambda _, g, p: jnp.sum(~jnp.isfinite(g), dtype=g.dtype)  # noqa: E731
    return jnp.sum(_leafwise.scalars("watch", count, updates))


def orthogonality_error(
    updates: Any, new: Any, params: Any, *, layout: _layout.Policy = _layout.flax
) -> jax.Array:
    """Return how far the worst matrix that comes out is from a multiple of an orthogonal one.

    |U^T U/c^2 - I|/(2 sqrt(r)) over the r singular values s, c^2 = mean(s^2): for a small one this
    is |U/c - polar(U)|/|polar(U)|. One Gram matrix of the short side instead of a decomposition.
    0 for a zero matrix, and where there are none. Leave the layout to `functools.partial`. A matrix
    that is cut along its short side is gathered.
    """
    del updates, params
    errors = []
    keyed, _ = jax.tree_util.tree_flatten_with_path(new, is_leaf=_leafwise.is_hole)
    for key_path, u in keyed:
        view = None
        if not _leafwise.is_hole(u) and u.size:
            view = _layout.view_of(_layout.path_str(key_path), u, layout)
        if view is not None and view.role == "matrix":
            groups = (*((axis,) for axis in view.batch(u.ndim)), view.rows, view.cols)
            errors.append(partitioned(partial(_worst, groups), PartitionSpec(), u))
    return jnp.max(jnp.stack(errors)) if errors else jnp.zeros([], jnp.float32)


def _worst(groups: tuple[tuple[int, ...], ...], u: jax.Array) -> jax.Array:
    x = open_leaf(u.astype(_leafwise.widen(u.dtype)), groups).matrices
    x = x if x.shape[-2] <= x.shape[-1] else x.mT
    largest = jnp.max(jnp.abs(x), (-2, -1), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)
    gram = jnp.matmul(x, x.mT, precision="highest")
    scale = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / gram.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    off = gram / jnp.where(scale > 0, scale, 1) - eye
    error = jnp.sqrt(jnp.mean(jnp.sum(off * off, -1), -1)) / 2
    return jnp.max(jnp.where(scale[..., 0, 0] > 0, error, 0))


def _size(x: jax.Array) -> jax.Array:
    """Return |x|, of three sums at scales of which one is in range.

    In one pass, which XLA fuses with others over x: on a v5e the compiler counts 28 bytes per
    parameter for AdamW with its gradient's norm, as without, and 48 where the largest entry is
    found before.
    """
    x = jnp.asarray(x)
    # XLA makes (x c)(x c) of two constants into (x x)(c c), which leaves float32 after all.
    scales = (jnp.asarray(c, x.dtype) for c in (1 / _FAR, _FAR))
    near, far = jax.lax.optimization_barrier(tuple(scales))
    plain, low, high = (norms.sum_of_squares(y) for y in (x, x * near, x * far))
    small = jnp.sqrt(high) / _FAR
    large = jnp.where(jnp.isfinite(plain), jnp.sqrt(plain), jnp.sqrt(low) * _FAR)
    return jnp.where(plain < _TINY, small, large)


def _sizes(tree: Any) -> jax.Array:
    """Return the norm of every leaf, 0 for a missing one."""
    return _leafwise.scalars("watch", lambda _, x, p: _size(x), tree)


def _norm(sizes: jax.Array) -> jax.Array:
    return _size(sizes) if sizes.size else jnp.zeros([], sizes.dtype)


def _entries(tree: Any) -> float:
    return float(sum(x.size for x in jax.tree.leaves(tree)))


def _rms(tree: Any) -> jax.Array:
    return norms.safe_divide(_norm(_sizes(tree)), _entries(tree) ** 0.5)


def _trust_ratios(new: Any, params: Any) -> tuple[jax.Array, jax.Array]:
    """Return |p|/|u| of all leaves, sorted, those without one last; and how many have one."""
    _leafwise.require_params("watch", params)

    def ratio(path, u, none, p):
        del path, none
        of_p, of_u = _size(p), _size(u)
        there = (of_p > 0) & (of_u > 0)
        return jnp.where(there, of_p / jnp.where(there, of_u, 1), jnp.inf)

    ratios = _leafwise.scalars("watch", ratio, new, (params,))
    # A missing gradient came out as 0.
    ratios = jnp.sort(jnp.where(ratios > 0, ratios, jnp.inf))
    ratios = ratios if ratios.size else jnp.full((1,), jnp.inf, ratios.dtype)
    return ratios, jnp.sum(jnp.isfinite(ratios), dtype=jnp.int32)
