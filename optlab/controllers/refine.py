"""A schedule from the gradient norms of an earlier run."""

import numpy as np
from numpy.typing import ArrayLike

from optlab import _checks

NAME = "refine_schedule"
_POWERS = {"sgd": 2, "adam": 1}


@_checks.explain_calls
def refine_schedule(
    grad_norms: ArrayLike,
    optimizer: str = "sgd",
    *,
    smoothing: float = 0.1,
    normalize: bool = True,
) -> np.ndarray:
    """Return the schedule that the gradient norms of a finished run ask for.

    g_t smoothed by a running median;  w_t = g_t^-2 ("sgd") or 1/g_t ("adam");
    eta_t = w_t (sum of w_p over p > t)/(sum of all w_p), by default divided by its largest.
    Equal norms give linear decay 1 - (t + 1)/T; large norms early on give a warm-up, norms that
    rise towards the end a faster end. The last value is 0.

    `optlab.refined(rate * values)` is the schedule of it, with the rate you tune. Norms are
    recorded by `optlab.watch(tx, [measures.gradient_rms])` for "sgd" and by
    `measures.gradient_mean_abs` for "adam": these are the l2 and l1 norms up to a factor, which
    normalizing takes out.

    Try it beside linear decay, with both peaks tuned: the smaller the norms are the larger is the
    rate, whatever made them so. On the race's text model they rise while the rate falls, which
    makes what is refined fall sooner. Under Muon its loss was that of linear decay (refined twice,
    ten seeds: 0.1 % below, standard error 0.4 %; from the norms of a constant rate 0.4 % above,
    standard error 0.1 %); under five other optimizers it ended 1.4 to 9 % above (one seed each,
    where seeds scatter by some 1.2 %).

    Args:
      grad_norms: one norm per step, or per k steps, finite and > 0; T of them, T >= 2.
      optimizer: "sgd" for l2 norms; "adam", for methods that divide by the gradient's size entry by
        entry, for l1 norms.
      smoothing: width of the median's window as a share of T, in [0, 1); it is made odd. The paper
        names it tau; 0.1 is ours.
      normalize: divide by the largest value; otherwise the paper's own scale.

    Returns:
      T values of eta, float64, in NumPy.

    Raises:
      ValueError: a norm that is zero, negative or not finite, by its place.

    Example:
      >>> import optlab
      >>> print(optlab.refine_schedule([4.0, 2.0, 2.0, 2.0], smoothing=0.0))
      [0.375 1.    0.5   0.   ]

    Deviations:
      The released function divides by the last weight rather than by the sum, which is another
      scale of the same shape. It extends the record by two windows at its end, of which a median
      reads half of one; so a record of any length can be smoothed.

    References:
      Defazio, Cutkosky, Mehta and Mishchenko, When, why and how much? Adaptive learning rate
      scheduling by refinement, arXiv:2310.07831, 2023 (algorithm 1).
    """
    norms = _as_norms(grad_norms)
    _checks.check_choice(NAME, "optimizer", optimizer, tuple(_POWERS))
    _checks.check_decay(NAME, smoothing=smoothing)
    weights = _running_median(norms, smoothing) ** -_POWERS[optimizer]
    after = np.append(np.cumsum(weights[:0:-1])[::-1], 0.0)
    values = weights * after
    return values / (values.max() if normalize else weights.sum())


def _as_norms(grad_norms: ArrayLike) -> np.ndarray:
    norms = np.asarray(grad_norms, np.float64)
    if norms.ndim != 1 or len(norms) < 2:
        must = "one-dimensional with 2 values or more"
        raise _checks.refusal(ValueError, NAME, "grad_norms", must, norms)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        must = f"finite and > 0, not {norms[bad[0]]} at {bad[0]}"
        fix = " Leave out steps that were skipped, or the run that diverged."
        raise _checks.refusal(ValueError, NAME, "grad_norms", must, norms, fix)
    return norms


def _running_median(x: np.ndarray, share: float) -> np.ndarray:
    """Return medians of windows; the first value is repeated, the end is mirrored."""
    half = int(share * len(x)) // 2
    padded = np.concatenate([np.full(half, x[0]), x, x[-2 : -2 - half : -1]])
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)
