"""Small problems over weights that are >= 0 and sum to one, as programs of fixed length."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

# Bases that `best_vertex` looks at: 21 for 3 weights, 330 for 5, 5005 for 7, 19448 for 8.
LARGEST_PROGRAM = 7


def _exact(fn: F) -> F:
    """Compile once per shape, and multiply in full precision where TPUs would take bfloat16."""

    @jax.jit
    @functools.wraps(fn)
    def wrapper(*args: jax.Array) -> Any:
        with jax.default_matmul_precision("highest"):
            return fn(*args)

    return wrapper  # type: ignore[return-value]


@_exact
def min_norm_weights(cosines: jax.Array, norms: jax.Array, usable: jax.Array) -> jax.Array:
    """Return w of argmin |sum_i w_i g_i|^2, w >= 0, sum w = 1, from cosines and norms of the g_i.

    Shapes (n, n), (n,), (n,); `usable` is False where w_i is to be 0. Two: the closed form, halves
    for equal vectors. More: exact, by an active set. A vector of norm 0 takes everything; NaN where
    nothing is usable. Errors are those of solving with the cosines: about 1e-6 over their smallest
    eigenvalue in float32.
    """
    n = len(norms)
    if n == 1:
        return jnp.where(usable, 1.0, jnp.nan).astype(norms.dtype)
    least = jnp.min(jnp.where(usable, norms, jnp.inf))
    weights = _of_two(cosines, norms) if n == 2 else _active_set(cosines, norms, least, usable)
    weights = jnp.where(least == 0, _first(usable & (norms == 0), norms), weights)
    weights = jnp.where(jnp.sum(usable) == 1, usable.astype(norms.dtype), weights)
    # Written out: XLA makes 0 of a sum of flags over their number where both are 0.
    return jnp.where(jnp.any(usable), weights, jnp.nan)


def _first(mask: jax.Array, like: jax.Array) -> jax.Array:
    """Return a weight of one at the first that is set."""
    return (jnp.cumsum(mask) * mask == 1).astype(like.dtype)


def _of_two(cosines: jax.Array, norms: jax.Array) -> jax.Array:
    p, q = norms / jnp.max(norms)
    inner = p * q * cosines[0, 1]
    # Both: the rounding of 1 - w, of a small w times a large gradient, is not small.
    pulls = jnp.maximum(jnp.stack([q**2 - inner, p**2 - inner]), 0)
    total = jnp.sum(pulls)
    return jnp.where(total > 0, pulls / jnp.where(total > 0, total, 1), 0.5)


def _active_set(
    cosines: jax.Array, norms: jax.Array, least: jax.Array, usable: jax.Array
) -> jax.Array:
    """Return the weights of three or more.

    min over y >= 0 of |sum_i y_i g_i|^2 + s^2 (sum_i y_i - 1)^2 has y = sigma w (Wolfe), a
    non-negative least squares problem. In units of x_i = y_i |g_i| and with s the smallest norm
    its matrix is the cosines plus r r^T, r_i = s/|g_i| in (0, 1]: gradients of all sizes fit.
    """
    both = usable[:, None] & usable[None, :]
    ratios = jnp.where(usable, least / jnp.where(norms > 0, norms, 1), 0)
    eye = jnp.eye(len(norms), dtype=norms.dtype)
    matrix = jnp.where(both, cosines + ratios[:, None] * ratios[None, :], eye)
    y = ratios * _nonnegative(matrix, ratios)
    return y / jnp.sum(y)


def _nonnegative(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return argmin x^T a x / 2 - b^T x over x >= 0 (Lawson and Hanson), in 4 n solves.

    A solve adds a variable or takes some out; of 31,000 random problems none needed over 2 n.
    """
    n, eye = len(b), jnp.eye(len(b), dtype=b.dtype)
    noise = 8 * n * jnp.finfo(b.dtype).eps

    def trip(_, carry):
        x, active, settled = carry
        slope = b - a @ x
        wanted = ~active & (slope > noise * (b + jnp.abs(a) @ x))
        best = _first(wanted & (slope == jnp.max(jnp.where(wanted, slope, -jnp.inf))), b) > 0
        active = active | (best & settled)
        inside = active[:, None] & active[None, :]
        z = jnp.linalg.solve(jnp.where(inside, a, eye), jnp.where(active, b, 0))
        bad = active & ~(z > 0)
        share = jnp.where(bad & (x > 0), x / jnp.where(bad, x - z, 1), jnp.where(bad, 0, jnp.inf))
        step = jnp.min(share)
        moved = jnp.where(jnp.isinf(step), z, x + jnp.minimum(step, 1) * (z - x))
        active = active & ~(bad & (share == step))
        return jnp.where(active, moved, 0), active, ~jnp.any(bad)

    # Of the data, that the carry varies over the devices of a shard_map as the results do.
    nothing = 0 * b
    return jax.lax.fori_loop(0, 4 * n, trip, (nothing, nothing > 0, nothing[0] == 0))[0]


@_exact
def best_vertex(
    objective: jax.Array, rows: jax.Array, bounds: jax.Array, usable: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return argmax objective . w over w >= 0, sum w = 1, rows w >= bounds; and whether one exists.

    Shapes (n,), (m, n), (m,), (n,): a bound of -inf is none, `usable` is False where w_i is 0. An
    optimum of a linear program is a vertex: all of them are solved for at once. Of several optima
    the first vertex; bounds are kept to 100 roundings of the largest entry of their row.
    """
    n, m = len(objective), len(bounds)
    size = jnp.max(jnp.abs(rows), axis=1)
    size = jnp.where(size > 0, size, 1)
    eye = jnp.eye(n, dtype=rows.dtype)
    rows = jnp.concatenate([eye, rows / size[:, None]])
    bounds = jnp.concatenate([jnp.zeros(n, rows.dtype), bounds / size])
    tight = np.asarray(list(itertools.combinations(range(n + m), n - 1)), int)
    tight = tight.reshape(-1, n - 1)
    # A row without a bound may hold anything: what is feasible may be found twice.
    ends = jnp.where(jnp.isfinite(bounds), bounds, 0)[tight]
    ones = jnp.ones_like(rows[:1])
    systems = jnp.concatenate([jnp.broadcast_to(ones, (len(tight), 1, n)), rows[tight]], axis=1)
    sides = jnp.concatenate([jnp.ones_like(ends, shape=(len(tight), 1)), ends], axis=1)
    found = jnp.linalg.solve(systems, sides[..., None])[..., 0]
    found = jnp.where(jnp.isfinite(found), found, -1)
    slack = 100 * jnp.finfo(rows.dtype).eps
    good = jnp.all(jnp.einsum("vn,rn->vr", found, rows) >= bounds[None] - slack, axis=1)
    good &= jnp.all(usable[None] | (found <= slack), axis=1) & (
        jnp.abs(found.sum(axis=1) - 1) <= slack
    )
    best = found[jnp.argmax(jnp.where(good, found @ objective, -jnp.inf))]
    best = jnp.where(usable, jnp.maximum(best, 0), 0)
    return best / jnp.sum(best), jnp.any(good)
