"""diffGrad, arXiv:1909.11015, eq. 9-11."""

import numpy as np


def diffgrad(
    p, gs, lrs, *, b1, b2, eps, eps_root=0.0, weight_decay=0.0, decoupled=False, official=False,
    amsgrad=False,
):  # fmt: skip
    """Eq. 11; `official`: eps beside the uncorrected root, as in diffGrad_v2.py."""
    m, v, v_max, previous = (np.zeros_like(p) for _ in range(4))
    out = []
    for t, (g, lr) in enumerate(zip(gs, lrs, strict=True), start=1):
        g = g if decoupled else g + weight_decay * p
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        v_max = np.maximum(v_max, v)
        second = v_max if amsgrad else v
        xi = 1 / (1 + np.exp(-np.abs(previous - g)))  # eq. 9
        c1, c2 = 1 - b1**t, 1 - b2**t
        if official:
            step = np.sqrt(c2) / c1 * xi * m / (np.sqrt(second + eps_root) + eps)
        else:
            step = xi * (m / c1) / (np.sqrt(second / c2 + eps_root) + eps)
        p = p * (1 - lr * weight_decay if decoupled else 1) - lr * step
        previous = g
        out.append(p)
    return out
