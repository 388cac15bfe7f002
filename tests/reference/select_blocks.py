"""Block selection, arXiv:1712.08859 Sec. 3, with Adam inside as in arXiv:2404.02827, Alg. 1."""

import numpy as np


def _best(scores, k):
    """The k largest; ties go to the first."""
    return np.isin(np.arange(len(scores)), np.argsort(-np.asarray(scores), kind="stable")[:k])


def choose(g, turn, *, rule, k, blocks, bound=None, normalize=False):
    """Masks of the entries that move; a block is a list of leaves."""
    if rule == "top_k":
        scores = [np.abs(g[n]) / np.sqrt(bound[n] if bound else 1.0) for n in g]
        best = _best(np.concatenate([s.ravel() for s in scores]), k)
        parts = np.split(best, np.cumsum([s.size for s in scores])[:-1])
        return {n: part.reshape(g[n].shape) for n, part in zip(g, parts, strict=True)}
    number = len(blocks)
    if rule in ("ascending", "descending"):
        places = (turn * k + np.arange(k)) % number
        chosen = np.isin(np.arange(number), places if rule == "ascending" else number - 1 - places)
    else:
        weights = bound if rule == "gsd" else dict.fromkeys(g, 1.0)
        squares = [sum((g[n] ** 2 / weights[n]).sum() for n in block) for block in blocks]
        sizes = [sum(g[n].size for n in block) if normalize else 1 for block in blocks]
        constants = bound if rule == "gsl" else [1.0] * number
        chosen = _best(np.sqrt(squares) / np.sqrt(constants) / np.sqrt(sizes), k)
    moving = {n for block, yes in zip(blocks, chosen, strict=True) if yes for n in block}
    return {n: np.full(g[n].shape, n in moving) for n in g}


def select_blocks(params, grads, lr, *, every=1, inner_state="freeze", sign=0.0, **rule):
    """Adam moves what is chosen, `sign` times the sign of the gradient the rest."""
    p, out, (b1, b2, eps) = dict(params), [], (0.9, 0.999, 1e-8)
    m, v, t = (dict.fromkeys(p, 0.0), dict.fromkeys(p, 0.0), 0)
    for step, g in enumerate(grads):
        if step % every == 0:
            masks = choose(g, step // every, **rule)
            if inner_state == "restart":
                m, v, t = (dict.fromkeys(p, 0.0), dict.fromkeys(p, 0.0), 0)
        t += 1
        for n, mask in masks.items():
            moves = True if inner_state == "follow" else mask
            m[n] = np.where(moves, b1 * m[n] + (1 - b1) * g[n], m[n])
            v[n] = np.where(moves, b2 * v[n] + (1 - b2) * g[n] ** 2, v[n])
            u = m[n] / (1 - b1**t) / (np.sqrt(v[n] / (1 - b2**t)) + eps)
            p[n] = p[n] - lr * np.where(mask, u, sign * np.sign(g[n]))
        out.append((dict(p), masks))
    return out
