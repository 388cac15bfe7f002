"""LAMB, arXiv:1904.00962, Alg. 2."""

import numpy as np


def lamb(
    p, gs, lrs, *, b1, b2, eps, weight_decay=0.0, phi=None, max_ratio=np.inf, adapts=True,
    bias_correction=True,
):  # fmt: skip
    """x = x - eta phi(|x|)/|r + lambda x| (r + lambda x), r = m_hat/(sqrt(v_hat) + eps)."""
    m, v, out = np.zeros_like(p), np.zeros_like(p), []
    for t, (g, lr) in enumerate(zip(gs, lrs, strict=True), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        c1, c2 = (1 - b1**t, 1 - b2**t) if bias_correction else (1.0, 1.0)
        d = m / c1 / (np.sqrt(v / c2) + eps) + weight_decay * p
        size, length = np.linalg.norm(p), np.linalg.norm(d)
        ratio = 1.0
        if size > 0 and length > 0:
            ratio = (size if phi is None else min(max(size, phi[0]), phi[1])) / length
        p = p - lr * (min(ratio, max_ratio) if adapts else 1.0) * d
        out.append(p)
    return out
