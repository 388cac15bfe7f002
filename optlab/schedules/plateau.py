"""Schedules with a plateau: one decay at the end, or one for every budget."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optlab import _checks
from optlab.schedules import _phases


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
      decay: shape of the decay, one of the above. MiniCPM writes the exponential with a half-life
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
    _phases.check_shape("wsd", "decay", decay, end_value)
    shape, begin = _phases.SHAPES[decay], warmup_steps + stable_steps
    _phases.check_last("wsd", begin + decay_steps)

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        value = _phases.fall(step, begin, decay_steps, shape, peak_value, end_value)
        return _phases.after_warmup(step, warmup_steps, init_value, peak_value, value)

    return schedule


def _lengths(ends: np.ndarray, decay_steps: int | Sequence[int] | None, fraction: float) -> list:
    """Return how long each cycle decays."""
    if decay_steps is None:
        return [int(fraction * end) for end in ends]
    if isinstance(decay_steps, Sequence | np.ndarray):
        if len(decay_steps) != len(ends):
            must = f"one number, or one for each of the {len(ends)} cycle_ends"
            raise _checks.refusal(ValueError, "wsd_s", "decay_steps", must, decay_steps)
        return list(decay_steps)
    return [decay_steps] * len(ends)


def _check_cycles(warmup_steps: int, ends: np.ndarray, lengths: list) -> None:
    begins = [warmup_steps, *ends[:-1]]
    for i, (begin, end, length) in enumerate(zip(begins, ends, lengths, strict=True)):
        _checks.check_steps("wsd_s", 0, decay_steps=length)
        if not 1 <= length <= end - begin:
            raise ValueError(
                f"wsd_s: the decay of cycle {i} must take 1 step or more between {begin} and "
                f"{end}, got {length}. Give other decay_steps, or another decay_fraction."
            )


@_checks.explain_calls
def wsd_s(
    peak_value: float,
    warmup_steps: int,
    cycle_ends: Sequence[int],
    *,
    init_value: float = 0.0,
    end_value: float | None = None,
    decay_steps: int | Sequence[int] | None = None,
    decay_fraction: float = 0.1,
    decay: str = "inverse_proportional",
) -> optax.Schedule:
    """Warm up, stay, decay, go straight back up: a decayed model at every budget of one run.

    Up to W as `wsd`. Then, in the cycle that ends at step E_i, with D_i steps of decay,
      t < E_i - D_i: peak;  after that peak -> end in the shape `decay`, of (t - E_i + D_i)/D_i.
    Step E_i belongs to the next cycle and is back at the peak: no warmup, no old weights, the
    optimizer's state kept. Only the last cycle comes to its end, and stays there: the weights to
    keep of cycle i are those before step E_i.

    Args:
      peak_value: value of the plateau, > 0.
      warmup_steps: W >= 0.
      cycle_ends: the E_i, the steps at which decayed weights are wanted, increasing.
      init_value: value at step 0, >= 0.
      end_value: what every decay goes to, > 0 for exponential and inverse_proportional; None for a
        tenth of the peak.
      decay_steps: D_i >= 1, one number or one for each cycle; None for `decay_fraction` E_i,
        rounded down.
      decay_fraction: of all steps so far, not of the cycle's own.
      decay: shape of the decays, one of those of `wsd`.

    Returns:
      A function of the step, an int or an array of any shape, defined for every int32 step >= 0.

    Example:
      >>> import optlab
      >>> rate = optlab.wsd_s(1.0, 10, [50, 100, 200], decay="linear")
      >>> print([round(float(rate(t)), 2) for t in (10, 45, 49, 50, 90, 99, 100, 200)])
      [1.0, 1.0, 0.28, 1.0, 1.0, 0.19, 1.0, 0.1]

    Deviations:
      A public port takes the fraction of the cycle's own length; here, as in lingua, it is of all
      steps so far.

    References:
      Wen et al., Understanding warmup-stable-decay learning rates, arXiv:2410.05192, 2024.
      Public ports that agree: facebookresearch/lingua `lr_wsd`, stanford-crfm/levanter.
    """
    _checks.check_positive("wsd_s", peak_value=peak_value)
    end_value = 0.1 * peak_value if end_value is None else end_value
    _checks.check_nonnegative("wsd_s", init_value=init_value, end_value=end_value)
    _checks.check_steps("wsd_s", 0, warmup_steps=warmup_steps)
    _checks.check_range("wsd_s", "a number in (0, 1]", _share, decay_fraction=decay_fraction)
    _phases.check_shape("wsd_s", "decay", decay, end_value)
    if not isinstance(cycle_ends, Sequence | np.ndarray) or not len(cycle_ends):
        raise _checks.refusal(
            TypeError, "wsd_s", "cycle_ends", "a list of steps", cycle_ends, " Write [1000, 2000]."
        )
    for end in cycle_ends:
        _checks.check_steps("wsd_s", 1, cycle_ends=end)
    _phases.check_last("wsd_s", max(cycle_ends))
    ends = np.asarray(cycle_ends)
    if np.any(np.diff(ends, prepend=warmup_steps) <= 0):
        must = f"increasing steps after warmup_steps, {warmup_steps}"
        raise _checks.refusal(ValueError, "wsd_s", "cycle_ends", must, cycle_ends)
    lengths = _lengths(ends, decay_steps, decay_fraction)
    _check_cycles(warmup_steps, ends, lengths)
    lasts, lengths = ends.astype(np.int32), np.asarray(lengths, np.int32)
    shape = _phases.SHAPES[decay]

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        # One comparison with each end, in one kernel: a search by halves would be a loop.
        cycle = jnp.searchsorted(jnp.asarray(lasts), step, side="right", method="compare_all")
        cycle = jnp.minimum(cycle, len(lasts) - 1)
        begin, length = jnp.asarray(lasts - lengths)[cycle], jnp.asarray(lengths)[cycle]
        value = _phases.fall(step, begin, length, shape, peak_value, end_value)
        return _phases.after_warmup(step, warmup_steps, init_value, peak_value, value)

    return schedule


def _share(x: float) -> bool:
    return 0 < x <= 1
