"""Updates held to a set: projected Adam (arXiv:2501.01230, Sec. 4), masked AdamW (2312.15230)."""

import numpy as np


def project(u, basis, *, away, side):
    """P = U U^T from the left of (inputs, outputs) for "rows", from the right for "cols"."""
    p = basis @ basis.T
    inside = p @ u if side == "rows" else u @ p
    return u - inside if away else inside


def adam(p, gs, lr, *, before=None, after=None, decay=0.0, kept=None, b1=0.9, b2=0.999, eps=1e-8):
    """AdamW whose gradients go through `before`, whose steps through `after`; zeros are kept."""
    m, v, out = np.zeros_like(p), np.zeros_like(p), []
    for t, g in enumerate(gs, start=1):
        g = before(g) if before else g
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        u = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * p
        p = p - lr * (after(u) if after else u)
        p = p if kept is None else p * kept
        out.append(p)
    return out


def shared_basis(taus, k):
    """The first k left vectors of the tasks' first int(min/N), of matrices (outputs, inputs)."""
    q = min(taus[0].shape) // len(taus)
    firsts = [np.linalg.svd(tau)[0][:, :q] for tau in taus]
    return np.linalg.svd(np.concatenate(firsts, axis=1))[0][:, :k]
