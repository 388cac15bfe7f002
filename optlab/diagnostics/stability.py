"""How far a learning rate is from the one at which training becomes unstable."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optlab import _checks
from optlab.diagnostics import products
from optlab.distributed.shardings import partitioned

Form = Literal["heavy_ball", "nesterov", "ema"]
_FORMS = ("heavy_ball", "nesterov", "ema")


class CriticalSharpness(NamedTuple):
    """What `critical_sharpness` found."""

    value: jax.Array  # float32, (): 2 / step; 0 where the loss rises nowhere
    step: jax.Array  # float32, (): the smallest multiple of the updates that raises the loss
    forwards: jax.Array  # int32, (): evaluations of the loss


@_checks.explain_calls
def stability_limit(
    learning_rate: ArrayLike, *, momentum: ArrayLike = 0.0, form: Form = "heavy_ball"
) -> jax.Array:
    """Return the sharpness at which gradient descent of a learning rate turns unstable.

    On a quadratic, with momentum b:
      2 / lr                         without momentum
      2 (1 + b) / lr                 heavy_ball:  v = b v + g,        p -= lr v     (optax.sgd)
      2 (1 + b) / (1 + 2 b) / lr     nesterov:    v = b v + g,        p -= lr (g + b v)
      2 (1 + b) / (1 - b) / lr       ema:         m = b m + (1-b) g,  p -= lr m / P
    The last is Adam's with b1, 38 / lr at b1 = 0.9, for `sharpness(..., preconditioner=P)` with
    P = sqrt(nu_hat) + eps held still.

    Args:
      learning_rate: > 0; an array gives an array.
      momentum: in [0, 1).
      form: how momentum enters. (static)

    Returns:
      float32, of the learning rate's shape.

    Raises:
      ValueError: a form that is not known.

    Example:
      >>> from optlab.diagnostics import stability_limit
      >>> print(stability_limit(0.01), stability_limit(0.01, momentum=0.9, form="ema").round(2))
      200.0 3800.0

    Deviations:
      None: the formulas were written from memory, and tests compare each with the spectral radius
      of its own recursion.

    References:
      Cohen et al., arXiv:2103.00065, 2021, eq. 1; Adam: arXiv:2207.14484, 2022.
    """
    _checks.check_choice("stability_limit", "form", form, _FORMS)
    b = jnp.asarray(momentum, jnp.float32)
    growth = {"heavy_ball": 1.0, "nesterov": 1 / (1 + 2 * b), "ema": 1 / (1 - b)}
    return 2 * (1 + b) * growth[form] / jnp.asarray(learning_rate, jnp.float32)


@_checks.explain_calls
def stability_margin(
    sharpness: ArrayLike,
    learning_rate: ArrayLike,
    *,
    momentum: ArrayLike = 0.0,
    form: Form = "heavy_ball",
) -> jax.Array:
    """Return by what factor the learning rate could grow until gradient descent turns unstable.

    stability_limit / sharpness: 1 at the edge of stability, below 1 where steps along the sharpest
    direction grow. Of the trace of the Hessian instead of its largest eigenvalue: the bound that
    linearly stable minima of SGD with batches of one example obey.

    Args:
      sharpness: largest eigenvalue of the Hessian; or its trace.
      learning_rate: > 0.
      momentum: in [0, 1).
      form: as in `stability_limit`. (static)

    Returns:
      float32; infinite where the sharpness is 0 or negative.

    Raises:
      ValueError: a form that is not known.

    Example:
      >>> from optlab.diagnostics import stability_margin
      >>> print(stability_margin(50.0, learning_rate=0.01))
      4.0

    Deviations:
      None.

    References:
      Cohen et al., arXiv:2103.00065, 2021; the trace: Wu and Su, arXiv:2305.17490, 2023.
    """
    limit = stability_limit(learning_rate, momentum=momentum, form=form)
    value = jnp.asarray(sharpness, jnp.float32)
    return jnp.where(value > 0, limit / jnp.where(value > 0, value, 1), jnp.inf)


class _Search(NamedTuple):
    low: jax.Array  # the largest step known not to raise the loss; 0 for none
    high: jax.Array  # the smallest known to raise it; infinite for none
    forwards: jax.Array


@partial(jax.jit, static_argnames=("loss", "most"))
def _search(loss, params, updates, batch, start, tolerance, *, most):
    def run(params, updates, batch, start, tolerance):
        wide, direction = products.widened(params), products.widened(updates)
        of_params = products.scalar_loss(loss, batch)
        before = of_params(wide)

        def goes_on(at):
            wide_still = at.high - at.low > tolerance * at.high
            return (at.forwards < most) & (wide_still | ~jnp.isfinite(at.high))

        def narrow(at):
            inside = jnp.where(at.low == 0, at.high / 2, (at.low + at.high) / 2)
            step = jnp.where(jnp.isfinite(at.high), inside, 2 * at.low)
            step = jnp.where(at.forwards == 1, start, step)
            moved = jax.tree.map(lambda p, u: p + step.astype(p.dtype) * u, wide, direction)
            rises = ~(of_params(moved) <= before)  # NaN has risen
            low, high = jnp.where(rises, at.low, step), jnp.where(rises, step, at.high)
            return _Search(low, high, at.forwards + 1)

        begin = _Search(jnp.zeros_like(start), jnp.full_like(start, jnp.inf), jnp.int32(1))
        found = jax.lax.while_loop(goes_on, narrow, begin)
        step = (found.low + found.high) / 2
        return CriticalSharpness(2 / step, step, found.forwards)

    with products.exact():
        places = products.replicated(CriticalSharpness)
        return partitioned(run, places, params, updates, batch, start, tolerance)


@_checks.explain_calls
def critical_sharpness(
    loss: products.Loss,
    params: Any,
    updates: Any,
    *batch: Any,
    start: ArrayLike = 1.0,
    tolerance: float = 0.1,
    most: int = 60,
) -> CriticalSharpness:
    """Find the smallest step along the updates that raises the loss, by forward passes only.

    step = min {c > 0: loss(params + c updates) > loss(params)}, sharpness = 2 / step
    Doubling or halving from `start` until the step is between two powers of two, then bisection.
    On a quadratic and for updates = -gradient this is g^T H g / |g|^2, at most the `sharpness`;
    for updates of an optimizer, learning rate included, 2 / step > 2 is a step too long.

    Args:
      loss: `loss(params, *batch)`, a scalar, evaluated in float32. Pass the same function again to
        reuse its compiled program.
      params: a tree of floating arrays.
      updates: what `optax.apply_updates` would add, -gradient or an optimizer's: a tree like it.
      *batch: what else the loss takes.
      start: the first step tried, > 0: the last one found, to save forward passes.
      tolerance: width of the bracket at the end, relative; the step is in its middle.
      most: forward passes at the most, >= 2. (static)

    Returns:
      CriticalSharpness: value; step, infinite if the loss rises nowhere; forwards, some 6 from a
      start within a factor 2.

    Raises:
      TypeError: a leaf that is no floating array, by its path.
      ValueError: the loss returns no scalar; updates of other leaves than params, by path.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optlab.diagnostics import critical_sharpness
      >>> loss = lambda p: 5 * p @ p
      >>> p = jnp.ones(2)
      >>> print(critical_sharpness(loss, p, -jax.grad(loss)(p), tolerance=1e-3).value.round(1))
      10.0

    Deviations:
      Where the loss rises, falls and rises again along the line, the crossing that is found depends
      on `start`. The authors' code was not read: the definition and the count of passes are theirs.

    References:
      Kalra et al., "A Scalable Measure of Loss Landscape Curvature for Analyzing the Training
      Dynamics of LLMs", arXiv:2601.16979, 2026.
    """
    name = "critical_sharpness"
    products.check(name, loss, params)
    products.check_like(name, "updates", updates, params)
    _checks.check_positive(name, start=start, tolerance=tolerance)
    _checks.check_steps(name, 2, most=most)
    numbers = (jnp.asarray(start, jnp.float32), np.float32(tolerance))
    return _search(loss, params, updates, batch, *numbers, most=most)
