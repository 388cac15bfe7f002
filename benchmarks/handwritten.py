"""The recipes written by hand: the fastest form of the same mathematics that was found.

Each is one function of a leaf, with every constant in it, as one would write it for one model. What
they do not have: schedules, masks, dtypes, checks, composition.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.methods import KAPPAS, RATE, WEIGHT_DECAY


class Handwritten(NamedTuple):
    """An optimizer in two functions: `init(params)`, `step(params, state, grads)`."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]


def _zeros(params: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, params)


class _At(NamedTuple):
    """Where a leaf function is: the number of the step, from 1, and what leaf it has."""

    count: jax.Array
    embedding: bool


def _leafwise(leaf: Callable[..., tuple], slots: int) -> Handwritten:
    """Build an optimizer from `leaf(at, p, g, *slots) -> p, *slots`."""

    def init(params: Any) -> Any:
        return jnp.zeros([], jnp.int32), *(_zeros(params) for _ in range(slots))

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        count = state[0] + 1
        flat, structure = jax.tree_util.tree_flatten_with_path(params)
        columns = [jax.tree.leaves(tree) for tree in (params, grads, *state[1:])]
        new = [
            leaf(_At(count, "embedding" in str(path)), *row)
            for (path, _), *row in zip(flat, *columns, strict=True)
        ]
        new = [jax.tree.unflatten(structure, column) for column in zip(*new, strict=True)]
        return new[0], (count, *new[1:])

    return Handwritten(init, step)


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x))


