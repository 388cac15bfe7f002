"""Averages of the parameters themselves, kept beside training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab.transforms.momentum import correction


class AverageParamsState(NamedTuple):
    """State of `average_params`."""

    count: jax.Array  # int32, (): updates seen
    average: optax.Params  # the parameters' shapes, bias corrected; zeros before the first update


@_checks.explain_calls
def average_params(
    decay: ArrayLike | None = 0.999,
    *,
    start: int = 0,
    average_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Average the parameters that the updates lead to; pass the updates through.

    p = params + u,   a <- a + w (p - a)   at step t, n = t - start:
      decay a number:  w = (1 - decay)/(1 - decay^n), an exponential average, bias corrected;
      decay None:      w = 1/n, the mean of all, Polyak's and Ruppert's.
    While n < 1 the average is p itself.

    The last link of a chain, for it has to see what is added to the parameters; within
    `optax.MultiSteps` it sees real steps only. Evaluate with `optlab.eval_params(state, params)`.

    Args:
      decay: share that is kept, in [0, 1); its average looks back 1/(1 - decay) steps. None for the
        mean of all steps.
      start: steps before averaging begins, >= 0. (static)
      average_dtype: dtype of the average; None for float32 or wider: in bfloat16 a share of 1/1000
        is lost in rounding. (static)

    Returns:
      A transformation that leaves updates as they are. Needs params.

    State:
      average: 4 bytes per parameter; count: int32.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optax.chain(optax.sgd(1.0), optlab.average_params(None))
      >>> p = jnp.zeros(1)
      >>> state = tx.init(p)
      >>> for _ in range(3):
      ...     u, state = tx.update(jnp.ones(1), state, p)
      ...     p = optax.apply_updates(p, u)
      >>> print(p, optlab.eval_params(state, p))
      [-3.] [-2.]

    References:
      Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM J. Control
      Optim. 30(4), 1992. Kingma and Ba, arXiv:1412.6980, 2014, section 7.2.
    """
    name = "average_params"
    if decay is not None:
        _checks.check_decay(name, decay=decay)
    _checks.check_steps(name, start=start)
    _checks.check_dtype(name, average_dtype=average_dtype)

    def init(params):
        dtype = _leafwise.widen if average_dtype is None else average_dtype
        return AverageParamsState(
            jnp.zeros([], jnp.int32), _leafwise.init_slots(name, params, dtype)
        )

    def update(updates, state, params: Any = None, **extra_args):
        del extra_args
        _leafwise.require_params(name, params)
        # Also refuses updates that are no gradient of these parameters.
        _leafwise.leafwise(name, lambda _, u, p: (u,), updates, (), params)
        count = _leafwise.increment(state.count)
        n = jnp.maximum(count - start, 1)
        weight = 1 / n if decay is None else (1 - decay) / correction(decay, n)

        def leaf(path, p, average, none):
            del path, none
            return p, average + weight * (p - average)

        # Of the parameters as they are stored, rounding included.
        after = optax.apply_updates(params, updates)
        _, average = _leafwise.leafwise(name, leaf, after, (state.average,))
        return updates, AverageParamsState(count, average)

    return optax.GradientTransformationExtraArgs(init, update)
