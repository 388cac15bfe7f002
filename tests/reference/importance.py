"""GBLM-Pruner, arXiv:2311.04902, Sec. 3: scores and masks of (inputs, outputs), entry by entry."""

import numpy as np


def scores(w, gradients, x_norms, *, alpha, p):
    """|W_ij| (|X_j|_2 + alpha |G_ij|_p), the norm over samples."""
    norms = np.sum(np.abs(gradients) ** p, axis=0) ** (1 / p)
    return np.abs(w) * (x_norms[:, None] + alpha * norms)


def mask(score, *, ratio=None, pattern=None):
    """False for the lowest of every output: of all inputs, or n of every m."""
    drop, size = pattern or (int(len(score) * ratio), len(score))
    kept = np.ones(score.shape, bool)
    for column in range(score.shape[1]):
        for start in range(0, len(score), size):
            group = score[start : start + size, column]
            lowest = sorted(range(size), key=lambda i: group[i])[:drop]
            kept[[start + i for i in lowest], column] = False
    return kept
