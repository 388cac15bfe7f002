"""Limits on updates that follow what came before."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed import plan as _plan
from optlab.distributed import sums
from optlab.distributed.shardings import everywhere


class NormGrowthLimiterState(NamedTuple):
    """State of `norm_growth_limiter`."""

    norms: jax.Array  # float32 or wider, (leaves or matrices,): last emitted norm, -1 before it

    def metrics(self) -> dict[str, jax.Array]:
        """Return the norm of what was emitted last, of all leaves; of none yet, 0."""
        return {"limited_norm": jnp.sqrt(jnp.sum(jnp.maximum(self.norms, 0) ** 2))}


@_checks.explain_calls
def norm_growth_limiter(
    growth: ArrayLike = 1.01,
    *,
    eps: ArrayLike = 1e-8,
    layout: _layout.Policy | None = None,
    shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Let the norm of every leaf's update grow by at most a factor per step.

    n <- |u|/max(1, |u|/(growth (n_{t-1} + eps))),   u <- u n/|u|;   the first update passes.

    It may shrink at once. Zero updates and those that are not finite are not remembered: the
    released codes do remember a zero, and then let nothing through for some 1,800 steps.

    Args:
      growth: largest ratio of two norms in a row, > 0.
      eps: added to the last norm, >= 0.
      layout: None for one norm per leaf; a policy for one per matrix of a stacked leaf. (static)
      shardings: `optlab.shardings_of(params)`, for one all-reduce on Auto meshes too. (static)

    Returns:
      A transformation with an output of at most its input's norm.

    State:
      norms: one float32 per leaf, or per matrix.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.norm_growth_limiter(1.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> for size in (1.0, 0.0, 9.0):
      ...     u, state = tx.update(jnp.array([size]), state)
      >>> print(u)
      [1.5]

    References:
      Chen et al., Fira, arXiv:2410.01623, 2024, eq. 9; code: xichen-fy/Fira at 5c28b13.
    """
    name = "norm_growth_limiter"
    _checks.check_positive(name, growth=growth)
    _checks.check_nonnegative(name, eps=eps)
    _checks.check_callable(name, layout=layout)

    def axes(path, leaf):
        view = _layout.view_of(path, leaf, layout) if layout else None
        return (*view.rows, *view.cols) if view else tuple(range(leaf.ndim))

    def sizes(tree):
        leaves = _plan.named_leaves(tree)
        return [0 if x is None else sums.size_of_sums(x.shape, axes(p, x)) for p, x in leaves]

    def init(params):
        _leafwise.check_tree(name, params)
        norms = jnp.full((sum(sizes(params)),), -1, _leafwise.scalar_dtype(params))
        leaves = jax.tree.leaves(params)
        mesh = jax.typeof(leaves[0]).sharding.mesh if leaves else None
        return NormGrowthLimiterState(everywhere(norms, mesh))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _leafwise.check_tree(name, updates)
        counts = sizes(updates if params is None else params)
        if sum(counts) != state.norms.size:
            raise ValueError(
                f"{name}: the updates have {sum(counts)} norms, init saw {state.norms.size}. "
                "Pass gradients of the very parameters that init was given."
            )
        out, treedef = jax.tree.flatten(updates, is_leaf=_leafwise.is_none)
        here = [i for i, x in enumerate(out) if x is not None and x.size]
        norms = jnp.split(state.norms, [sum(counts[:i]) for i in range(1, len(counts))])
        if here:
            leaves = [_plan.named_leaves(updates)[i] for i in here]
            mine = {i: norms[i] for i in here}
            numbers = {"growth": growth, "eps": eps}
            scaled, new = sums.scale_by_sums(
                name,
                leaves,
                [axes(*leaf) for leaf in leaves],
                _factors,
                (mine, jax.tree.map(jnp.asarray, numbers)),
                shardings,
            )
            for i, u in zip(here, scaled, strict=True):
                out[i], norms[i] = u, new[0][i]
        return jax.tree.unflatten(treedef, out), NormGrowthLimiterState(jnp.concatenate(norms))

    return optax.GradientTransformationExtraArgs(init, update)


def _factors(squares: list[jax.Array], state: Any) -> tuple[list[jax.Array], Any]:
    """Return the factor of every leaf's norms, and the norms that come out."""
    last, numbers = state
    factors, norms = [], {}
    for (i, old), square in zip(last.items(), squares, strict=True):
        norm = jnp.sqrt(square.astype(old.dtype)).ravel()
        most = jnp.where(old < 0, norm, numbers["growth"] * (old + numbers["eps"]))
        factor = jnp.where(norm > most, most / norm, 1)
        good = jnp.isfinite(norm) & (norm > 0)
        norms[i] = jnp.where(good, norm * factor, old)
        # A sum that overflowed says nothing of the size.
        factors.append(jnp.where(jnp.isfinite(norm), factor, 0).reshape(square.shape))
    return factors, (norms, numbers)