def _corrections(count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the factors of the moments: one division each, not one for every entry."""
    return 1 / (1 - 0.9**count), -1 / jnp.expm1(count * jnp.log1p(-0.001))


def _adam(at, g, mu, nu):
    c1, c2 = _corrections(at.count)
    mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g * g
    return c1 * mu / (jnp.sqrt(c2 * nu) + 1e-8), mu, nu


def lion(at, p, g, mu, kappa=jnp.sign):
    """Read the new average in place of the old one, and XLA overwrites it in place."""
    mu = 0.99 * mu + 0.01 * g
    u = (0.9 / 0.99) * mu + (1 - 0.9 / 0.99) * g
    return p - RATE * (kappa(u) + WEIGHT_DECAY * p), mu


def signum(at, p, g, mu):
    mu = 0.9 * mu + 0.1 * g
    return p - RATE * (jnp.sign(mu) + WEIGHT_DECAY * p), mu


def diffgrad(at, p, g, mu, nu, previous):
    """Let the memory depend on the new weights, and XLA reads it before it is overwritten."""
    friction = jax.nn.sigmoid(jnp.abs(previous - g))
    u, mu, nu = _adam(at, g, mu, nu)
    p = p - RATE * (friction * u + WEIGHT_DECAY * p)
    return p, mu, nu, jnp.where(jnp.isfinite(p), g, 0)


def adabelief(at, p, g, mu, nu):
    c1, c2 = _corrections(at.count)
    mu = 0.9 * mu + 0.1 * g
    nu = 0.999 * nu + (0.001 * (g - mu) ** 2 + 1e-16)
    u = c1 * mu / (jnp.sqrt(c2 * nu) + 1e-16)
    return p - RATE * (u + WEIGHT_DECAY * p), mu, nu


def lars(at, p, g, mu):
    of_p, of_g = _norm(p), _norm(g)
    safe = jnp.where(of_g > 0, of_g + WEIGHT_DECAY * of_p, 1)
    ratio = jnp.where((of_p > 0) & (of_g > 0), RATE * of_p / safe, RATE)
    mu = 0.9 * mu - RATE * ratio * (g + WEIGHT_DECAY * p)
    return p + mu, mu


def lamb(at, p, g, mu, nu):
    c1, c2 = _corrections(at.count)
    mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g * g
    d = c1 * mu / (jnp.sqrt(c2 * nu) + 1e-6) + WEIGHT_DECAY * p
    of_p, of_d = _norm(p), _norm(d)
    ratio = jnp.where((of_p > 0) & (of_d > 0), of_p / jnp.where(of_d > 0, of_d, 1), 1)
    return p - RATE * ratio * d, mu, nu


def allora(at, p, g):
    if p.ndim < 2:
        return (p - RATE * g,)
    rows = jnp.sqrt(jnp.sum(p * p, 1 if at.embedding else 0, keepdims=True))
    return (p - RATE * g / jnp.sqrt(rows + 0.25),)


def _without_radial(p, g, u, *, channels: int):
    """AdamP's test and projection; returns the direction and the share of decay."""
    pairs = ((g, p), (g, g), (p, p), (p, u))
    gp, gg, pp, pu = (jnp.sum(a * b, 1 - channels, keepdims=True) for a, b in pairs)
    cosine = jnp.abs(gp) / jnp.maximum(jnp.sqrt(gg) * jnp.sqrt(pp), 1e-8)
    by_channel = jnp.max(cosine) < 0.1 / p.shape[1 - channels] ** 0.5
    gp, gg, all_pp, all_pu = (jnp.sum(x, channels, keepdims=True) for x in (gp, gg, pp, pu))
    whole = jnp.abs(gp) / jnp.maximum(jnp.sqrt(gg) * jnp.sqrt(all_pp), 1e-8) < 0.1 / p.size**0.5
    of_matrix = jnp.where(whole, all_pu / (jnp.sqrt(all_pp) + 1e-8) ** 2, 0)
    c = jnp.where(by_channel, pu / (jnp.sqrt(pp) + 1e-8) ** 2, of_matrix)
    return u - c * p, jnp.where(by_channel | whole, 0.1, 1.0)


def _project(at, p, g, u, decay):
    if p.ndim < 2:
        return u + decay * p
    u, share = _without_radial(p, g, u, channels=0 if at.embedding else 1)
    return u + decay * share * p


def adamp(at, p, g, mu, nu):
    u, mu, nu = _adam(at, g, mu, nu)
    return p - RATE * _project(at, p, g, u, WEIGHT_DECAY), mu, nu


def sgdp(at, p, g, mu):
    mu = 0.9 * mu + g
    return p - RATE * _project(at, p, g, mu, WEIGHT_DECAY / (1 - 0.9)), mu


def _adagrad_norm() -> Handwritten:
    def step(params, state, grads):
        total = state + sum(jnp.sum(g * g) for g in jax.tree.leaves(grads))
        inverse = jnp.where(total > 0, jax.lax.rsqrt(total), 0)
        move = lambda p, g: p - RATE * (g * inverse + WEIGHT_DECAY * p)  # noqa: E731
        return jax.tree.map(move, params, grads), total

    return Handwritten(lambda params: jnp.full([], 0.1**2, jnp.float32), step)


def _sgd_sai() -> Handwritten:
    def snr(g):
        mean = jnp.mean(g)
        std = jnp.sqrt(jnp.sum((g - mean) ** 2) / max(g.size - 1, 1))
        return jnp.where(std > 0, _norm(g) / (std + 1e-8), 1)

    def measure(grads):
        found = jnp.stack([snr(g) for g in jax.tree.leaves(grads)])
        return found / jnp.max(found)

    def init(params):
        leaves = len(jax.tree.leaves(params))
        return jnp.zeros([], jnp.int32), jnp.zeros(leaves), _zeros(params)

    def step(params, state, grads):
        count, found, mu = state
        found = jax.lax.cond(count == 0, measure, lambda _: found, grads)
        keep = jnp.where(count == 0, 0.0, 0.9)
        structure = jax.tree.structure(params)
        factors = jax.tree.unflatten(structure, list(found))
        average = lambda m, g, f: keep * m + (1 - keep) * (f * g)  # noqa: E731
        mu = jax.tree.map(average, mu, grads, factors)
        params = jax.tree.map(lambda p, m: p - RATE * (m + WEIGHT_DECAY * p), params, mu)
        return params, (count + 1, found, mu)

    return Handwritten(init, step)


def _nap(*, in_place: bool) -> Handwritten:
    """In place, the weights become p + u before they are scaled, which no update can ask for.

    As an update p + u needs a buffer of its own, and p is read again.
    """
    adam = _leafwise(
        lambda at, p, g, mu, nu: (p - RATE * (u := _adam(at, g, mu, nu))[0], *u[1:]), 2
    )

    def norms(params):
        return jax.tree.map(lambda p: _norm(p) if p.ndim > 1 else jnp.zeros([]), params)

    def hold(p, rho):
        if p.ndim < 2:
            return p
        factor = rho / jnp.where((norm := _norm(p)) > 0, norm, 1)
        return jnp.where(factor > 0, factor, 1) * p

    def step(params, state, grads):
        rho, inner = state
        moved, inner = adam.step(params, inner, grads)
        if in_place:
            return jax.tree.map(hold, moved, rho), (rho, inner)
        updates = jax.tree.map(lambda p, new, rho: hold(new, rho) - p, params, moved, rho)
        return jax.tree.map(jnp.add, params, updates), (rho, inner)

    return Handwritten(lambda params: (norms(params), adam.init(params)), step)


BY_NAME: dict[str, Handwritten] = {
    "adabelief": _leafwise(adabelief, 2),
    "adagrad_norm": _adagrad_norm(),
    "adamp": _leafwise(adamp, 2),
    "allora": _leafwise(allora, 0),
    "diffgrad": _leafwise(diffgrad, 3),
    "lamb": _leafwise(lamb, 2),
    "lars": _leafwise(lars, 1),
    "lion": _leafwise(lion, 1),
    "lion_k": _leafwise(lion, 1),
    "nap": _nap(in_place=False),
    "sgd_sai": _sgd_sai(),
    "sgdp": _leafwise(sgdp, 1),
    "signum": _leafwise(signum, 1),
} | {name: _leafwise(functools.partial(lion, kappa=k), 1) for name, k in KAPPAS.items()}

# Forms that an optax transformation cannot take; they count as yardsticks all the same.
IN_PLACE: dict[str, Handwritten] = {"nap": _nap(in_place=True)}
