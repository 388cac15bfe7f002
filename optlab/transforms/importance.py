"""Gradients summed up beside a chain, for scores of single weights."""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax

from optlab import _checks, _leafwise


class AccumulateImportanceState(NamedTuple):
    """State of `accumulate_importance`."""

    sums: Any  # float32 or wider, the parameters' shapes: sum of |g|, or of g^2


@_checks.explain_calls
def accumulate_importance(p: Literal[1, 2] = 1) -> optax.GradientTransformationExtraArgs:
    """Sum up |g| or g^2 of every weight, and pass updates through.

    s <- s + |g|^p,  u = g. Give it one update per sample of a calibration set, the gradients of the
    whole sample's loss, and read `state.sums` for `gblm_scores`.

    Args:
      p: 1 for sums of |g|, 2 for sums of g^2. In float32 a sum of squares of gradients above 1e19
        overflows; scale the loss down. (static)

    Returns:
      A transformation that leaves updates as they are.

    State:
      sums: float32, 4 bytes per parameter.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.accumulate_importance()
      >>> state = tx.init(jnp.zeros(2))
      >>> for g in (jnp.array([1.0, -2.0]), jnp.array([-1.0, 3.0])):
      ...     _, state = tx.update(g, state)
      >>> print(state.sums)
      [2. 5.]

    References:
      Das et al., arXiv:2311.04902, 2023; VILA-Lab/GBLM-Pruner@9e8aea22, which sums |g| in float16.
    """
    _checks.check_range("accumulate_importance", "1 or 2", lambda x: x in (1, 2), p=p)

    def make_leaf():
        return lambda _, u, total, params: (u, total + (jnp.abs(u) if p == 1 else u * u))

    return _leafwise.stateful(
        "accumulate_importance", AccumulateImportanceState, (_leafwise.widen,), make_leaf
    )
