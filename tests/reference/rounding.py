"""Rounding, number by number: to the grid of a float dtype, and of Q-GaLore's codes."""

import numpy as np


def numbers(dtype):
    """Return all finite numbers of a dtype of 8 or 16 bits, in order, in float64."""
    dtype = np.dtype(dtype)
    patterns = np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        values = patterns.view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def neighbours(x, dtype):
    """Return the numbers at and below x, at and above x, and the fraction of the way up."""
    grid, x = numbers(dtype), np.asarray(x, np.float64)
    high = np.searchsorted(grid, x)  # the first that is not below x
    low = np.where(grid[high] == x, high, high - 1)
    gap = np.where(high > low, grid[high] - grid[low], 1)
    return grid[low], grid[high], (x - grid[low]) / gap


def weights(x, bits, block, uniform=None):
    """Return x on the grid of its blocks: arXiv:2407.08296, section 3.3, 0 always in the range."""
    top, flat = 2**bits - 1, np.asarray(x, np.float64).ravel()
    drawn = None if uniform is None else np.asarray(uniform, np.float64).ravel()
    out = np.empty_like(flat)
    for start in range(0, flat.size, block):
        w = flat[start : start + block]
        low, high = min(w.min(), 0), max(w.max(), 0)
        scale = max(high - low, 1e-5) / top
        zero, y = np.clip(-np.round(low / scale), 0, top), w / scale
        whole = np.round(y)
        if drawn is not None:
            whole = np.floor(y) + (drawn[start : start + block] < y - np.floor(y))
        out[start : start + block] = scale * (np.clip(whole + zero, 0, top) - zero)
    return out.reshape(np.shape(x))
