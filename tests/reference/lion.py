"""Lion, arXiv:2302.06675, and Lion-K, arXiv:2310.05898; signSGD and Signum, arXiv:1802.04434."""

import numpy as np


def lion_k(p, gs, lrs, *, kappa, b1, b2, weight_decay=0.0):
    """Lion-K eq. 2 (with m for minus the paper's m); Lion's Alg. 2 is kappa = sign."""
    m, out = np.zeros_like(p), []
    for g, lr in zip(gs, lrs, strict=True):
        c = b1 * m + (1 - b1) * g
        p = p - lr * (kappa(c) + weight_decay * p)
        m = b2 * m + (1 - b2) * g
        out.append(p)
    return out


def signum(p, gs, lrs, *, momentum, weight_decay=0.0):
    """signSGD's Alg. 2 on one worker: m = beta m + (1 - beta) g, x = x - lr sign(m)."""
    m, out = np.zeros_like(p), []
    for g, lr in zip(gs, lrs, strict=True):
        m = momentum * m + (1 - momentum) * g
        p = (1 - lr * weight_decay) * p - lr * np.sign(m)
        out.append(p)
    return out
