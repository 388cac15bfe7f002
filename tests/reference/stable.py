"""SPAM, arXiv:2501.06842, Alg. 1, and Stable-SPAM, arXiv:2502.17055, Alg. 1."""

import numpy as np


def rewarm(c, warmup):
    """Scale of the rate c steps after a reset."""
    return 1 - 0.99 * (1 + np.cos(np.pi * c / (warmup + 1))) / 2 if c < warmup else 1.0


def spam(
    p, gs, lrs, *, threshold, every, warmup, b1=0.9, b2=0.999, eps=1e-6, grace=0,
    restart_counts=False, weight_decay=0.0, official=False,
):  # fmt: skip
    """Alg. 1 with dense moments; an entry with v = 0 is not clipped."""
    m, v, n, out = np.zeros_like(p), np.zeros_like(p), 0, []
    for t, (g, lr) in enumerate(zip(gs, lrs, strict=True), start=1):
        if t % every == 0:
            m, v, n = np.zeros_like(p), np.zeros_like(p), 0 if restart_counts else n
        n += 1
        since = t % every + (t >= every)  # updates from zero moments, this one included
        active = t % every >= grace if official else since > grace
        spike = (g**2 > threshold * v) & (v > 0) & active
        g = np.where(spike, np.sign(g) * np.sqrt(threshold * v), g)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        c1, c2 = 1 - b1**n, 1 - b2**n
        scale = rewarm(t % every, warmup) if t >= every else 1.0
        if official:
            p = p - lr * scale * np.sqrt(c2) / c1 * m / (np.sqrt(v) + eps)
            p = (1 - lr * weight_decay) * p
        else:
            p = p - lr * (scale * m / c1 / (np.sqrt(v / c2) + eps) + weight_decay * p)
        out.append(p)
    return out


def stable_spam(
    p, gs, lrs, *, every, b1=0.9, b2=0.999, eps=1e-8, max_decay=0.999, norm_decay=0.7,
    square_decay=0.9, weight_decay=0.0, official=False, momentum_scale=lambda t: 1.0,
):  # fmt: skip
    """Alg. 1; `official`: one step count n for all, set to 1 at a reset that comes too late."""
    m, v, x, a, b, out = np.zeros_like(p), np.zeros_like(p), 0.0, 0.0, 0.0, []
    n = since = 0
    for t, (g, lr) in enumerate(zip(gs, lrs, strict=True), start=1):
        c, reset = momentum_scale(t - 1), t % every == 0
        n, since, p = n + 1, since + 1, p - lr * weight_decay * p
        top = np.abs(g).max()  # AdaClip
        x = max_decay * x + (1 - max_decay) * top
        level = x / (1 - max_decay**n)
        g = np.where(np.abs(g) > level, g / top * level, g)
        norm, g1 = np.sqrt((g**2).sum()), norm_decay * c  # AdaGN
        a = g1 * a + (1 - g1) * norm
        b = square_decay * b + (1 - square_decay) * norm**2
        g = g / norm * (a / (1 - g1**n)) / (np.sqrt(b / (1 - square_decay**n)) + eps)
        if reset:  # MoRet
            since = 1
            n = 1 if official else n
            if not official:
                m, v = np.zeros_like(p), np.zeros_like(p)
        m, v = b1 * c * m + (1 - b1 * c) * g, b2 * v + (1 - b2) * g * g
        first, second = m / (1 - (b1 * c) ** since), v / (1 - b2**since)
        p = p - lr * first / (np.sqrt(second) + eps)
        if reset and official:
            m, v = np.zeros_like(p), np.zeros_like(p)
        out.append(p)
    return out
