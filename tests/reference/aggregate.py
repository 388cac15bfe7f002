"""Robust means of gradients: winsorized (arXiv:2002.10657), M3 and RM3 (arXiv:2003.07422)."""

import numpy as np


def winsorized(gradients, c):
    """Mean over the first axis of what is clipped to the c-th and (100 - c)-th percentiles."""
    low, high = np.percentile(gradients, [c, 100 - c], axis=0)
    return np.mean(np.clip(gradients, low, high), axis=0)


def m3(gradients, groups):
    """Median of the means of equal parts of the first axis."""
    return np.median([part.mean(axis=0) for part in np.split(gradients, groups)], axis=0)


def rm3(gradients, window, passthrough):
    """Medians of each gradient of a sequence and those before it; zeros stand before the first."""
    updates = []
    for t, g in enumerate(gradients):
        last = list(gradients[max(0, t - window + 1) : t + 1])
        last += [np.zeros_like(g)] * (window - len(last))
        updates.append(g if passthrough and t < window - 1 else np.median(last, axis=0))
    return updates
