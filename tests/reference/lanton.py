"""LANTON, arXiv:2510.14009, Alg. 1; the formula of `a` is not confirmed by a primary source."""

import numpy as np

from reference.muon import polar
from reference.scion import lmo

DUALS = {
    "spectral": lambda d: np.sqrt(d.shape[1] / d.shape[0]) * np.linalg.norm(d, "nuc"),
    "sign": lambda d: np.sum(np.abs(d)) / d.shape[0],
    "max": lambda d: np.sum(np.abs(d)),
    "per_input": lambda d: np.sqrt(d.shape[1]) * np.sum(np.linalg.norm(d, axis=1)),
    "per_output": lambda d: np.sum(np.linalg.norm(d, axis=0)) / np.sqrt(d.shape[0]),
    "rms": lambda d: np.sqrt(d.size) * np.linalg.norm(d),
}


def lanton(
    ps, gs, lrs, *, norms, groups, b1, b2, alpha, exact, weight_decay
):  # fmt: skip
    """Run dictionaries of matrices (inputs, outputs); `weight_decay` is one too."""
    duals = DUALS if exact else DUALS | {
        "spectral": lambda d: np.sqrt(d.shape[1] / d.shape[0]) * np.sum(d * polar(d))
    }  # fmt: skip
    b, noise, before, out = dict.fromkeys(ps, 0), dict.fromkeys(ps, 0.0), None, []
    for g, lr in zip(gs, lrs, strict=True):
        for name in ps:
            b[name] = b1 * b[name] + (1 - b1) * g[name]
            if before is not None:
                dual = duals[norms[name]](g[name] - before[name])
                noise[name] = b2 * noise[name] + (1 - b2) * dual**2
        a = {name: alpha / np.sqrt(alpha**2 + noise[name]) for name in ps}
        for name in ps:
            most = max(a[other] for other in ps if groups[other] == groups[name])
            d = np.sqrt(a[name] / most) * lmo(norms[name], b[name])
            ps = ps | {name: ps[name] - lr * (d + weight_decay[name] * ps[name])}
        before = g
        out.append(ps)
    return out
