"""Orthonormal bases of dominant subspaces, for matrices (..., a, b) and bases (..., a, r)."""

import jax
import jax.numpy as jnp

# A TPU compiles the eigenvectors of at most this many columns in 2 s; of 257 it takes 13 s, of
# 1024 three minutes.
MOST_COLUMNS = 256


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return x y in full precision: a TPU's default would blur all but the largest directions."""
    return jnp.matmul(x, y, precision="highest")


def canonical(basis: jax.Array) -> jax.Array:
    """Return the basis with the largest entry of every vector positive."""
    largest = jnp.argmax(jnp.abs(basis), axis=-2, keepdims=True)
    return basis * jnp.where(jnp.take_along_axis(basis, largest, axis=-2) < 0, -1, 1)


def orthonormal(x: jax.Array) -> jax.Array:
    """Return an orthonormal basis (..., a, l) of the columns of x, in their order.

    Where x is short of rank the basis is filled up: Householder's, unlike Cholesky's.
    """
    one = lambda y: jnp.linalg.qr(y)[0]  # noqa: E731
    if x.ndim == 2:
        return one(x)
    # A TPU takes 25 s to compile a batch of 24 of (1024, 192), 3 s for a loop over it.
    stack = x.reshape(-1, *x.shape[-2:])
    q = jax.lax.platform_dependent(stack, tpu=lambda y: jax.lax.map(one, y), default=one)
    return q.reshape(x.shape)


def svd_basis(x: jax.Array, rank: int) -> jax.Array:
    """Return the left singular vectors of the `rank` largest singular values."""
    return jnp.linalg.svd(x, full_matrices=False)[0][..., :rank]


def sampled_basis(x: jax.Array, rank: int, key: jax.Array) -> jax.Array:
    """Return left singular vectors drawn without replacement, by their singular values (SARA).

    The `rank` largest of log s + Gumbel noise are such a draw; in the order of their values.
    """
    u, s, _ = jnp.linalg.svd(x, full_matrices=False)
    tiny = jnp.finfo(s.dtype).tiny
    score = jnp.log(jnp.maximum(s, tiny)) + jax.random.gumbel(key, s.shape, s.dtype)
    chosen = jnp.sort(jax.lax.top_k(score, rank)[1], axis=-1)
    return jnp.take_along_axis(u, chosen[..., None, :], axis=-1)


def power_basis(x: jax.Array, start: jax.Array, rank: int, iterations: int) -> jax.Array:
    """Return a basis near that of `svd_basis` by block power iteration from `start` (..., a, l).

    Q <- orthonormal(x x^T Q), and, if l > rank, the best `rank` directions within Q (Rayleigh and
    Ritz). With l = 1.5 rank two iterations from a random start find 99.3 % to 99.9 % of the
    subspace for gradients of a GPT; with l = rank the share that lies closest to the cut, some
    5 %, takes very many.
    """

    def iterate(_, q):
        return orthonormal(product(x, product(x.mT, q)))

    q = jax.lax.fori_loop(0, iterations, iterate, start)
    if q.shape[-1] == rank:
        return q
    y = product(x.mT, q)
    ritz = jnp.linalg.eigh(product(y.mT, y))[1][..., ::-1]
    return product(q, ritz[..., :rank])


def overlap(new: jax.Array, old: jax.Array) -> jax.Array:
    """Return the share of the subspace of `old` that lies in that of `new`, in [0, 1]."""
    return jnp.sum(product(new.mT, old) ** 2, axis=(-2, -1)) / new.shape[-1]
