"""LARS, arXiv:1708.03888, Alg. 1, and the forms of its ports."""

import numpy as np


def lars(
    p, gs, lrs, *, momentum, trust_coefficient, weight_decay=0.0, eps=0.0, nesterov=False,
    norm="sum_of", zero_norm_ratio=None, lr_in_momentum=True, larc=False, adapts=True,
):  # fmt: skip
    """Alg. 1: lambda = eta |w|/(|g| + beta |w|), v = m v + gamma lambda (g + beta w), w = w - v."""
    v, out = np.zeros_like(p), []
    for g, lr in zip(gs, lrs, strict=True):
        total, size = g + weight_decay * p, np.linalg.norm(p)
        moving = np.linalg.norm(g) if norm == "sum_of" else np.linalg.norm(total)
        divisor = moving + (weight_decay * size if norm == "sum_of" else 0) + eps
        ratio = trust_coefficient if zero_norm_ratio is None else zero_norm_ratio
        if size > 0 and moving > 0:
            ratio = trust_coefficient * size / divisor
        ratio = ratio if adapts else 1.0
        if larc:  # LARC: the local rate is min(lambda, gamma)
            ratio, lr = (min(ratio, lr) if adapts else 1.0), 1.0
        inside = lr if lr_in_momentum or larc else 1.0
        v = momentum * v + inside * ratio * total
        step = inside * ratio * total + momentum * v if nesterov else v
        p = p - (1.0 if lr_in_momentum or larc else lr) * step
        out.append(p)
    return out
