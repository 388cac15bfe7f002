"""Learning rates from numbers: the batch size, a spectrum."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks

BatchRule = str | Callable[[int, int], float]
"""A name of a rule, or a function (base_batch, batch) -> factor."""

_RULES: dict[str, Callable[[int, int], float]] = {
    "linear": lambda base, batch: batch / base,
    "sqrt": lambda base, batch: math.sqrt(batch / base),
}


def _batch_eigenvalue(top: float, noise_mass: float, batch: int) -> float:
    """Return the largest eigenvalue of a batch's Hessian: an outlier's, or the bulk's edge."""
    noise = noise_mass / batch
    return top + noise / top if top > math.sqrt(noise) else 2 * math.sqrt(noise)


@_checks.explain_calls
def max_rate_from_spectrum(top_eigenvalue: float, noise_mass: float, batch: int) -> float:
    """Return the largest stable rate of SGD from the spectrum seen in a batch.

    A batch's Hessian is the whole one plus noise of mass s = noise_mass/batch. Its top eigenvalue
      l(B) = l_1 + s/l_1  if l_1 > sqrt(s),  else the edge of the bulk, 2 sqrt(s)
    allows rates up to 2/l(B): linear in the batch while noise leads, at most 2/l_1. Adaptive
    methods of small damping divide by the root of l(B), and so go with the root of the batch.

    The constants are unconfirmed: no primary source was checked for them.

    Args:
      top_eigenvalue: l_1, of the whole Hessian, > 0.
      noise_mass: P sigma^2: parameters times the variance of an entry of one example's Hessian,
        >= 0.
      batch: examples in a batch.

    Returns:
      2/l(B).

    Example:
      >>> import optlab
      >>> print([round(optlab.max_rate_from_spectrum(4.0, 2000.0, b), 3) for b in (1, 64, 4096)])
      [0.022, 0.179, 0.485]

    References:
      Granziol et al., Learning rates as a function of batch size, arXiv:2006.09092, 2020.
    """
    name = "max_rate_from_spectrum"
    _checks.check_positive(name, top_eigenvalue=top_eigenvalue)
    _checks.check_nonnegative(name, noise_mass=noise_mass)
    _checks.check_steps(name, 1, batch=batch)
    return 2 / _batch_eigenvalue(top_eigenvalue, noise_mass, batch)


def _resolve_rule(name: str, rule: BatchRule, spectrum: tuple[Any, Any]) -> Callable:
    """Return the rule meant by a name or a function; the spectrum goes with one name only."""
    top, mass = spectrum
    if rule != "random_matrix" and spectrum != (None, None):
        must, given = "None unless rule is 'random_matrix'", top if top is not None else mass
        which = "top_eigenvalue" if top is not None else "noise_mass"
        raise _checks.refusal(ValueError, name, which, must, given)
    if callable(rule):
        return rule
    _checks.check_choice(name, "rule", rule, (*_RULES, "random_matrix"))
    if rule != "random_matrix":
        return _RULES[rule]
    _checks.check_positive(name, top_eigenvalue=top)
    _checks.check_nonnegative(name, noise_mass=mass)
    level = lambda batch: _batch_eigenvalue(top, mass, batch)  # noqa: E731
    return lambda base, batch: level(base) / level(batch)


