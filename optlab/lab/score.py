"""Times to a target in one number each, as AlgoPerf (arXiv:2306.07179) scores them.

A time is inf where the target was missed.
"""

import numpy as np
from numpy.typing import ArrayLike

WORST = 4.0  # times the fastest: whoever takes longer counts as having missed


def ratios(times: ArrayLike) -> np.ndarray:
    """Return r = t / (the best t of the workload) of times (optimizers, workloads).

    A workload that no one finishes is missed by all.
    """
    times = np.asarray(times, float)
    best = np.where(np.isfinite(times.min(0)), times.min(0), 1.0)
    return times / best


def profile(times: ArrayLike, at: ArrayLike) -> np.ndarray:
    """Return rho(tau), the share of workloads with r <= tau, (optimizers, len(at))."""
    return (ratios(times)[:, :, None] <= np.asarray(at, float)).mean(1)


def scores(times: ArrayLike) -> np.ndarray:
    """Return B = the integral of rho from 1 to 4, over 3: the mean of max(0, 4 - r)/3."""
    return (np.clip(WORST - ratios(times), 0.0, None) / (WORST - 1)).mean(1)


def study_time(trials: ArrayLike) -> float:
    """Return the median over studies of the fastest trial, of times (studies, trials)."""
    return float(np.median(np.asarray(trials, float).min(1)))


def speedup(times: ArrayLike, baseline: int) -> np.ndarray:
    """Return the geometric mean of t_baseline / t; 0 where one of the two missed a target."""
    times = np.asarray(times, float)
    done = np.isfinite(times.max(1))
    if not done[baseline]:
        return np.zeros(len(times))
    mean = np.log(times[baseline] / np.where(done[:, None], times, 1.0)).mean(1)
    return np.where(done, np.exp(mean), 0.0)
