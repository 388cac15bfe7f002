"""Muon (Jordan 2024; Moonlight, arXiv:2502.16982). A matrix is (inputs, outputs) = (m, n)."""

import numpy as np

from reference.polar import newton_schulz

KELLER = ((3.4445, -4.7750, 2.0315),) * 5
SCALES = {
    "keller": lambda m, n: np.sqrt(max(1, n / m)),
    "moonlight": lambda m, n: 0.2 * np.sqrt(max(m, n)),
    "spectral": lambda m, n: np.sqrt(n / m),
}


def momentum(gs, b1, form="ema", nesterov=True):
    """Yield what is orthogonalized: average, sum or bias-corrected average."""
    mu = 0
    for t, g in enumerate(gs, start=1):
        share = 1 if form == "sum" else 1 - b1
        mu = b1 * mu + share * g
        if form == "debiased":
            now, ahead = 1 - b1**t, 1 - b1 ** (t + 1)
            yield b1 * mu / ahead + share * g / now if nesterov else mu / now
        else:
            yield b1 * mu + share * g if nesterov else mu


def polar(u):
    return newton_schulz(u, KELLER, eps=1e-7)


def muon(
    p, gs, lrs, *, b1, form="ema", nesterov=True, scale="keller", weight_decay=0.0, cautious=False
):  # fmt: skip
    out = []
    for u, lr in zip(momentum(gs, b1, form, nesterov), lrs, strict=True):
        d = SCALES[scale](*p.shape) * polar(u)
        decay = weight_decay * p * (p * d >= 0 if cautious else 1)
        p = p - lr * (d + decay)
        out.append(p)
    return out
