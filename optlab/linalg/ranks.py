"""Ranks of matrices from their singular values (WeLore), and the factors of that rank."""

import bisect
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def normalized_spectrum(x: jax.Array) -> np.ndarray:
    """Return (s - min s)/(max s - min s) of (..., m, n) on the host, float64, from 1 down to 0.

    A constant spectrum, up to the rounding of the decomposition, is 1 everywhere: nothing in it is
    smaller than the rest.
    """
    values = jnp.linalg.svd(x, compute_uv=False)
    # On the host, where y / y is 1: XLA's quotient fell short of it, and the largest was dropped.
    s = np.asarray(values, np.float64)
    low, high = s[..., -1:], s[..., :1]
    constant = high - low <= max(x.shape[-2:]) * float(jnp.finfo(values.dtype).eps) * high
    return np.where(constant, 1.0, (s - low) / np.where(constant, 1.0, high - low))


def kept_rank(spectra: np.ndarray, threshold: float) -> int:
    """Return how many values reach the threshold, in the matrix of (..., short) that has most."""
    return int(np.max(np.sum(spectra >= threshold, axis=-1)))


def reduction_of(spectra: Sequence[np.ndarray], threshold: float) -> float:
    """Return the share of all ranks that is dropped; a stack of matrices keeps one rank."""
    full = kept = 0
    for one in spectra:
        layers = math.prod(one.shape[:-1])
        full, kept = full + layers * one.shape[-1], kept + layers * kept_rank(one, threshold)
    return 1 - kept / full if full else 0.0


def threshold_for(spectra: Sequence[np.ndarray], reduction: float) -> float | None:
    """Return the least threshold that drops at least this share of ranks; None: 1 does not.

    The share is a step function of the threshold. Steps are at the values; between two of them any
    threshold does the same, and the middle is the least sensitive to their rounding.
    """
    values = np.unique(np.concatenate([np.ravel(s) for s in spectra]))
    candidates = [0.0, *((values[:-1] + values[1:]) / 2).tolist()]
    # 1e-12: the share is a quotient, 1 - 5/10 must reach a half.
    at = bisect.bisect_left(candidates, reduction - 1e-12, key=lambda t: reduction_of(spectra, t))
    return candidates[at] if at < len(candidates) else None


def factorize(matrix: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Return the factors (..., m, k) and (..., k, n) of the best approximation of rank k.

    U_k sqrt(S_k) and sqrt(S_k) V_k^T, in the dtype of the matrix: WeLore trains both of them
    instead of the matrix. Together k (m + n) numbers, fewer than m n below k = m n/(m + n).

    Args:
        matrix: (..., m, n).
        k: 1 to min(m, n).

    Returns:
        The two factors.

    Example:
        >>> import jax.numpy as jnp, optlab
        >>> left, right = optlab.factorize(jnp.array([[4.0, 0.0], [0.0, 1.0]]), 1)
        >>> print(left @ right)
        [[4. 0.]
         [0. 0.]]

    References:
        Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from
        Low-Rank Gradients", arXiv:2407.11239, 2024; VITA-Group/welore@f69f015c.
    """
    matrix = jnp.asarray(matrix)
    if matrix.ndim < 2 or not 1 <= k <= min(matrix.shape[-2:]):
        raise ValueError(
            f"factorize: k must be a whole number from 1 to min(m, n), got k={k} for a matrix of "
            f"shape {matrix.shape}. Take it from rank_by_energy(params).ranks."
        )
    wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    u, s, vt = jnp.linalg.svd(wide, full_matrices=False)
    root = jnp.sqrt(s[..., :k])
    left, right = u[..., :k] * root[..., None, :], root[..., None] * vt[..., :k, :]
    return left.astype(matrix.dtype), right.astype(matrix.dtype)
