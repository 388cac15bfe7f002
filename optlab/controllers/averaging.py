"""An average of the parameters whose weight follows the gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab.linalg import norms
from optlab.transforms.averages import AverageParamsState


class AdaptiveEmaState(NamedTuple):
    """State of `adaptive_ema`."""

    weights: jax.Array  # float32, (leaves,): of each leaf's new value in the last step
    previous: optax.Updates  # the last gradient, in the parameter's shape
    average: AverageParamsState  # what `eval_params` finds
    inner: optax.OptState

    def metrics(self) -> dict[str, jax.Array]:
        """Return the smallest and the largest weight of the last step."""
        least = jnp.min(self.weights, initial=1)
        return {"ema_weight_min": least, "ema_weight_max": jnp.max(self.weights, initial=0)}


@_checks.explain_calls
def adaptive_ema(
    inner: optax.GradientTransformation,
    fallback: ArrayLike = 0.01,
    *,
    average_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Average the parameters that `inner` leads to, each leaf with a weight of its own.

    e <- e + a (p - e) after every step, p the new parameters, per leaf, with l1 norms:
      a = 2 (1 + |g|)/(|p - e| |g - g_before|),  or `fallback` unless 0 < a < 1.
    The first average is p. From a Taylor expansion of the loss between e and p: a large change of
    the gradient on the way says to stay. Evaluate with `optlab.eval_params(state, params)`;
    `optlab.average_params` has the weights that everybody uses.

    Args:
      inner: the whole optimizer; its updates pass through.
      fallback: weight in (0, 1] where the rule gives none.
      average_dtype: dtype of the average; None for float32 or wider. (static)

    Returns:
      A wrapper with `inner`'s output. Needs params, and raw gradients: put it around everything.

    State:
      average and previous: the parameter's shape in float32 or wider, 8 bytes per parameter;
      weights: one float32 per leaf; inner: `inner`'s.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.adaptive_ema(optax.sgd(1.0))
      >>> p = jnp.zeros(2)
      >>> state = tx.init(p)
      >>> for g in (-1.0, -4.0):
      ...     u, state = tx.update(jnp.full(2, g), state, p)
      ...     p = optax.apply_updates(p, u)
      >>> print(p, optlab.eval_params(state, p))
      [5. 5.] [2.5 2.5]

    Deviations:
      None from the released code, of which the paper's a = (L' + 1)/((p - e) L'') is the idea. The
      rule depends on the size of a leaf: norms are sums over it and the 1 and the 2 are not. Large
      leaves get tiny weights, small ones the fallback.

    References:
      Qiao et al., Large continual instruction assistant, arXiv:2410.10868, 2024; the authors' code.
    """
    name = "adaptive_ema"
    _checks.check_transform(name, "inner", inner)
    _checks.check_range(name, "a number in (0, 1]", lambda x: 0 < x <= 1, fallback=fallback)
    _checks.check_dtype(name, average_dtype=average_dtype)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        dtype = _leafwise.widen if average_dtype is None else average_dtype
        average, previous = (
            _leafwise.init_slots(name, params, kind) for kind in (dtype, _leafwise.widen)
        )
        weights = jnp.zeros((_leafwise.leaf_count(params),), _leafwise.scalar_dtype(params))
        average = AverageParamsState(jnp.zeros([], jnp.int32), average)
        return AdaptiveEmaState(weights, previous, average, inner.init(params))

    def update(updates, state, params: Any = None, **extra_args):
        _leafwise.require_params(name, params)
        new, inside = inner.update(updates, state.inner, params, **extra_args)
        # Of the parameters as they are stored, rounding included.
        after = optax.apply_updates(params, new)
        before = state.average.average
        others = (after, before, state.previous)
        weights = _leafwise.scalars(name, _weight, updates, others)
        weights = jnp.where((weights > 0) & (weights < 1), weights, fallback)
        weights = jnp.where(state.average.count > 0, weights, 1).astype(state.weights.dtype)

        def leaf(path, p, e, none, a):
            del path, none
            return p, e + a * (p - e)

        others = (_leafwise.spread(after, weights),)
        _, average = _leafwise.leafwise(name, leaf, after, (before,), others=others)
        keep = lambda _, g, last, p: (g, g)  # noqa: E731
        _, previous = _leafwise.leafwise(name, keep, updates, (state.previous,))
        average = AverageParamsState(_leafwise.increment(state.average.count), average)
        return new, AdaptiveEmaState(weights, previous, average, inside)

    return optax.GradientTransformationExtraArgs(init, update)


def _weight(path: str, g: Any, none: Any, p: Any, e: Any, before: Any) -> jax.Array:
    """Return the code's rule, 0 where it divides by zero."""
    del path, none
    size, apart, change = (jnp.sum(jnp.abs(x)) for x in (g, p - e, g - before))
    # One quotient after the other: the product of two norms may leave float32.
    return norms.safe_divide(norms.safe_divide(2 * (1 + size), apart), change)
