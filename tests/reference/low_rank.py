"""Adam in a subspace: GaLore, Fira, APOLLO, FRUGAL, Q-GaLore, Conda, LDAdam, on one matrix (a, b).

The side of a is projected. A basis (a, r) comes from `find(g, t)`, whose g is what the method
looks at in step t, from 0; None for "the basis of before".
"""

import numpy as np


def singular(rank):
    """Return `find`: the first left singular vectors, the largest entry of each positive."""

    def find(g, t):
        del t
        return canonical(np.linalg.svd(g, full_matrices=False)[0][:, :rank])

    return find


def canonical(basis):
    largest = np.argmax(np.abs(basis), axis=0)
    return basis * np.sign(basis[largest, np.arange(basis.shape[1])])


def every(steps, find):
    """Return `find` at the multiples of a number of steps."""
    return lambda g, t: find(g, t) if t % steps == 0 else None


def galore(p, gs, lrs, find, *, scale, b1, b2, eps, weight_decay=0.0, rest=None):
    """arXiv:2403.03507, Alg. 2, as released; with `rest(g, B, R, N)`, Fira's and APOLLO's part."""
    m, v, basis, out = 0, 0, None, []
    for t, (g, lr) in enumerate(zip(gs, lrs, strict=True)):
        found = find(g, t)
        basis = basis if found is None else found
        r = basis.T @ g
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
        n = m / (np.sqrt(v) + eps)
        u = scale * basis @ n + (rest(g, basis, r, n) if rest else 0)
        p = p - lr * np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1)) * u
        p = p - lr * weight_decay * p
        out.append(p)
    return out


def scaled_rest(inside, *, per="column", limit=lambda s: s, eps=1e-8):
    """Fira, arXiv:2410.01623, eq. 7 and 8: psi (G - inside B R); of APOLLO with inside = 0."""

    def rest(g, basis, r, n):
        axis = 0 if per == "column" else None
        psi = np.linalg.norm(n, axis=axis) / (np.linalg.norm(r, axis=axis) + eps)
        return limit(psi * (g - inside * basis @ r))

    return rest


def growth_limit(growth, eps=1e-8):
    """Fira, eq. 9, as released: a norm is at most `growth` times the one before."""
    last = []

    def limit(s):
        most = growth * (last[-1] + eps) if last else np.inf
        s = s * min(1, most / np.linalg.norm(s))
        last.append(np.linalg.norm(s))
        return s

    return limit


def frugal(p, gs, lrs, find, *, factor, b1, b2, eps, weight_decay=0.0):
    """arXiv:2411.07837, Alg. 1: Adam starts anew with every basis; signs of what is left out."""
    m, v, steps, basis, out = 0, 0, 0, None, []
    for t, (g, lr) in enumerate(zip(gs, lrs, strict=True)):
        found = find(g, t)
        if found is not None:
            basis, m, v, steps = found, 0, 0, 0
        r, steps = basis.T @ g, steps + 1
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
        n = (m / (1 - b1**steps)) / (np.sqrt(v / (1 - b2**steps)) + eps)
        left = g - basis @ r
        left = np.where(np.abs(left) > 1e-6 * np.abs(g), left, 0)
        p = p - lr * (basis @ n + factor * np.sign(left) + weight_decay * p)
        out.append(p)
    return out


def adam(p, gs, lrs, find, *, scale, b1, b2, eps, weight_decay=0.0):
    """Q-GaLore, arXiv:2407.08296: Adam with corrected moments in the basis, decoupled decay."""
    m, v, basis, out = 0, 0, None, []
    for t, (g, lr) in enumerate(zip(gs, lrs, strict=True), start=1):
        found = find(g, t - 1)
        basis = basis if found is None else found
        r = basis.T @ g
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
        n = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        p = p - lr * (scale * basis @ n + weight_decay * p)
        out.append(p)
    return out


def lazily(steps, find, *, queue, threshold, growth):
    """Q-GaLore's interval: longer with every basis while the last ones overlap with their former.

    Here the overlap is that of the subspaces, |B_new^T B_old|^2/r, not of their first vectors.
    """
    known, shares, interval = [], [], [steps]

    def lazy(g, t):
        if t % interval[0]:
            return None
        known.append(find(g, t))
        if len(known) > 1:
            shares.append(np.sum((known[-1].T @ known[-2]) ** 2) / known[-1].shape[1])
            if len(shares) >= queue and np.mean(shares[-queue:]) >= threshold:
                interval[0] = int(growth * interval[0])
        return known[-1]

    return lazy


def rounded(basis, bits, block):
    """Q-GaLore's integers: vector after vector, in blocks with a scale and a zero point each.

    As released but for the range of a block, which takes zero in.
    """
    flat = np.ravel(basis.T)
    rows = np.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    low, high = (np.minimum(rows.min(1), 0)[:, None], np.maximum(rows.max(1), 0)[:, None])
    scale = np.maximum(high - low, 1e-5) / (2**bits - 1)
    zero = np.clip(-np.round(low / scale), 0, 2**bits - 1)
    codes = np.clip(np.round(rows / scale) + zero, 0, 2**bits - 1)
    values = scale * (codes - zero)
    return np.ravel(values)[: flat.size].reshape(basis.T.shape).T


def conda(p, gs, lrs, find, *, scale, b1, b2, eps, weight_decay=0.0):
    """arXiv:2509.24218, as released: the basis of the momentum; only v is in coordinates."""
    m, v, basis, out = 0, 0, None, []
    for t, (g, lr) in enumerate(zip(gs, lrs, strict=True)):
        m = b1 * m + (1 - b1) * g
        found = find(m, t)
        basis = basis if found is None else found
        v = b2 * v + (1 - b2) * (basis.T @ g) ** 2
        n = basis.T @ m / (np.sqrt(v) + eps)
        correction = np.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        p = p - lr * correction * scale * basis @ n
        p = p - lr * weight_decay * p
        out.append(p)
    return out


def ldadam(p, gs, lrs, *, rank, rho, feedback, b1, b2, eps, weight_decay=0.0):
    """arXiv:2410.16103, Alg. 1, as released: a power step each time, moments turned, errors fed."""
    m, v, e, basis, out = 0, 0, 0, None, []
    for t, (g, lr) in enumerate(zip(gs, lrs, strict=True)):
        g, old = g + e, basis
        if t == 0:
            basis, turned, lost = singular(rank)(g, t), 0, 0
        else:
            c1, c2 = 1 - b1**t, 1 - b2**t
            target = rho * (old @ m) / c1 + (1 - rho) * g
            basis = np.linalg.qr(target @ (target.T @ old))[0]
            c = basis.T @ old
            turned = c @ m
            v = c2 * np.abs((c * c) @ (v / c2 - (m / c1) ** 2) + (turned / c1) ** 2)
            lost = old @ m - basis @ turned
        r = basis.T @ g
        e = (g - basis @ r + b1 / (1 - b1) * lost) if feedback else 0
        m, v = b1 * turned + (1 - b1) * r, b2 * v + (1 - b2) * r * r
        n = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
        p = p - lr * (basis @ n + weight_decay * p)
        out.append(p)
    return out
