"""Muon and its kin written by hand: one matrix after the other, each in its cheaper form.

On two cores products of stacks of 24 take 1.15 times as long: one matrix of width 256 stays in the
cache. A loop in Python is as fast as `lax.map`, and a program twice as long.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.handwritten import Handwritten
from benchmarks.methods import RATE, WEIGHT_DECAY

Leaves = dict[str, jax.Array]
A, B, C = 3.4445, -4.7750, 2.0315


def _is_matrix(path: str) -> bool:
    return "kernel" in path


def _by_path(tree: Any) -> Leaves:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def _from_leaves(
    leaf: Callable[..., tuple],
    prepare: Callable[..., Any],
    *slots: Callable[[str, jax.Array], jax.Array],
) -> Handwritten:
    """Build an optimizer from `leaf(path, shared, p, g, *slots) -> p, *slots`.

    `prepare(count, grads, *slots) -> shared` sees all leaves; count is that of the step, from 1.
    A slot begins as zeros of its function (path, p).
    """

    def init(params: Any) -> Any:
        leaves = _by_path(params)
        return jnp.zeros([], jnp.int32), *(
            {path: slot(path, p) for path, p in leaves.items()} for slot in slots
        )

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        count, columns = state[0] + 1, (_by_path(params), _by_path(grads), *state[1:])
        shared = prepare(count, *columns[1:])
        new = {p: leaf(p, shared, *(column[p] for column in columns)) for p in columns[0]}
        moved = jax.tree.unflatten(jax.tree.structure(params), [row[0] for row in new.values()])
        kept = ({p: row[i] for p, row in new.items()} for i in range(1, 1 + len(slots)))
        return moved, (count, *kept)

    return Handwritten(init, step)


def _like(path: str, p: jax.Array) -> jax.Array:
    return jnp.zeros_like(p)


def _adam_only(path: str, p: jax.Array) -> jax.Array:
    return jnp.zeros([]) if _is_matrix(path) else jnp.zeros_like(p)


def _neurons(path: str, p: jax.Array) -> jax.Array:
    return jnp.zeros(p.shape[1]) if _is_matrix(path) else jnp.zeros_like(p)


def _gram(x: jax.Array) -> jax.Array:
    return x.T @ x if x.shape[0] > x.shape[1] else x @ x.T


def _times(q: jax.Array, x: jax.Array) -> jax.Array:
    return x @ q if x.shape[0] > x.shape[1] else q @ x


def _normalizer(g: jax.Array) -> jax.Array:
    return 1 / (jnp.sqrt(jnp.trace(g)) + 1e-7)


def _direct(x: jax.Array) -> jax.Array:
    g = _gram(x)
    scale = _normalizer(g)
    x, g = scale * x, scale * scale * g
    for k in range(5):
        g = _gram(x) if k else g
        x = A * x + _times(B * g + C * (g @ g), x)
    return x


def _in_gram_form(x: jax.Array) -> jax.Array:
    eye = jnp.eye(min(x.shape))
    polynomial = lambda r: B * r + C * (r @ r) + A * eye  # noqa: E731
    for steps in (2, 3):  # a restart: in one go the Gram matrix drifts from that of x
        r, scale = _gram(x), 1.0
        if steps == 2:
            scale = _normalizer(r)
            r = scale * scale * r
        q = z = polynomial(r)
        for _ in range(steps - 1):
            r = z @ r @ z
            z = polynomial(r)
            q = q @ z
        x = _times(scale * q, x)
    return x


def _polar(matrices: Leaves) -> Leaves:
    """Orthogonalize all matrices, those of one shape in one loop."""
    out: Leaves = {}
    for shape in {x.shape: None for x in matrices.values()}:
        paths = [path for path, x in matrices.items() if x.shape == shape]
        form = _direct if shape[0] == shape[1] else _in_gram_form
        found = jax.lax.map(form, jnp.stack([matrices[path] for path in paths]))
        out |= zip(paths, found, strict=True)
    return out


def _move(p: jax.Array, rate: float, u: jax.Array, decay: float = WEIGHT_DECAY) -> jax.Array:
    return p - rate * (u + decay * p)


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(x * x))


def _adamw(rate: float, count: jax.Array, p, g, mu, nu):
    mu, nu = 0.9 * mu + 0.1 * g, 0.95 * nu + 0.05 * g * g
    c1, c2 = 1 / (1 - 0.9**count), 1 / (1 - 0.95**count)
    return _move(p, rate, c1 * mu / (jnp.sqrt(c2 * nu) + 1e-10)), mu, nu


def _looking_ahead(count, grads, mu, nu):
    """Return the count, the new momentum, and the orthogonalized mix of both that Muon takes."""
    del nu
    mu = {path: 0.95 * mu[path] + 0.05 * g for path, g in grads.items() if _is_matrix(path)}
    return count, mu, _polar({path: 0.95 * m + 0.05 * grads[path] for path, m in mu.items()})


def _muon(path, shared, p, g, mu, nu):
    count, new, o = shared
    if not _is_matrix(path):
        return _adamw(0.015 * RATE, count, p, g, mu, nu)
    return _move(p, RATE, max(1, p.shape[1] / p.shape[0]) ** 0.5 * o[path]), new[path], nu


def _normuon(path, shared, p, g, mu, nu):
    count, new, o = shared
    if not _is_matrix(path):
        return _adamw(RATE, count, p, g, mu, nu)
    nu = 0.95 * nu + 0.05 * jnp.mean(o[path] ** 2, 0)
    u = o[path] / (jnp.sqrt(nu) + 1e-10)
    return _move(p, RATE, 0.2 * u / _rms(u)), new[path], nu


def _spectral(shape: tuple[int, ...]) -> float:
    return math.sqrt(shape[1] / shape[0])


def _direction(path: str, m: jax.Array, o: Leaves) -> jax.Array:
    """Return the furthest point of the unit ball of a leaf."""
    if _is_matrix(path):
        return _spectral(m.shape) * o[path]
    return jnp.sign(m) / m.shape[-1] if "embedding" in path else m / (_rms(m) + 1e-8)


def _averaged(b1: float, grads: Leaves, mu: Leaves) -> tuple[Leaves, Leaves]:
    mu = {path: b1 * mu[path] + (1 - b1) * g for path, g in grads.items()}
    return mu, _polar({path: m for path, m in mu.items() if _is_matrix(path)})


def _scion(path, shared, p, g, mu):
    del g, mu
    new, o = shared
    radius = 50.0 if _is_matrix(path) else 3000.0 if "embedding" in path else 1.0
    return _move(p, RATE, radius * _direction(path, new[path], o), 1.0), new[path]


def _group(path: str) -> str:
    return "matrix" if _is_matrix(path) else "embedding" if "embedding" in path else "vector"


def _groups(leaves: Leaves) -> dict[str, list[str]]:
    """Return the paths of the leaves whose noise is compared."""
    found: dict[str, list[str]] = {}
    for path in leaves:
        found.setdefault(_group(path), []).append(path)
    return found


def _dual_norms(grads: Leaves, previous: Leaves) -> Leaves:
    """Return that of the change of every gradient."""
    change = {path: g - previous[path] for path, g in grads.items()}
    o = _polar({path: d for path, d in change.items() if _is_matrix(path)})
    return {path: jnp.sum(d * _direction(path, d, o)) for path, d in change.items()}


def _lanton() -> Handwritten:
    """Keep the noise of a group in one vector: as one number per leaf it took twice as long."""

    def init(params: Any) -> Any:
        leaves = _by_path(params)
        zeros = {path: jnp.zeros_like(p) for path, p in leaves.items()}
        noise = {group: jnp.zeros(len(paths)) for group, paths in _groups(leaves).items()}
        return jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.copy, zeros), noise

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        count, mu, previous, noise = state
        leaves, grads = _by_path(params), _by_path(grads)
        dual, new, factors = _dual_norms(grads, previous), {}, {}
        for group, paths in _groups(leaves).items():
            seen = jnp.stack([dual[path] for path in paths]) ** 2
            h = jnp.where(count > 0, 0.9 * noise[group] + 0.1 * seen, noise[group])
            new[group] = h
            factors |= zip(paths, jnp.sqrt(jnp.sqrt(jnp.min(1 + h) / (1 + h))), strict=True)
        mu, o = _averaged(0.95, grads, mu)
        moved = [
            _move(p, RATE, factors[path] * _direction(path, mu[path], o))
            for path, p in leaves.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(params), moved), (count + 1, mu, grads, new)

    return Handwritten(init, step)


BY_NAME: dict[str, Handwritten] = {
    "lanton": _lanton(),
    "muon": _from_leaves(_muon, _looking_ahead, _like, _adam_only),
    "normuon": _from_leaves(_normuon, _looking_ahead, _like, _neurons),
    "scion": _from_leaves(_scion, lambda count, grads, mu: _averaged(0.9, grads, mu), _like),
}
