"""SGD-SaI, arXiv:2412.11768, Alg. 1."""

import numpy as np


def sgd_sai(params, grads, lrs, *, momentum, eps, weight_decay=None, official=False):
    """g-SNR of the first gradient, over its largest unless `official`; then momentum SGD."""
    p, first, out = dict(params), grads[0], []
    # One element has no deviation: such a leaf gets 1 instead of the released code's |g|/eps.
    spread = {k: first[k].std(ddof=1) if first[k].size > 1 else 0.0 for k in p}
    snr = {k: np.linalg.norm(first[k]) / (spread[k] + eps) if spread[k] else 1.0 for k in p}
    largest = 1.0 if official else max(snr.values())
    m, decay = dict(first), weight_decay or dict.fromkeys(p, 0.0)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True)):
        m = m if t == 0 else {k: momentum * m[k] + (1 - momentum) * g[k] for k in p}
        p = {k: p[k] * (1 - lr * decay[k]) - lr * snr[k] / largest * m[k] for k in p}
        out.append(p)
    return out
