"""AdamP (Alg. 2) and SGDP (Alg. 1), arXiv:2006.08217."""

import math

import numpy as np


def project(p, g, u, *, inputs, delta, wd_ratio, eps, log=None):
    """Eq. 11-12: by channel (all axes but the channels' are `inputs`), else by layer."""
    if inputs is None:
        return u, 1.0
    for view, axes in (("channel", inputs), ("layer", tuple(range(p.ndim)))):

        def dot(x, y, axes=axes):
            return np.sum(x * y, axes, keepdims=True)

        norms = np.sqrt(dot(g, g) * dot(p, p))
        cosine = np.abs(dot(g, p)) / np.maximum(norms, eps)
        if np.max(cosine) < delta / math.sqrt(math.prod(p.shape[a] for a in axes)):
            n = p / (np.sqrt(dot(p, p)) + eps)
            if log is not None:
                log.append(view)
            return u - n * dot(n, u), wd_ratio
    if log is not None:
        log.append("none")
    return u, 1.0


def adamp(p, gs, lrs, *, b1, b2, weight_decay=0.0, eps=1e-8, nesterov=False, **projection):
    """Alg. 2; Nesterov as in the released code, under the same bias correction."""
    m, v, out = np.zeros_like(p), np.zeros_like(p), []
    for t, (g, lr) in enumerate(zip(gs, lrs, strict=True), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        ahead = b1 * m + (1 - b1) * g if nesterov else m
        u = ahead / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        u, ratio = project(p, g, u, eps=eps, **projection)
        p = p * (1 - lr * weight_decay * ratio) - lr * u
        out.append(p)
    return out


def sgdp(
    p, gs, lrs, *, momentum, dampening=0.0, nesterov=False, official=False, weight_decay=0.0,
    eps=1e-8, **projection,
):  # fmt: skip
    """Alg. 1; `official`: the released code projects its buffer in place, unless nesterov."""
    m, out = np.zeros_like(p), []
    for g, lr in zip(gs, lrs, strict=True):
        m = momentum * m + (1 - dampening) * g
        u = g + momentum * m if nesterov else m
        u, ratio = project(p, g, u, eps=eps, **projection)
        m = u if official and not nesterov else m
        p = p * (1 - lr * weight_decay * ratio / (1 - momentum)) - lr * u
        out.append(p)
    return out
