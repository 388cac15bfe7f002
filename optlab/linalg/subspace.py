"""Orthonormal bases of dominant subspaces, for matrices (..., a, b) and bases (..., a, r)."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

# A TPU compiles the eigenvectors of at most this many columns in 2 s; of 257 it takes 13 s, of
# 1024 three minutes.
MOST_COLUMNS = 256
# Columns that a TPU's QR takes at a time: QR of (1024, 1024) at once compiles in 13 s, a loop over
# panels of 128 columns in less than half, of 256 in as long as the whole.
_PANEL = 128


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return x y in full precision: a TPU's default would blur all but the largest directions."""
    return jnp.matmul(x, y, precision="highest")


def canonical(basis: jax.Array) -> jax.Array:
    """Return the basis with the largest entry of every vector positive."""
    largest = jnp.argmax(jnp.abs(basis), axis=-2, keepdims=True)
    return basis * jnp.where(jnp.take_along_axis(basis, largest, axis=-2) < 0, -1, 1)


def _through(x: jax.Array, q: jax.Array) -> jax.Array:
    """Return x x^T q for a power iteration.

    On a TPU in three passes of bfloat16 instead of six: products with (1024, 4096) compile in 4 s
    instead of 10. The subspace is the same in simulation: of (512, 2048) with singular values 1/i
    99.99 % of SVD's either way; 96 % and 98 % with one value 1e3 times the next.
    """

    # Rows throughout: a CPU takes 15 ms where x (x^T q) takes 21.
    def at(precision, x, q):
        y = jnp.matmul(q.mT, x, precision=precision)
        return jnp.matmul(y, x.mT, precision=precision).mT

    forms = {"tpu": partial(at, "high"), "default": partial(at, "highest")}
    return jax.lax.platform_dependent(x, q, **forms)


def orthonormal(x: jax.Array) -> jax.Array:
    """Return an orthonormal basis (..., a, l) of the columns of x, in their order.

    Where x is short of rank the basis is filled up: Householder's, unlike Cholesky's.
    """
    one = lambda y: jnp.linalg.qr(y)[0]  # noqa: E731
    narrow = x.shape[-1] <= MOST_COLUMNS
    if x.ndim == 2 and narrow:
        return one(x)
    # A TPU takes 25 s to compile a batch of 24 of (1024, 192), 3 s for a loop over it.
    stack = x.reshape(-1, *x.shape[-2:])
    loop = lambda y: jax.lax.map(one if narrow else in_panels, y)  # noqa: E731
    return jax.lax.platform_dependent(stack, tpu=loop, default=one).reshape(x.shape)


def in_panels(x: jax.Array, width: int = _PANEL) -> jax.Array:
    """Return Householder's basis of the columns of one matrix, found in a loop over its panels.

    The reflections of a panel are I - V T V^T with 1/T = diag(1/tau) + triu(V^T V, 1).
    """
    a, columns = x.shape
    panels = -(-columns // width)
    rows = jnp.arange(a)[:, None]

    def reflect(x, v, t):
        return x - product(v, product(t, product(v.mT, x)))

    def eliminate(x, i):
        top = i * width
        panel = jax.lax.dynamic_slice_in_dim(x, top, width, axis=1)
        # What is below earlier panels comes to the top: all panels have the same shape.
        below = jnp.roll(jnp.where(rows < top, 0, panel), -top, axis=0)
        h, tau = jnp.linalg.qr(below, mode="raw")
        v = jnp.roll(jnp.tril(h.mT, -1) + jnp.eye(a, width, dtype=x.dtype), top, axis=0)
        inverse = jnp.eye(width, dtype=x.dtype) + tau[:, None] * jnp.triu(product(v.mT, v), 1)
        t = solve_triangular(inverse, jnp.diag(tau))
        return reflect(x, v, t.mT), (v, t)

    wide = jnp.pad(x, ((0, 0), (0, panels * width - columns)))
    _, reflections = jax.lax.scan(eliminate, wide, jnp.arange(panels))
    basis = jnp.eye(a, wide.shape[1], dtype=x.dtype)
    basis, _ = jax.lax.scan(lambda q, vt: (reflect(q, *vt), None), basis, reflections, reverse=True)
    return basis[:, :columns]


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


def power_basis(
    x: jax.Array, start: jax.Array, rank: int, iterations: int | jax.Array
) -> jax.Array:
    """Return a basis near that of `svd_basis` by block power iteration from `start` (..., a, l).

    Q <- orthonormal(x x^T Q), and, if l > rank, the best `rank` directions within Q (Rayleigh and
    Ritz). With l = 1.5 rank two iterations from a basis ten steps old find 99.6 % to 100 % of the
    subspace for gradients of a GPT, and four from a random start all of it; with l = rank the share
    that lies closest to the cut, some 5 %, takes very many.
    """

    def iterate(_, q):
        return orthonormal(_through(x, q))

    q = jax.lax.fori_loop(0, iterations, iterate, start)
    if q.shape[-1] == rank:
        return q
    return product(q, _ritz(product(q.mT, x))[..., :rank])


def _ritz(y: jax.Array) -> jax.Array:
    """Return the left singular vectors of y (..., l, b), the largest first.

    Eigenvectors of y y^T mix where singular values are below 1e-3 of the largest, so those below
    1e-2 are found a second time, without the larger ones: with s_r = 1.4e-3 s_1 1.5 % of the
    subspace of 128 of 1024 directions was another than SVD's, now 0.01 %.
    """
    rows = y.shape[-2]
    apart = jnp.diag(4 - jnp.arange(rows, dtype=y.dtype) / rows)

    def again(turned, least):
        z = product(turned.mT, y)
        squares = jnp.sum(z * z, axis=-1, keepdims=True)
        done = squares > least * jnp.max(squares, axis=-2, keepdims=True)
        largest = jnp.max(jnp.where(done, 0, squares), axis=-2, keepdims=True)
        small = jnp.where(done, 0, z) / jnp.sqrt(jnp.where(largest > 0, largest, 1))
        # Those of the rest have eigenvalues of about 1 at most.
        gram = product(small, small.mT) + jnp.where(done, apart, 0)
        return product(turned, jnp.linalg.eigh(gram)[1][..., ::-1]), None

    # Of y's shape and, under `shard_map`, as different on every device as y is.
    same = jnp.eye(rows, dtype=y.dtype)
    start = jnp.where(y[..., :1] < 0, same, same)
    # A loop, so that the eigenvectors are compiled once.
    found, _ = jax.lax.scan(again, start, jnp.array([1.0, 1e-4], y.dtype))
    return found


def overlap(new: jax.Array, old: jax.Array) -> jax.Array:
    """Return the share of the subspace of `old` that lies in that of `new`, in [0, 1]."""
    return jnp.sum(product(new.mT, old) ** 2, axis=(-2, -1)) / new.shape[-1]
