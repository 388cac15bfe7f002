"""Where a loss is going: an exponential fitted to its last values."""

import numpy as np
from numpy.typing import ArrayLike

from optlab import _checks

NAME = "forecast_exponential"
LEAST = 4  # points; the curve has three parameters
_LONGEST = 2.0  # windows
_GRID, _ZOOMS = 33, 6  # the time constant is found to 1e-6 of itself
_FAR = 4.0  # robust standard deviations


@_checks.explain_calls
def forecast_exponential(losses: ArrayLike, horizon: float, *, robust: bool = True) -> float:
    """Fit a exp(-t/T) + c to losses at t = 0, 1, ... and return its value at t = horizon.

    For every time constant T the best a and c are a linear regression (variable projection), so
    what is left is a search over T alone, on a grid that zooms in.

    Args:
      losses: one-dimensional, finite, at least 4 values at equal distances.
      horizon: where to look, counted from the first value, in the values' own distance.
      robust: fit twice more without what lies further from the curve than 4 standard deviations,
        these estimated from the median: single spikes do not count.

    Returns:
      The forecast, a Python float, computed in float64.

    Raises:
      ValueError: fewer than 4 losses, or one that is not finite.

    Example:
      >>> import numpy as np, optlab
      >>> t = np.arange(100)
      >>> print(round(optlab.forecast_exponential(2 * np.exp(-0.03 * t) + 0.5, 1000), 6))
      0.5

    Deviations:
      AutoLRS's code fits a smoothing spline first and the exponential to that. The spline's default
      smoothing takes noise to be of size 1, so losses of that order become a parabola: for the
      example above the code says 0.347. T is at most two windows here: of a straight line nobody
      can tell where it ends.

    References:
      Golub and Pereyra, The differentiation of pseudo-inverses and nonlinear least squares problems
      whose variables separate, SIAM J. Numer. Anal. 10(2), 1973. Jin et al., AutoLRS,
      arXiv:2105.10762, 2021.
    """
    y = _as_losses(losses)
    _checks.check_nonnegative(NAME, horizon=horizon)
    t = np.arange(len(y), dtype=np.float64)
    kept = np.ones(len(y), bool)
    a, constant, c = _fit(t, y, len(y))
    for _ in range(2 if robust else 0):
        off = np.abs(y - _curve(t, a, constant, c))
        scale = 1.4826 * np.median(off[kept])
        # Without noise there is nothing to tell a spike from.
        kept = off <= max(_FAR * scale, 1e-9 * np.abs(y).max())
        if kept.sum() < LEAST:
            break
        a, constant, c = _fit(t[kept], y[kept], len(y))
    return float(_curve(horizon, a, constant, c))


def _as_losses(losses: ArrayLike) -> np.ndarray:
    y = np.asarray(losses, np.float64)
    if y.ndim != 1 or len(y) < LEAST:
        raise _checks.refusal(
            ValueError, NAME, "losses", f"one-dimensional with {LEAST} values or more", y
        )
    bad = np.flatnonzero(~np.isfinite(y))
    if bad.size:
        fix = " Leave such a run out: it has no forecast."
        at = f"finite everywhere, not {y[bad[0]]} at {bad[0]}"
        raise _checks.refusal(ValueError, NAME, "losses", at, y, fix)
    return y


def _curve(t: ArrayLike, a: float, constant: float, c: float) -> np.ndarray:
    return a * np.exp(-np.asarray(t, np.float64) / constant) + c


def _fit(t: np.ndarray, y: np.ndarray, window: int) -> tuple[float, float, float]:
    """Return a, T and c of the least squares."""
    low, middle, high = 0.5, 1.0, _LONGEST * window
    for _ in range(_ZOOMS):
        constants = np.geomspace(low, high, _GRID)
        best = int(np.argmin(_project(t, y, constants)[0]))
        low, high = constants[max(best - 1, 0)], constants[min(best + 1, _GRID - 1)]
        middle = constants[best]
    _, (a,), (c,) = _project(t, y, np.array([middle]))
    return float(a), float(middle), float(c)


def _project(t: np.ndarray, y: np.ndarray, constants: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the squared error, a and c of the best curve for each time constant."""
    basis = np.exp(-t / constants[:, None])
    mean = basis.mean(1)
    # Centred: long constants give nearly equal entries, whose squares would cancel.
    x, target = basis - mean[:, None], y - y.mean()
    a = x @ target / np.maximum((x * x).sum(1), np.finfo(np.float64).tiny)
    error = ((target - a[:, None] * x) ** 2).sum(1)
    return error, a, y.mean() - a * mean
