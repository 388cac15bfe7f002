"""Scaling by norms of gradients, one scalar for the whole tree."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab.linalg import norms


class ScaleByAdagradNormState(NamedTuple):
    """State of `scale_by_adagrad_norm`."""

    sum_of_squares: jax.Array  # float32 or wider, () or (leaves,): b_t^2

    def metrics(self) -> dict[str, jax.Array]:
        """Return b_t, the divisor; of several leaves the largest."""
        return {"adagrad_norm": jnp.sqrt(jnp.max(self.sum_of_squares, initial=0))}


def _shared(values: jax.Array) -> jax.Array:
    """Return a vector of equal entries, one per leaf, that the GPU compiler takes for any vector.

    XLA merges GPU kernels that read one array: 108 instead of 415 for 170 leaves on an H200.
    """
    keep = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(values, cuda=keep, default=lambda x: x)


@_checks.explain_calls
def scale_by_adagrad_norm(
    b0: ArrayLike = 0.1, *, per_leaf: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Divide by the root of the sum of all squared gradient norms so far (AdaGrad-Norm).

    b_t^2 = b_{t-1}^2 + |g_t|^2,   u = g_t/b_t, the current gradient included; one scalar for the
    whole tree, so the direction is the gradient's. 0 where b_t is 0.

    Args:
      b0: initial b, >= 0; the method converges for any b0 > 0.
      per_leaf: keep one b for every leaf. (static)

    Returns:
      A transformation with output norm at most 1.

    State:
      sum_of_squares: one float32 scalar, or one per leaf.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.scale_by_adagrad_norm(b0=4.0)
      >>> u, _ = tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))
      >>> print(u)
      [0.6]
    """
    name = "scale_by_adagrad_norm"
    _checks.check_nonnegative(name, b0=b0)

    def init(params):
        _leafwise.check_tree(name, params)
        shape = (_leafwise.leaf_count(params),) if per_leaf else ()
        b = jnp.full(shape, b0, _leafwise.scalar_dtype(params))
        return ScaleByAdagradNormState(b * b)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        # A factor 1 and the same divisor for every leaf, as vectors: see `_shared`.
        ones = _shared(jnp.ones([_leafwise.leaf_count(updates)]))
        squares = _leafwise.scalars(
            name,
            lambda _, u, p, one: norms.sum_of_squares(one * u),
            updates,
            (_leafwise.spread(updates, ones),),
        )
        new = squares if per_leaf else jnp.sum(squares)
        total = state.sum_of_squares + new.astype(state.sum_of_squares.dtype)
        inverse = norms.safe_divide(1.0, jnp.sqrt(total))
        inverse = _shared(jnp.broadcast_to(inverse, squares.shape))
        return _leafwise.scale_leaves(name, updates, inverse), ScaleByAdagradNormState(total)

    return optax.GradientTransformationExtraArgs(init, update)
