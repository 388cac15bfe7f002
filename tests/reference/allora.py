"""ALLoRA, arXiv:2410.09692."""

import numpy as np


def allora(p, gs, lrs, *, eta, inputs, base=None, after_base=True):
    """g_i = g_i/sqrt(|w_i| + 1/eta^2) for every output row i, before or after a base rule."""
    base, out = base or (lambda g: g), []
    for g, lr in zip(gs, lrs, strict=True):
        factor = 1.0
        if inputs is not None:
            factor = (np.sqrt(np.sum(p * p, inputs, keepdims=True)) + 1 / eta**2) ** -0.5
        p = p - lr * (factor * base(g) if after_base else base(factor * g))
        out.append(p)
    return out
