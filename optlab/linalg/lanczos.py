"""Ritz values of a symmetric matrix that is known by its products; a thin use of matfree."""

import types
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Matvec = Callable[[jax.Array], jax.Array]


class Ritz(NamedTuple):
    """What m steps of Lanczos tell of a symmetric (n, n) matrix; all (m,), by rising value."""

    values: jax.Array  # eigenvalues of the tridiagonal matrix: the outer ones converge first
    weights: jax.Array  # squared first components of its eigenvectors; they sum to 1
    errors: jax.Array  # an eigenvalue lies within this of each value, rounding aside


def _decompositions() -> types.ModuleType:
    try:
        from matfree import decomp
    except ImportError:
        raise ImportError('lanczos: needs matfree. pip install "optlab[diagnostics]"') from None
    return decomp


def ritz(matvec: Matvec, start: jax.Array, steps: int) -> Ritz:
    """Run `steps` of Lanczos with full reorthogonalisation from `start`, (n,); at most n of them.

    A Q = Q T + r e^T, T = S diag(values) S^T tridiagonal; weights S[0]^2, errors |r| |S[-1]|.
    Of a random start the weights are the spectral density's, as in stochastic Lanczos quadrature.
    Keeps Q: steps n entries. Where start lies in an invariant subspace the iteration ends early:
    the values left over are copies of the first Rayleigh quotient and their weight is 0.
    """
    # Not its tridiag_sym: that averages the two off-diagonals, of which only the lower one, the
    # length of the next vector, is right after the subspace is exhausted.
    steps = min(steps, start.size)
    arnoldi = _decompositions().hessenberg(steps, reortho="full", custom_vjp=False)
    found = arnoldi(matvec, start)
    return _of_tridiagonal(found.J_small, jnp.linalg.norm(found.residual))


def _of_tridiagonal(hessenberg: jax.Array, residual: jax.Array) -> Ritz:
    diagonal = jnp.diagonal(hessenberg)
    below = jnp.append(jnp.diagonal(hessenberg, -1), residual)
    # A length of 0 makes all that follows NaN; one of rounding's size makes it arbitrary.
    finite = jnp.where(jnp.isfinite(hessenberg), jnp.abs(hessenberg), 0)
    least = 10 * jnp.finfo(diagonal.dtype).eps * jnp.max(finite)
    goes_on = jnp.cumprod(below > least).astype(bool)
    reached = jnp.append(True, goes_on[:-1])
    diagonal = jnp.where(reached, diagonal, diagonal[0])
    below = jnp.where(goes_on, below, 0)
    matrix = jnp.diag(diagonal) + jnp.diag(below[:-1], 1) + jnp.diag(below[:-1], -1)
    values, vectors = jnp.linalg.eigh(matrix)
    return Ritz(values, vectors[0] ** 2, below[-1] * jnp.abs(vectors[-1]))
