"""Orthogonalization by an odd polynomial iteration, and the exact polar factor."""

import numpy as np


def divisor(g, normalization):
    """|X| from G = X X^T, or a vector: AOL divides row i by its own number."""
    if normalization == "aol":  # arXiv:2208.03160, Theorem 1, as used by arXiv:2512.04632
        return np.sqrt(np.sum(np.abs(g), axis=1, keepdims=True))
    if normalization == "schatten":  # Gelfand: |(X X^T)^2|_2 <= |X X^T|_F^2, arXiv:2506.10935
        return np.sqrt(np.linalg.norm(g))
    return np.sqrt(np.trace(g))  # the Frobenius norm, arXiv:2505.16932, Alg. 1


def newton_schulz(x, table, *, normalization="frobenius", safety=1.0, eps=0.0, guard="add"):
    """X_0 = X / (safety |X| + eps), X_{k+1} = a X_k + b (X_k X_k^T) X_k + c (X_k X_k^T)^2 X_k.

    The iteration of arXiv:2505.16932, Alg. 1 (Muon's with the same row at every step); arXiv:
    2506.10935 has c = 0. On the short side: of a tall matrix the transpose. Stacks one by one.
    """
    given = {"normalization": normalization, "safety": safety, "eps": eps, "guard": guard}
    if x.ndim > 2:
        return np.stack([newton_schulz(one, table, **given) for one in x])
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T, table, **given).T
    x = np.asarray(x, np.float64)
    size = safety * divisor(x @ x.T, normalization)
    x = x / (size + eps if guard == "add" else np.maximum(size, eps))
    for a, b, c in table:
        g = x @ x.T
        x = a * x + b * (g @ x) + c * (g @ (g @ x))
    return x


def svd_polar(x, rank):
    """U V^T over the `rank` largest singular values."""
    u, _, vh = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return u[..., :rank] @ vh[..., :rank, :]
