"""AdaGrad-Norm, arXiv:1806.01811, Alg. 1."""

import numpy as np


def adagrad_norm(params, grads, lrs, *, b0, per_leaf=False, weight_decay=None):
    """b_{j+1}^2 = b_j^2 + |G_j|^2, x = x - eta/b_{j+1} G_j; one b for all leaves, or one each."""
    p, out = dict(params), []
    squares = dict.fromkeys(p, b0**2)
    for g, lr in zip(grads, lrs, strict=True):
        new = {k: np.sum(g[k] ** 2) for k in p}
        squares = {k: squares[k] + (new[k] if per_leaf else sum(new.values())) for k in p}
        decay = weight_decay or dict.fromkeys(p, 0.0)
        p = {k: p[k] - lr * (g[k] / np.sqrt(squares[k]) + decay[k] * p[k]) for k in p}
        out.append(p)
    return out
