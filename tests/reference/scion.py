"""Scion, arXiv:2502.07529, Alg. 1 and 2 with the LMOs of Table 2.

A matrix is (inputs, outputs) = (m, n), the transpose of the paper's; a vector is (1, n).
"""

import numpy as np

from reference.muon import SCALES, polar

EPS = 1e-8


def lmo(norm, g, *, polar=polar, scale="spectral", eps=EPS):
    """Return the point of the unit ball that is furthest along g: the paper's, times -1."""
    m, n = g.shape
    if norm == "spectral":
        return SCALES[scale](m, n) * polar(g)
    if norm in ("sign", "max"):
        return np.sign(g) / (m if norm == "sign" else 1)
    size = {
        "per_input": np.linalg.norm(g, axis=1, keepdims=True) / np.sqrt(n),
        "per_output": np.linalg.norm(g, axis=0, keepdims=True) * np.sqrt(m),
        "rms": np.linalg.norm(g) / np.sqrt(g.size),
    }[norm]
    return g / (size + eps)


def scion(p, gs, lrs, *, b1, norm, radius, constrained=True):
    m, out = 0, []
    for g, lr in zip(gs, lrs, strict=True):
        m = b1 * m + (1 - b1) * g  # alpha = 1 - b1
        p = (1 - lr if constrained else 1) * p - lr * radius * lmo(norm, m)
        out.append(p)
    return out
