"""The schedule of a model that is never finished."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks
from optlab.schedules import _phases

_COOLDOWNS = ("cosine", "inv_sqrt", "linear")


def _inverse_sqrt(timescale: float) -> _phases.Shape:
    def f(x):
        return (1 + timescale * x) ** -0.5 - 1

    return lambda tau, high, low: low + (high - low) * (1 - f(tau) / f(1.0))


@_checks.explain_calls
def infinite(
    peak_value: float,
    constant_value: float,
    warmup_steps: int,
    cooldown_steps: int,
    constant_steps: int | None = None,
    anneal_steps: int | None = None,
    *,
    init_value: float = 0.0,
    end_value: float | None = None,
    cooldown: str = "cosine",
    timescale: float = 10.0,
) -> optax.Schedule:
    """Warm up and cool down to a constant once in a model's life; anneal only for a release.

    t < W: init + (peak - init) t/W;  then with u = (t - W)/C in [0, 1]
      cosine    const + (peak - const)(1 + cos(pi u))/2
      inv_sqrt  peak + (const - peak) f(u)/f(1),  f(x) = 1/sqrt(1 + timescale x) - 1
      linear    peak + (const - peak) u
    const for N steps, or for ever;  then const (end/const)^((t - W - C - N)/A), and end.
    The next task goes on at the constant: nothing is warmed up again. For a release in between,
    leave this schedule as it is and cool a copy of the run with `branch`.

    Args:
      peak_value: value after the warmup, > 0.
      constant_value: value to train on with, > 0, <= peak_value.
      warmup_steps: W >= 0.
      cooldown_steps: C >= 0; 0 jumps. W, C, N and A are durations.
      constant_steps: N >= 0; None where it never ends.
      anneal_steps: A >= 0; None, the default, never anneals, whatever `constant_steps` says.
      init_value: value at step 0, >= 0.
      end_value: last value, > 0, <= constant_value; needed by `anneal_steps`.
      cooldown: "cosine", "inv_sqrt" or "linear".
      timescale: of inv_sqrt, > 0: the larger, the faster it falls at first.

    Returns:
      A function of the step, an int or an array of any shape, defined for every int32 step >= 0.

    Example:
      >>> import optlab
      >>> rate = optlab.infinite(1.0, 0.25, warmup_steps=10, cooldown_steps=40)
      >>> print([round(float(rate(t)), 3) for t in (0, 10, 30, 50, 2**31 - 1)])
      [0.0, 1.0, 0.625, 0.25, 0.25]

    Deviations:
      The code beside the second paper reads its ratios as boundaries, not durations; a public
      port of the first forgets the cooldown in the length of its anneal and never comes to its end.

    References:
      Ibrahim et al., Simple and scalable strategies to continually pre-train large language models,
      arXiv:2403.08763, 2024.
      Singh et al., Beyond cosine decay, arXiv:2503.02844, 2025.
    """
    _checks.check_positive(
        "infinite", peak_value=peak_value, constant_value=constant_value, timescale=timescale
    )
    _checks.check_nonnegative("infinite", init_value=init_value)
    _checks.check_steps("infinite", 0, warmup_steps=warmup_steps, cooldown_steps=cooldown_steps)
    _checks.check_choice("infinite", "cooldown", cooldown, _COOLDOWNS)
    _phases.check_most("infinite", "constant_value", constant_value, "peak_value", peak_value)
    if anneal_steps is not None and end_value is not None:
        _phases.check_most("infinite", "end_value", end_value, "constant_value", constant_value)
    begin = _anneal_begin(warmup_steps + cooldown_steps, constant_steps, anneal_steps, end_value)
    shapes = _phases.SHAPES | {"inv_sqrt": _inverse_sqrt(timescale)}

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        value = _phases.fall(
            step, warmup_steps, cooldown_steps, shapes[cooldown], peak_value, constant_value
        )
        if begin is not None:
            annealed = _phases.fall(
                step, begin, anneal_steps, shapes["exponential"], constant_value, end_value
            )
            value = jnp.where(step >= begin, annealed, value)
        return _phases.after_warmup(step, warmup_steps, init_value, peak_value, value)

    return schedule


def _anneal_begin(
    constant_from: int, constant_steps: int | None, anneal_steps: int | None, end: float | None
) -> int | None:
    """Check the two last phases; return the step of the anneal, None where there is none."""
    if constant_steps is not None:
        _checks.check_steps("infinite", 0, constant_steps=constant_steps)
    if anneal_steps is None:
        _phases.check_last("infinite", constant_from)
        return None
    _checks.check_steps("infinite", 0, anneal_steps=anneal_steps)
    if constant_steps is None or end is None:
        lacking = "constant_steps" if constant_steps is None else "end_value"
        raise ValueError(
            f"infinite: anneal_steps needs {lacking}, got None. Give it, or leave anneal_steps out "
            "to stay at constant_value for ever."
        )
    _checks.check_positive("infinite", end_value=end)
    _phases.check_last("infinite", constant_from + constant_steps + anneal_steps)
    return constant_from + constant_steps
