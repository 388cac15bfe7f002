"""WeLore's ranks, arXiv:2407.11239, Sec. 3.2: one threshold on normalized singular values."""

import numpy as np


def pruned(w, threshold):
    """Number of normalized singular values below the threshold."""
    s = np.linalg.svd(w, compute_uv=False)
    return int(np.sum((s - s.min()) / (s.max() - s.min()) < threshold))


def reduction(matrices, threshold):
    """Share of all ranks that is pruned."""
    return sum(pruned(w, threshold) for w in matrices) / sum(min(w.shape) for w in matrices)


def search(matrices, wanted, step=1e-4):
    """The first threshold of a grid that prunes the share wanted."""
    return next(t for t in np.arange(0, 1, step) if reduction(matrices, t) >= wanted)
