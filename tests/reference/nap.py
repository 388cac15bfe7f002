"""Normalize-and-Project, arXiv:2407.01800, on Adam (arXiv:1412.6980, Alg. 1)."""

import numpy as np


def nap(p, gs, lrs, *, b1, b2, eps, every_k=1, held=True):
    """After every k-th step of Adam, W <- rho W/|W|_F with rho = |W_0|_F."""
    m, v, rho, out = np.zeros_like(p), np.zeros_like(p), np.linalg.norm(p), []
    for t, (g, lr) in enumerate(zip(gs, lrs, strict=True), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - lr * m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        if held and rho > 0 and t % every_k == 0:
            p = rho * p / np.linalg.norm(p)
        out.append(p)
    return out
