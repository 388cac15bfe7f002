"""What schedules are joined from: how far a phase is, how it rises, how it falls.

A phase [a, b) owns step a. Steps are subtracted as integers: float32 cannot tell them apart past
2^24. What a branch does where it is not taken is finite too, with finite slopes: `jnp.where` takes
the gradients of both.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optlab import _checks

Shape = Callable[[jax.Array, Any, Any], jax.Array]
LAST = 2**31 - 1  # optax counts steps in int32


def _exponential(tau: jax.Array, high: float, low: float) -> jax.Array:
    return high * jnp.exp(tau * math.log(low / high))


SHAPES: dict[str, Shape] = {
    "linear": lambda tau, high, low: (1 - tau) * high + tau * low,
    "cosine": lambda tau, high, low: low + (high - low) * (1 + jnp.cos(jnp.pi * tau)) / 2,
    "one_minus_sqrt": lambda tau, high, low: low + (high - low) * (1 - jnp.sqrt(tau)),
    "exponential": _exponential,
    "inverse_proportional": lambda tau, high, low: 1 / ((1 - tau) / high + tau / low),
}


def check_shape(name: str, argument: str, shape: str, end_value: float) -> None:
    """Refuse an unknown shape, and one that divides by an end that is zero."""
    _checks.check_choice(name, argument, shape, tuple(SHAPES))
    if shape in ("exponential", "inverse_proportional"):
        _checks.check_positive(f"{name}({argument}={shape!r})", end_value=end_value)


def check_most(name: str, argument: str, value: Any, what: str, top: Any) -> None:
    """Refuse a value above another one, where both are known."""
    if isinstance(value, jax.Array) or isinstance(top, jax.Array):
        return  # an injected hyperparameter
    if value > top:
        raise _checks.refusal(ValueError, name, argument, f"at most {what}, {top!r}", value)


def check_last(name: str, last: int) -> None:
    """Refuse phases that end where no int32 step comes."""
    if last > LAST:
        raise ValueError(
            f"{name}: the phases must end by step 2**31 - 1, got {last}. Steps are int32: shorten "
            "the phase that is to last for ever."
        )


def progress(step: jax.Array, begin: Any, length: Any) -> jax.Array:
    """Return how much of a phase is over: 0 up to `begin`, 1 from its end on."""
    tau = jnp.clip((step - begin) / jnp.maximum(length, 1), 0, 1)
    return jnp.where(step >= begin + length, 1.0, tau)


def rise(step: jax.Array, length: int, low: float, high: float) -> jax.Array:
    """Return the linear warmup of the steps below `length`."""
    return low + (high - low) * (jnp.minimum(step, length) / max(length, 1))


def fall(step: jax.Array, begin: Any, length: Any, shape: Shape, high: Any, low: Any) -> jax.Array:
    """Return `high` up to `begin`, then the shape, then `low`; a length of 0 jumps."""
    tau = progress(step, begin, length)
    # sqrt has no slope at 0, where the branch is not taken.
    return jnp.where(tau > 0, shape(jnp.where(tau > 0, tau, 1.0), high, low), high)


def after_warmup(
    step: jax.Array, length: int, low: float, high: float, later: ArrayLike
) -> jax.Array:
    """Return the warmup from `low` to `high`, and `later` from step `length` on."""
    return jnp.where(step < length, rise(step, length, low, high), later)
