"""Schedules that go up again: cosine cycles, restarted or damped."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optlab import _checks
from optlab.schedules import _phases

_MOST_CYCLES = 2**20  # 8 MiB of tables


def _cycle_table(cycle_steps: int, cycle_mult: float) -> tuple[np.ndarray, np.ndarray]:
    """Return start and length of every cycle that an int32 step can come to."""
    growth = cycle_mult - 1
    count = math.log1p(_phases.LAST * growth / cycle_steps) / math.log(cycle_mult)
    if count > _MOST_CYCLES:
        raise ValueError(
            f"cyclic_cosine: cycle_mult must be 1, or so large that 2**31 steps are at most 2**20 "
            f"cycles, got {cycle_mult}, which makes {count:.0f}. Write cycle_mult=1."
        )
    starts, lengths, start, size = [], [], 0, float(cycle_steps)
    while start <= _phases.LAST:
        starts.append(start)
        lengths.append(round(min(size, _phases.LAST)))
        start, size = start + lengths[-1], size * cycle_mult
    return np.asarray(starts, np.int32), np.asarray(lengths, np.int32)


@_checks.explain_calls
def cyclic_cosine(
    peak_value: float,
    cycle_steps: int,
    *,
    end_value: float = 0.0,
    cycle_mult: float = 1.0,
    peak_decay: float = 1.0,
    warmup_steps: int = 0,
    init_value: float = 0.0,
) -> optax.Schedule:
    """Restart a cosine decay for ever, each cycle longer and lower than the last one if asked to.

    t < W: init + (peak - init) t/W;  then in cycle i = 0, 1, ... of L_i = round(L mult^i) steps,
    at its step u = 0 ... L_i - 1:
      end + (peak - end) decay^i (1 + cos(pi u/L_i))/2.
    `optax.sgdr_schedule` takes a finite list of cycles, and a branch of the program for each; here
    they never end and the program does not grow with their number.

    Args:
      peak_value: value at the start of the first cycle, > 0.
      cycle_steps: L >= 1, steps of the first cycle.
      end_value: value that a cycle goes to, >= 0, <= peak_value; it jumps up before it is there.
      cycle_mult: what a cycle is longer by than the one before, >= 1.
      peak_decay: factor of the amplitude from cycle to cycle, in (0, 1].
      warmup_steps: W >= 0, once, before the first cycle.
      init_value: value at step 0 of the warmup, >= 0.

    Returns:
      A function of the step, an int or an array of any shape, defined for every int32 step >= 0.

    Example:
      >>> import optlab
      >>> rate = optlab.cyclic_cosine(1.0, 10, cycle_mult=2.0, peak_decay=0.5)
      >>> print([round(float(rate(t)), 2) for t in (0, 5, 9, 10, 20, 30, 50)])
      [1.0, 0.5, 0.02, 0.5, 0.25, 0.25, 0.12]

    Deviations:
      The decaying amplitude and the warmup are not the paper's; their defaults turn them off.

    References:
      Loshchilov, Hutter, SGDR: stochastic gradient descent with warm restarts, arXiv:1608.03983,
      2017 (eq. 5).
    """
    _checks.check_positive("cyclic_cosine", peak_value=peak_value)
    _checks.check_nonnegative("cyclic_cosine", init_value=init_value, end_value=end_value)
    _phases.check_most("cyclic_cosine", "end_value", end_value, "peak_value", peak_value)
    _checks.check_steps("cyclic_cosine", 1, cycle_steps=cycle_steps)
    _checks.check_steps("cyclic_cosine", 0, warmup_steps=warmup_steps)
    grows, share = lambda x: 1 <= x < math.inf, lambda x: 0 < x <= 1
    _checks.check_range("cyclic_cosine", "a number >= 1", grows, cycle_mult=cycle_mult)
    _checks.check_range("cyclic_cosine", "a number in (0, 1]", share, peak_decay=peak_decay)
    _phases.check_last("cyclic_cosine", warmup_steps + cycle_steps)
    table = None if cycle_mult == 1 else _cycle_table(cycle_steps, cycle_mult)

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        since = jnp.maximum(step - warmup_steps, 0)
        cycle, into = _position(since, cycle_steps, table)
        height = (peak_value - end_value) * jnp.power(peak_decay, cycle * 1.0)
        value = end_value + height * (1 + jnp.cos(jnp.pi * into)) / 2
        return _phases.after_warmup(step, warmup_steps, init_value, peak_value, value)

    return schedule


def _position(since: jax.Array, cycle_steps: int, table: tuple | None) -> tuple:
    """Return the number of the cycle and how much of it is over."""
    if table is None:
        cycle = jax.lax.stop_gradient(since // cycle_steps)
        return cycle, (since - cycle * cycle_steps) / cycle_steps
    starts, lengths = (jnp.asarray(column) for column in table)
    cycle = jnp.searchsorted(starts, since, side="right", method="compare_all") - 1
    return cycle, (since - starts[cycle]) / lengths[cycle]


@_checks.explain_calls
def damped_cosine(
    peak_value: float,
    decay_steps: int,
    *,
    num_cycles: int = 2,
    damping: float = 0.5,
    end_value: float = 0.0,
    valley_fraction: float = 0.5,
    init_value: float = 0.0,
    warmup_steps: int = 0,
) -> optax.Schedule:
    """Swing between two falling lines: cycles of a cosine, without a jump, down to the end.

    With p = (t - W)/(S - W) in [0, 1] after the warmup, and N cycles:
      crest  = peak (1 - (1 - damping) p)
      valley = valley_fraction peak (1 - p) + end p
      rate   = (crest + valley)/2 + (crest - valley)/2 cos(pi (2N - 1) p)
    It starts at the peak, has N - 1 more crests and ends in the last valley, at `end_value`, where
    it stays. Only partly verified: the equation is from a review of the paper and the two lines
    from a public port that cites it; neither was compared with the paper itself.

    Args:
      peak_value: value after the warmup, > 0.
      decay_steps: S, the step of the end, the warmup included (as optax counts), >= warmup_steps.
      num_cycles: N >= 1; 1 is a single fall.
      damping: what is left of the peak on the line of crests at the end, in [0, 1]; 1 does not
        damp. The last valley may not lie above it: damping peak_value >= end_value.
      end_value: last value, >= 0.
      valley_fraction: where the line of valleys begins, as a fraction of the peak, in [0, 1].
      init_value: value at step 0 of the warmup, >= 0.
      warmup_steps: W >= 0.

    Returns:
      A function of the step, an int or an array of any shape, defined for every int32 step >= 0.

    Example:
      >>> import optlab
      >>> rate = optlab.damped_cosine(1.0, 90, num_cycles=2, end_value=0.1)
      >>> print([round(float(rate(t)), 2) for t in (0, 30, 60, 90, 100)])
      [1.0, 0.37, 0.67, 0.1, 0.1]

    Deviations:
      The defaults of N and damping are ours: the paper's are not known to us.

    References:
      Chinese ModernBERT, arXiv:2510.12285, 2025 (section 3.3, eq. 1, at second hand).
    """
    share = lambda x: 0 <= x <= 1  # noqa: E731
    _checks.check_positive("damped_cosine", peak_value=peak_value)
    _checks.check_nonnegative("damped_cosine", init_value=init_value, end_value=end_value)
    _checks.check_range(
        "damped_cosine", "a number in [0, 1]", share, damping=damping,
        valley_fraction=valley_fraction,
    )  # fmt: skip
    _checks.check_steps("damped_cosine", 1, num_cycles=num_cycles)
    _checks.check_steps("damped_cosine", 0, warmup_steps=warmup_steps)
    _checks.check_steps("damped_cosine", warmup_steps, decay_steps=decay_steps)
    lowest = damping * peak_value
    _phases.check_most("damped_cosine", "end_value", end_value, "damping * peak_value", lowest)
    _phases.check_last("damped_cosine", decay_steps)

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        p = _phases.progress(step, warmup_steps, decay_steps - warmup_steps)
        crest = peak_value * (1 - (1 - damping) * p)
        valley = valley_fraction * peak_value * (1 - p) + end_value * p
        # From the valley up: at p = 1 nothing is left of the crest but rounding, never below 0.
        swing = (1 + jnp.cos(jnp.pi * (2 * num_cycles - 1) * p)) / 2
        value = valley + (crest - valley) * swing
        return _phases.after_warmup(step, warmup_steps, init_value, peak_value, value)

    return schedule
