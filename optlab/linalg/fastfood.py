"""Random maps from R^d to R^D that are drawn again from a key whenever they are needed.

Fastfood (Le, Sarlos and Smola, 2013): P z = s H diag(G) Pi H diag(B) z, with signs B, a permutation
Pi and normals G; or a dense matrix of normals. Each comes with its transpose.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A Hadamard matrix is a Kronecker product of parts: the first of 2^7 rows, as many as a TPU has
# numbers in a row, others of 2^5. Butterflies, parts of two rows, run as fast on a CPU but take
# three times as long to compile, there and for a TPU.
FIRST, OTHERS = 7, 5
# Entries of a dense map that are in memory at once.
CHUNK = 2**20


class Fastfood(NamedTuple):
    """What is random in one map from R^d to R^D, for L >= max(d, D), a power of two."""

    signs: jax.Array  # B, (L,): -1 or 1
    order: jax.Array  # Pi, (L,): (Pi x)_i = x[order_i]
    normals: jax.Array  # G, (L,)


def length(size: int, dim: int) -> int:
    """Return L, the least power of two that holds both sides of a map."""
    return 1 << (max(size, dim, 1) - 1).bit_length()


def hadamard(x: jax.Array) -> jax.Array:
    """Return H x/sqrt(L) over the last axis, whose length L is a power of two: its own inverse."""
    left = x.shape[-1].bit_length() - 1
    bits, height = min(FIRST, left), 1
    out = jnp.matmul(x.reshape(-1, 2**bits), _part(bits, x.dtype), precision="highest")
    while left := left - bits:
        height, bits = height << bits, min(OTHERS, left)
        out = out.reshape(-1, 2**bits, height)
        out = jnp.einsum("ij,ajb->aib", _part(bits, x.dtype), out, precision="highest")
    return out.reshape(x.shape)


def _part(bits: int, dtype: jnp.dtype) -> jax.Array:
    matrix = np.ones((1, 1))
    for _ in range(bits):
        matrix = np.kron(matrix, np.array([[1.0, 1.0], [1.0, -1.0]]))
    return jnp.asarray(matrix / math.sqrt(2**bits), dtype)


def permutation(constants: jax.Array, bits: int) -> jax.Array:
    """Return a permutation of the numbers of that many bits, each computed by itself.

    For every row (a, c) of uint32 `constants`, x <- (a | 1) x + c mod L, then x <- x xor (x >> half
    the bits): both can be undone. A uniform draw sorts: 5.9 s for 2^23 numbers on a CPU, 60 times a
    transform.
    """
    x = jnp.arange(2**bits, dtype=jnp.uint32)
    for factor, shift in constants:
        x = (x * (factor | 1) + shift) & np.uint32(2**bits - 1)
        x = x ^ (x >> np.uint32(max(1, (bits + 1) // 2)))
    return x.astype(jnp.int32)


def _normals(bits: jax.Array) -> jax.Array:
    """Return normals from the first 23 bits of uint32 numbers, never infinite."""
    odd = 2 * (bits >> 9).astype(jnp.int32) + (1 - 2**23)
    return math.sqrt(2) * jax.scipy.special.erfinv(odd.astype(jnp.float32) / 2**23)


def draw(key: jax.Array, length: int, dtype: jnp.dtype) -> Fastfood:
    """Return the random parts of a map, the same for every dtype.

    All come from one call of the generator, which takes most of the time to compile; the first
    eight of its words make the permutation too. A few words more than L, a power of two, would take
    a TPU's compiler four times as long.
    """
    words = jax.random.bits(key, (length,), jnp.uint32)
    signs = 1 - 2 * (words & 1).astype(jnp.int32)
    order = permutation(jnp.resize(words[:8], (4, 2)), length.bit_length() - 1)
    return Fastfood(signs.astype(dtype), order, _normals(words).astype(dtype))


def _weights(parts: Fastfood) -> jax.Array:
    """Return sqrt(L) G/|G|: the scale for which every column of S has norm 1."""
    return parts.normals * (math.sqrt(parts.normals.size) / jnp.linalg.norm(parts.normals))


def expand(parts: Fastfood, z: jax.Array) -> jax.Array:
    """Return S z, of L entries: P z = sqrt(L/D) times the first D of them, as `cut` takes."""
    x = parts.signs * jnp.pad(z, (0, parts.signs.size - z.size))
    return hadamard(_weights(parts) * hadamard(x)[parts.order])


def project(parts: Fastfood, x: jax.Array, dim: int) -> jax.Array:
    """Return S^T x, of `dim` entries: the steps of `expand`, each transposed, backwards."""
    y = _weights(parts) * hadamard(x)
    y = jnp.zeros_like(y).at[parts.order].set(y, unique_indices=True)
    return (parts.signs * hadamard(y))[:dim]


def cut(x: jax.Array, size: int) -> jax.Array:
    """Return sqrt(L/D) times the first D = `size` >= 1 of L numbers."""
    return math.sqrt(x.size / size) * x[:size]


def fill(x: jax.Array, length: int) -> jax.Array:
    """Return the transpose of `cut`: sqrt(L/D) times D numbers, and zeros."""
    return jnp.pad(math.sqrt(length / x.size) * x, (0, length - x.size))


def _chunks(size: int, dim: int) -> tuple[int, int]:
    """Return the number of chunks of a (size, dim) matrix, and rows in each."""
    rows = max(1, min(size, CHUNK // dim))
    return -(-size // rows), rows


def _chunk(key: jax.Array, index: jax.Array, shape: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    normals = jax.random.normal(jax.random.fold_in(key, index), shape, jnp.float32)
    return normals.astype(dtype)


def _each(one: Callable[[Any], Any], chunks: Any) -> Any:
    """Return `one` of every chunk, one after the other; a single one costs no loop."""
    if len(jax.tree.leaves(chunks)[0]) == 1:
        return jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], chunks)))
    return jax.lax.map(one, chunks)


def expand_dense(key: jax.Array, z: jax.Array, size: int) -> jax.Array:
    """Return A z for a (size, d) matrix A of normals, of which one chunk is in memory at a time."""
    count, rows = _chunks(size, z.shape[0])

    def one(index):
        chunk = _chunk(key, index, (rows, z.shape[0]), z.dtype)
        return jnp.matmul(chunk, z, precision="highest")

    return _each(one, jnp.arange(count)).ravel()[:size]


def project_dense(key: jax.Array, x: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """Return A^T x, and the squared norms of the columns of A."""
    size = x.shape[0]
    count, rows = _chunks(size, dim)
    pieces = jnp.pad(x, (0, count * rows - size)).reshape(count, rows)

    def one(numbered):
        index, piece = numbered
        inside = index * rows + jnp.arange(rows) < size
        chunk = jnp.where(inside[:, None], _chunk(key, index, (rows, dim), x.dtype), 0)
        return jnp.matmul(piece, chunk, precision="highest"), jnp.sum(chunk**2, 0)

    products, squares = _each(one, (jnp.arange(count), pieces))
    return products.sum(0), squares.sum(0)


def dense(key: jax.Array, size: int, dim: int, dtype: jnp.dtype) -> jax.Array:
    """Return that matrix A itself."""
    count, rows = _chunks(size, dim)
    chunks = jax.vmap(lambda index: _chunk(key, index, (rows, dim), dtype))(jnp.arange(count))
    return chunks.reshape(-1, dim)[:size]
