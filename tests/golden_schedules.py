"""Replays the golden schedules, those of optax by the very calls that the README writes."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from optlab import schedules

# Absolute, on positions of the size of 1 after 12 steps.
_REPTILE_TOLERANCE = 2e-6


def _rewarm_cosine(stages: list[dict[str, Any]]) -> optax.Schedule:
    """Re-warm and decay again, stage by stage (arXiv:2308.04014): optax counts the warmup in."""
    cycles = [dict(stage) for stage in stages]
    for cycle in cycles:
        cycle["decay_steps"] = cycle.pop("total_steps")
    return optax.sgdr_schedule(cycles)


def _slow_start_fast_decay(
    init_value: float, peak_value: float, end_value: float, warmup_steps: int, decay_steps: int
) -> optax.Schedule:
    """Rise in a line, fall geometrically: a reading of arXiv:2012.13628, unverified."""
    return optax.warmup_exponential_decay_schedule(
        init_value,
        peak_value,
        warmup_steps,
        transition_steps=decay_steps,
        decay_rate=end_value / peak_value,
        end_value=end_value,
    )


# A schedule's JSON uses our own words: it is called with its parameters as they are.
SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    **{name: getattr(schedules, name) for name in schedules.__all__},
    "rewarm_cosine": _rewarm_cosine,
    "slow_start_fast_decay": _slow_start_fast_decay,
}


def _reptile(case: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Follow the positions of SGD on the quadratics of several tasks, task after task."""
    given = dict(case["params"])
    period, share, rate = (given.pop(key) for key in ("k", "epsilon", "lr"))
    if given or arrays:
        raise NotImplementedError(f"unknown parameters {sorted(given)}, arrays {sorted(arrays)}")
    follow(optax.lookahead(optax.sgd(rate), sync_period=period, slow_step_size=share), case)


def follow(tx: optax.GradientTransformation, case: dict[str, Any]) -> None:
    """Compare with the recorded positions; `tx` is given the gradients of its own."""
    curvatures, centres = (np.asarray(case[key], np.float32) for key in ("A", "c"))
    params = optax.LookaheadParams.init_synced(np.asarray(case["x0"], np.float32))
    state, step = tx.init(params), jax.jit(tx.update)
    for t, expected in enumerate(case["x"]):
        task = t % len(centres)
        grad = curvatures[task] @ (params.fast - centres[task])
        updates, state = step(grad, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(
            params.fast, expected, rtol=0, atol=_REPTILE_TOLERANCE, err_msg=f"step {t}"
        )


CASES: dict[str, Callable[[dict[str, Any], dict[str, np.ndarray]], None]] = {"reptile": _reptile}
