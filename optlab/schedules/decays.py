"""Schedules that fall from their first step on, or from the end of a linear warmup."""

import math

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks
from optlab.schedules import _phases
from optlab.schedules.plateau import wsd


@_checks.explain_calls
def warmup_linear_decay(
    peak_value: float,
    warmup_steps: int,
    total_steps: int,
    *,
    init_value: float = 0.0,
    end_value: float = 0.0,
) -> optax.Schedule:
    """Warm up and fall in a straight line: the baseline that is hardest to beat.

    t < W: init + (peak - init) t/W;  t < T: peak + (end - peak)(t - W)/(T - W);  then end.
    Over the ten problems of the paper the best schedule that is not made from measurements; those
    that are (`refined`) start from it. It is `wsd` without a plateau.

    Args:
      peak_value: value at step W, > 0.
      warmup_steps: W >= 0.
      total_steps: T, the step of the end, >= warmup_steps.
      init_value: value at step 0, >= 0.
      end_value: last value, >= 0.

    Returns:
      A function of the step, an int or an array of any shape, defined for every int32 step >= 0.

    Example:
      >>> import optlab
      >>> rate = optlab.warmup_linear_decay(1.0, warmup_steps=10, total_steps=110)
      >>> print([round(float(rate(t)), 2) for t in (0, 5, 10, 60, 110)])
      [0.0, 0.5, 1.0, 0.5, 0.0]

    Deviations:
      None.

    References:
      Defazio et al., When, why and how much? Adaptive learning rate scheduling by refinement,
      arXiv:2310.07831, 2023.
    """
    _checks.check_steps("warmup_linear_decay", 0, warmup_steps=warmup_steps)
    _checks.check_steps("warmup_linear_decay", warmup_steps, total_steps=total_steps)
    _phases.check_last("warmup_linear_decay", total_steps)
    return wsd(
        peak_value,
        warmup_steps,
        0,
        total_steps - warmup_steps,
        init_value=init_value,
        end_value=end_value,
        decay="linear",
    )


@_checks.explain_calls
def slanted_triangular(
    peak_value: float, total_steps: int, *, cut_frac: float = 0.1, ratio: float = 32.0
) -> optax.Schedule:
    """Rise steeply and fall slowly, between a peak and a fixed fraction of it (ULMFiT).

    cut = floor(T cut_frac);  p = t/cut below cut, 1 - (t - cut)/(cut (1/cut_frac - 1)) from there;
    rate = peak (1 + p (ratio - 1))/ratio, with p = 0 for ever after T.

    Args:
      peak_value: value at the cut, > 0; the paper's is 0.01.
      total_steps: T; T cut_frac >= 1.
      cut_frac: fraction of the steps that rise, in (0, 1).
      ratio: how many times smaller than the peak the lowest value is, >= 1.

    Returns:
      A function of the step, an int or an array of any shape, defined for every int32 step >= 0.

    Example:
      >>> import optlab
      >>> rate = optlab.slanted_triangular(0.032, total_steps=100)
      >>> print([round(float(rate(t)), 3) for t in (0, 5, 10, 55, 100)])
      [0.001, 0.016, 0.032, 0.016, 0.001]

    Deviations:
      None.

    References:
      Howard, Ruder, Universal language model fine-tuning for text classification,
      arXiv:1801.06146, 2018 (eq. 3).
    """
    inside, large = lambda x: 0 < x < 1, lambda x: 1 <= x < math.inf
    _checks.check_positive("slanted_triangular", peak_value=peak_value)
    _checks.check_steps("slanted_triangular", 1, total_steps=total_steps)
    _checks.check_range("slanted_triangular", "a number in (0, 1)", inside, cut_frac=cut_frac)
    _checks.check_range("slanted_triangular", "a number >= 1", large, ratio=ratio)
    _phases.check_last("slanted_triangular", total_steps)
    cut = math.floor(total_steps * cut_frac)
    if cut < 1:
        raise ValueError(
            f"slanted_triangular: total_steps * cut_frac must be >= 1, got {total_steps} * "
            f"{cut_frac}. Give a larger cut_frac."
        )
    length = cut * (1 / cut_frac - 1)

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        falling = jnp.clip(1 - (step - cut) / length, 0, 1)
        p = jnp.where(step < cut, _phases.rise(step, cut, 0.0, 1.0), falling)
        return peak_value * (1 + p * (ratio - 1)) / ratio

    return schedule


@_checks.explain_calls
def inverse_power(init_value: float, *, gamma: float = 1e-3, power: float = 0.75) -> optax.Schedule:
    """Fall as a power of the steps, for ever: init (1 + gamma t)^-power.

    The schedule of domain-adversarial training; it needs no horizon and never comes to zero.

    Args:
      init_value: value at step 0, > 0.
      gamma: inverse of the steps before it falls, >= 0.
      power: exponent, >= 0; 0.5 is that of the theory of stochastic gradients.

    Returns:
      A function of the step, an int or an array of any shape, defined for every int32 step >= 0.

    Example:
      >>> import optlab
      >>> rate = optlab.inverse_power(1.0, gamma=0.01, power=0.5)
      >>> print([round(float(rate(t)), 3) for t in (0, 100, 300, 9900)])
      [1.0, 0.707, 0.5, 0.1]

    Deviations:
      Ganin et al. write the steps as a fraction of the training, with gamma 10; the defaults are
      those of the code that counts steps.

    References:
      Ganin et al., Domain-adversarial training of neural networks, arXiv:1505.07818, 2016.
    """
    _checks.check_positive("inverse_power", init_value=init_value)
    _checks.check_nonnegative("inverse_power", gamma=gamma, power=power)

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.result_type(float))
        return init_value * (1 + gamma * step) ** -power

    return schedule
