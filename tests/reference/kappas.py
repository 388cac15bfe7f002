"""Subgradients of the kappas of Lion-K, arXiv:2310.05898, of one leaf each."""

import numpy as np


def l2(c):
    norm = np.linalg.norm(c)
    return c / norm if norm else np.zeros_like(c)


def lp(c, p):
    norm = np.sum(np.abs(c) ** p) ** (1 / p)
    return np.sign(c) * np.abs(c) ** (p - 1) / norm ** (p - 1) if norm else np.zeros_like(c)


def nuclear(c):
    """U V^T over the last two axes; a vector is one column."""
    if c.ndim < 2:
        return l2(c)
    u, s, vt = np.linalg.svd(c, full_matrices=False)
    return (u * (s > 1e-9 * s[..., :1])[..., None, :]) @ vt


def huber(c, e):
    return np.where(np.abs(c) <= e, c / e, np.sign(c))


def dead_zone(c, e):
    return np.array(np.sign(c) * (np.abs(c) > e))


def top_k(c, k):
    chosen = np.argsort(-np.abs(c).ravel(), kind="stable")[:k]
    out = np.zeros(c.size)
    out[chosen] = np.sign(c).ravel()[chosen]
    return out.reshape(c.shape)


def smooth_sign(c, s):
    return np.tanh(c / s)


KAPPAS = {
    "l1": np.sign,
    "l2": l2,
    "quadratic": lambda c: c,
    "nuclear": nuclear,
    "lp": lp,
    "huber": huber,
    "dead_zone": dead_zone,
    "top_k": top_k,
    "smooth_sign": smooth_sign,
}
