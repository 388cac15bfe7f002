"""NorMuon, arXiv:2510.05491, Alg. 1, and the released code's form."""

import numpy as np

from reference.muon import SCALES, momentum, polar


def normuon(
    p, gs, lrs, *, b1, b2, eps=1e-10, rms=0.2, scale=None, nesterov=True, weight_decay=0.0
):  # fmt: skip
    """p is (inputs, outputs): a neuron is a column. With a scale the norm of O is kept."""
    v, out = 0, []
    for u, lr in zip(momentum(gs, b1, "ema", nesterov), lrs, strict=True):
        o = polar(u)
        v = b2 * v + (1 - b2) * np.mean(o**2, axis=0)
        d = o / (np.sqrt(v) + eps)
        if scale is None:
            d = rms * np.sqrt(d.size) / np.linalg.norm(d) * d
        else:
            d = SCALES[scale](*p.shape) * np.linalg.norm(o) / (np.linalg.norm(d) + eps) * d
        p = p - lr * (d + weight_decay * p)
        out.append(p)
    return out