@_checks.explain_calls
def scale_rate_to_batch(
    learning_rate: optax.ScalarOrSchedule,
    base_batch: int,
    batch: int,
    rule: BatchRule = "linear",
    *,
    top_eigenvalue: float | None = None,
    noise_mass: float | None = None,
    max_rate: float | None = None,
) -> Any:
    """Carry a learning rate found at one batch size over to another.

    With B/B0 = batch/base_batch, the rate becomes
      linear         lr B/B0: SGD, with and without momentum;
      sqrt           lr sqrt(B/B0): Adam and its kin; also SGD's where the covariance of updates is
                     to be kept (Hoffer et al.);
      random_matrix  lr l(B0)/l(B), with l of `max_rate_from_spectrum`: linear at first, constant
                     once the top eigenvalue stands out of the noise. Its constants are unconfirmed.

    Hoffer et al. also keep the number of updates: train for B/B0 times as many epochs, so that
    steps and schedules stay what they were.

    Args:
      learning_rate: a number, or a schedule.
      base_batch: B0, the batch size it was found at.
      batch: B, the one to be used.
      rule: a name, or a function (base_batch, batch) -> factor.
      top_eigenvalue: of the whole Hessian; for "random_matrix" alone.
      noise_mass: for "random_matrix" alone; see `max_rate_from_spectrum`.
      max_rate: the rate is never above; None for no bound.

    Returns:
      A number for a number, a schedule for a schedule.

    Example:
      >>> import optlab
      >>> print(optlab.scale_rate_to_batch(0.1, 256, 1024))
      0.4
      >>> print(optlab.scale_rate_to_batch(1e-3, 256, 1024, "sqrt"))
      0.002

    References:
      Goyal et al., arXiv:1706.02677, 2017 (linear).
      Hoffer et al., Train longer, generalize better, arXiv:1705.08741, 2017 (sqrt).
      Granziol et al., arXiv:2006.09092, 2020 (random_matrix).
    """
    name = "scale_rate_to_batch"
    _checks.check_nonnegative(name, learning_rate=learning_rate, schedule=True)
    _checks.check_steps(name, 1, base_batch=base_batch, batch=batch)
    if max_rate is not None:
        _checks.check_positive(name, max_rate=max_rate)
    factor = _resolve_rule(name, rule, (top_eigenvalue, noise_mass))(base_batch, batch)
    _checks.check_nonnegative(f"{name}(rule={rule!r})", factor=factor)
    most = math.inf if max_rate is None else max_rate
    if not callable(learning_rate):
        return min(factor * learning_rate, most)  # type: ignore[operator]

    def schedule(step: ArrayLike) -> Any:
        return jnp.minimum(factor * jnp.asarray(learning_rate(step)), most)

    return schedule


class HeavyBall(NamedTuple):
    """Rate and momentum of `heavy_ball_optimal`."""

    learning_rate: float
    momentum: float


@_checks.explain_calls
def heavy_ball_optimal(l_max: float, l_min: float, *, floor: float = 1e-6) -> HeavyBall:
    """Return the rate and the momentum with which heavy ball is fastest on a quadratic.

    For Hessian eigenvalues in [m, L]:
      learning_rate = (2/(sqrt L + sqrt m))^2
      momentum      = ((sqrt L - sqrt m)/(sqrt L + sqrt m))^2
    which is also the factor, squared, by which the error shrinks at every step. On a network, with
    L and m measured on a batch, nothing is promised; the paper calls its results preliminary.

    Args:
      l_max: L, > 0.
      l_min: m; what is below `floor` L, negative too, counts as that.
      floor: least m/L, in (0, 1]; 1e-6 makes the momentum 0.996 at most. Ours.

    Returns:
      (learning_rate, momentum), floats.

    Example:
      >>> import optlab
      >>> rate, momentum = optlab.heavy_ball_optimal(4.0, 1.0)
      >>> print(round(rate, 3), round(momentum, 3))
      0.444 0.111

    References:
      Polyak, Some methods of speeding up the convergence of iteration methods, 1964.
      Granziol et al., arXiv:2006.09092, 2020.
    """
    name = "heavy_ball_optimal"
    _checks.check_positive(name, l_max=l_max)
    accept = lambda x: x <= l_max  # noqa: E731
    _checks.check_range(name, f"a number <= l_max ({l_max})", accept, l_min=l_min)
    _checks.check_range(name, "a number in (0, 1]", lambda x: 0 < x <= 1, floor=floor)
    high, low = math.sqrt(l_max), math.sqrt(max(l_min, floor * l_max))
    return HeavyBall((2 / (high + low)) ** 2, ((high - low) / (high + low)) ** 2)
