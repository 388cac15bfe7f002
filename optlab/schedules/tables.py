"""Schedules made from others and from numbers: looked up in a table, cooled from a step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optlab import _checks
from optlab.schedules import _phases


def _check_values(values: Sequence[float] | np.ndarray | jax.Array) -> np.ndarray:
    try:
        table = np.array(values, np.float64)
    except (TypeError, ValueError):
        table = np.empty(())
    if table.ndim != 1 or not table.size:
        raise _checks.refusal(TypeError, "refined", "values", "a list of numbers", values)
    bad = np.flatnonzero(~(np.isfinite(table) & (table >= 0)))
    if bad.size:
        raise ValueError(
            f"refined: values must be finite and >= 0, got {table[bad[0]]} at {bad[0]}. Leave out "
            "the steps that diverged."
        )
    return table


@_checks.explain_calls
def refined(
    values: Sequence[float] | np.ndarray,
    *,
    interpolation: str = "linear",
    total_steps: int | None = None,
) -> optax.Schedule:
    """Follow a table, such as the one that `refine_schedule` makes from recorded gradient norms.

    With n values for T steps, x = t n/T:  previous takes values[floor(x)], linear goes in straight
    lines from values[floor(x)] to the next; from the last value's step on it stays at that.
    The table may come from a run of another length, or from every k-th step of one.

    Args:
      values: the table, n >= 1 finite numbers >= 0; a copy is taken.
      interpolation: "linear" or "previous"; the same where T is n.
      total_steps: T >= 1; None for one step per value.

    Returns:
      A function of the step, an int or an array of any shape, defined for every int32 step >= 0.

    Example:
      >>> import optlab
      >>> rate = optlab.refined([0.5, 1.0, 0.0], total_steps=6)
      >>> print([round(float(rate(t)), 2) for t in range(6)])
      [0.5, 0.75, 1.0, 0.5, 0.0, 0.0]

    Deviations:
      None.

    References:
      Defazio et al., When, why and how much? Adaptive learning rate scheduling by refinement,
      arXiv:2310.07831, 2023 (which makes the table).
    """
    table = _check_values(values)
    _checks.check_choice("refined", "interpolation", interpolation, ("linear", "previous"))
    total_steps = len(table) if total_steps is None else total_steps
    _checks.check_steps("refined", 1, total_steps=total_steps)
    _phases.check_last("refined", total_steps)
    exact = np.arange(len(table)) * (total_steps / len(table))
    # The first whole step of every value: no product t n that might leave int32.
    starts = -(-np.arange(len(table)) * total_steps // len(table))
    late, starts = starts - exact, starts.astype(np.int32)
    following = np.append(table[1:], table[-1])

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        # Unrolled: a loop of scalars would be a kernel for every halving on an accelerator.
        index = jnp.searchsorted(starts, step, side="right", method="scan_unrolled") - 1
        here = jnp.asarray(table)[index]
        if interpolation == "previous":
            return here
        beyond = step - jnp.asarray(starts)[index] + jnp.asarray(late)[index]
        x = jnp.clip(beyond * (len(table) / total_steps), 0, 1)
        return here + (jnp.asarray(following)[index] - here) * x

    return schedule


@_checks.explain_calls
def branch(
    schedule: optax.Schedule,
    at_step: int,
    decay_steps: int,
    shape: str = "one_minus_sqrt",
    *,
    end_value: float = 0.0,
) -> optax.Schedule:
    """Cool any schedule from a step, for a finished model of a run that goes on.

    t <= at_step: schedule(t);  then from schedule(at_step) to end in `decay_steps`, in one of the
    shapes of `wsd`;  and end for ever after.
    Restore the checkpoint of `at_step`, train the copy with the branch, and let the run go on.

    Args:
      schedule: a function of the step, optax's or ours; asked once now, for its value at `at_step`.
      at_step: step of the checkpoint, >= 0; the last one at the schedule's own value.
      decay_steps: >= 0; 0 jumps to the end.
      shape: "linear", "cosine", "one_minus_sqrt", "exponential" or "inverse_proportional".
      end_value: last value, >= 0; > 0 for exponential and inverse_proportional.

    Returns:
      A function of the step, an int or an array of any shape, defined for every int32 step >= 0.

    Example:
      >>> import optlab
      >>> rate = optlab.infinite(1.0, 0.5, warmup_steps=10, cooldown_steps=40)
      >>> cooled = optlab.branch(rate, 200, 20, "linear")
      >>> print([round(float(cooled(t)), 2) for t in (10, 50, 200, 210, 220)])
      [1.0, 0.5, 0.5, 0.25, 0.0]

    Deviations:
      None.

    References:
      Haegele et al., Scaling laws and compute-optimal training beyond fixed training durations,
      arXiv:2405.18392, 2024 (cooldowns from checkpoints of one run).
    """
    _check_schedule(schedule)
    _checks.check_steps("branch", 0, at_step=at_step, decay_steps=decay_steps)
    _checks.check_nonnegative("branch", end_value=end_value)
    with jax.ensure_compile_time_eval():
        found = np.asarray(schedule(at_step))
    if found.ndim or not 0 <= found < np.inf:
        raise ValueError(
            f"branch: schedule({at_step}) must be a finite number >= 0, got {found}. Give another "
            "at_step, or another schedule."
        )
    high = float(found)
    _phases.check_shape("branch", "shape", shape, end_value)
    if shape in ("exponential", "inverse_proportional") and not high:
        raise ValueError(
            f"branch: schedule({at_step}) must be > 0 for the shape {shape!r}, got 0. Write "
            "shape='linear'."
        )
    _phases.check_last("branch", at_step + decay_steps)
    fall = _phases.SHAPES[shape]

    def branched(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        # Not asked beyond the branch: who knows what is there.
        before = schedule(jnp.minimum(step, at_step))
        after = _phases.fall(step, at_step, decay_steps, fall, high, end_value)
        return jnp.where(step < at_step, before, after)

    return branched


def _check_schedule(schedule: optax.Schedule) -> None:
    if not callable(schedule):
        fix = " Write optax.constant_schedule(0.1) for a number."
        raise _checks.refusal(
            TypeError, "branch", "schedule", "a function of the step", schedule, fix
        )
    _checks.check_takes("branch", "schedule", "step", schedule)
