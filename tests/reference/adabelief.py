"""AdaBelief, arXiv:2010.07468, Alg. 2, with the switches of the authors' code 0.2.1."""

import numpy as np


def adabelief(
    p, gs, lrs, *, b1, b2, eps, eps_root=None, accumulate_eps=True, weight_decay=0.0,
    decoupled=True, amsgrad=False, rectify=False,
):  # fmt: skip
    """Alg. 2; rectify is RAdam's (arXiv:1908.03265, Alg. 2) with the code's threshold of 5."""
    root = eps if eps_root is None else eps_root
    m, s, s_max, out = np.zeros_like(p), np.zeros_like(p), np.zeros_like(p), []
    n_inf = 2 / (1 - b2) - 1
    for t, (g, lr) in enumerate(zip(gs, lrs, strict=True), start=1):
        g = g if decoupled else g + weight_decay * p
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + (root if accumulate_eps else 0)
        s_max = np.maximum(s_max, s)
        c1, c2 = 1 - b1**t, 1 - b2**t
        n = n_inf - 2 * t * b2**t / c2
        once = 0 if accumulate_eps else root
        if not rectify:
            step = m / c1 / (np.sqrt((s_max if amsgrad else s) / c2 + once) + eps)
        elif n >= 5:
            r = np.sqrt(c2 * (n - 4) * (n - 2) * n_inf / ((n_inf - 4) * (n_inf - 2) * n))
            step = r / c1 * m / (np.sqrt(s + once * c2) + eps)
        else:
            step = m / c1
        p = p * (1 - lr * weight_decay if decoupled else 1) - lr * step
        out.append(p)
    return out
