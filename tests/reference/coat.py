"""COAT's codes for FP8 optimizer state, arXiv:2410.19313, with the order of its released kernel."""

import ml_dtypes
import numpy as np

_TINY, _TOP = 1e-30, 448.0


def encode(x, expand=True):
    """Dynamic range expansion (section 4.2) of one group: codes, scale, k and centre."""
    a = np.abs(x)
    largest, smallest = a.max() + _TINY, a[a > 0].min() + _TINY
    k, c = 1.0, 1.0
    if expand:
        k = np.floor(16 * np.log2(_TOP * _TOP / 2) / np.log2(largest / smallest)) / 16
        c = np.sqrt(largest) * np.sqrt(smallest)
    z = np.sign(x) * (a / c) ** k
    s = (largest / c) ** k / _TOP
    return np.clip(z / s, -_TOP, _TOP).astype(ml_dtypes.float8_e4m3fn), s, k, c


def decode(codes, s, k, c):
    """Return the numbers of one group."""
    y = codes.astype(np.float64) * s
    return np.sign(y) * np.abs(y) ** (1 / k) * c


def adamw(p, gs, *, lr, b1, b2, eps, wd):
    """AdamW whose moments are coded between steps (Alg. 1); p is one group of up to 128 numbers."""
    m, v, out = np.zeros_like(p), np.zeros_like(p), []
    for t, g in enumerate(gs, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        u = m / ((np.sqrt(v) / np.sqrt(1 - b2**t) + eps) * (1 - b1**t))
        p = p - lr * (u + wd * p)
        m, v = decode(*encode(m)), decode(*encode(v))
        out.append(p)
    return out
