"""Schedules with a plateau."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks

_Decay = Callable[[jax.Array, float, float], jax.Array]


def _exponential(tau: jax.Array, high: float, low: float) -> jax.Array:
    return high * jnp.exp(tau * math.log(low / high))


_DECAYS: dict[str, _Decay] = {
    "linear": lambda tau, high, low: (1 - tau) * high + tau * low,
    "cosine": lambda tau, high, low: low + (high - low) * (1 + jnp.cos(jnp.pi * tau)) / 2,
    "one_minus_sqrt": lambda tau, high, low: low + (high - low) * (1 - jnp.sqrt(tau)),
    "exponential": _exponential,
    "inverse_proportional": lambda tau, high, low: 1 / ((1 - tau) / high + tau / low),
}


@_checks.explain_calls
def wsd(
    peak_value: float,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    *,
    init_value: float = 0.0,
    end_value: float = 0.0,
    decay: str = "one_minus_sqrt",
) -> optax.Schedule:
    """Warm up, stay, decay: the horizon is chosen only when the decay begins.

    t < W: init + (peak - init) t/W;  t < W + S: peak;  then with tau = (t - W - S)/D in [0, 1]
      linear                peak + (end - peak) tau
      cosine                end + (peak - end)(1 + cos(pi tau))/2
      one_minus_sqrt        end + (peak - end)(1 - sqrt(tau))
      exponential           peak (end/peak)^tau
      inverse_proportional  1/((1 - tau)/peak + tau/end)
    and end for ever after. Step W is the first at the peak, step W + S still is.

    Args:
      peak_value: value of the plateau, > 0.
      warmup_steps: W >= 0.
      stable_steps: S >= 0.
      decay_steps: D >= 0; 0 jumps to the end.
      init_value: value at step 0, >= 0.
      end_value: last value, >= 0; > 0 for exponential and inverse_proportional.
      decay: shape of the decay. MiniCPM writes the exponential with a half-life
        D/log2(peak/end).

    Returns:
      A function of the step, an int or an array of any shape, defined for every int32 step >= 0.

    Example:
      >>> import optlab
      >>> rate = optlab.wsd(1.0, warmup_steps=10, stable_steps=70, decay_steps=20, decay="linear")
      >>> print([round(float(rate(t)), 2) for t in (0, 5, 10, 80, 90, 100)])
      [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]

    Deviations:
      The default decay is the one that did best in Haegele et al.; MiniCPM's is "exponential".

    References:
      Hu et al., MiniCPM, arXiv:2404.06395, 2024 (eq. 1).
      Haegele et al., Scaling laws and compute-optimal training beyond fixed training durations,
      arXiv:2405.18392, 2024 (the 1-sqrt cooldown).
    """
    _checks.check_positive("wsd", peak_value=peak_value)
    _checks.check_nonnegative("wsd", init_value=init_value, end_value=end_value)
    _checks.check_steps(
        "wsd", 0, warmup_steps=warmup_steps, stable_steps=stable_steps, decay_steps=decay_steps
    )
    _checks.check_choice("wsd", "decay", decay, tuple(_DECAYS))
    if decay in ("exponential", "inverse_proportional"):
        _checks.check_positive(f"wsd(decay={decay!r})", end_value=end_value)
    shape, begin = _DECAYS[decay], warmup_steps + stable_steps

    def schedule(step: ArrayLike) -> jax.Array:
        # Steps are subtracted as integers: float32 cannot tell them apart past 2^24.
        step = jnp.asarray(step)
        rising = jnp.minimum(step, warmup_steps) / max(warmup_steps, 1)
        tau = jnp.clip((step - begin) / max(decay_steps, 1), 0, 1)
        tau = jnp.where(step >= begin + decay_steps, 1.0, tau)
        # sqrt has no slope at 0, where the branch is not taken.
        fall = shape(jnp.where(step > begin, tau, 1.0), peak_value, end_value)
        after = jnp.where(step > begin, fall, peak_value) if decay_steps else _jump(step, begin)
        return jnp.where(
            step < warmup_steps, init_value + (peak_value - init_value) * rising, after
        )

    def _jump(step: jax.Array, begin: int) -> jax.Array:
        return jnp.where(step >= begin, end_value, peak_value)

    return schedule
