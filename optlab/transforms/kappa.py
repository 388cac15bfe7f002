"""(Sub)gradients of convex functions, for Lion-K: data for `apply_kappa`.

Each is a function of one float leaf. Lion-K with decoupled weight decay w solves
min f(x) + kappa*(w x)/w, kappa* the conjugate; the docstrings name the constraint this sets on x.
The rule, l1 and lp are confirmed by the paper (arXiv:2310.05898); the other rows follow by
differentiating kappa, its table was not at hand.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from optlab import _checks
from optlab.linalg import norms, polar

Kappa = Callable[[jax.Array], jax.Array]


def l1(c: jax.Array) -> jax.Array:
    """Differentiate kappa = |c|_1: sign(c). Holds |x|_inf <= 1/w. This is Lion."""
    return jnp.sign(c)


def l2(c: jax.Array) -> jax.Array:
    """Differentiate kappa = |c|_2: c/|c|_2, 0 at 0. Holds |x|_2 <= 1/w."""
    return norms.safe_divide(c, norms.frobenius(c))


def quadratic(c: jax.Array) -> jax.Array:
    """Differentiate kappa = |c|^2/2: c itself; momentum descent with weight decay."""
    return c


def nuclear(c: jax.Array) -> jax.Array:
    """Differentiate kappa = nuclear norm: U V^T of the last two axes. Holds |x|_spectral <= 1/w.

    Leading axes are a batch; a vector or scalar is one column, whose factor is c/|c|_2.
    """
    return l2(c) if c.ndim < 2 else polar.svd_polar(c)


def lp(p: float) -> Kappa:
    """Differentiate kappa = |c|_p, p > 1: sign(c) |c|^(p-1) / |c|_p^(p-1), 0 at 0.

    Holds |x|_q <= 1/w, 1/p + 1/q = 1.
    """
    _checks.check_range("kappa.lp", "a number > 1", lambda x: 1 < x < float("inf"), p=p)

    def gradient(c: jax.Array) -> jax.Array:
        # Divided by the largest entry first, |c|^p neither overflows nor vanishes.
        scaled = norms.safe_divide(jnp.abs(c), norms.largest(c))
        norm = jnp.sum(scaled**p) ** (1 / p)
        return jnp.sign(c) * norms.safe_divide(scaled, norm) ** (p - 1)

    return gradient


def huber(e: float) -> Kappa:
    """Differentiate kappa = sum of Huber functions of width e > 0: clip(c/e, -1, 1).

    Adds (e/2)|x|^2 to l1's box.
    """
    _checks.check_positive("kappa.huber", e=e)
    return lambda c: jnp.clip(c / e, -1, 1)


def dead_zone(e: float) -> Kappa:
    """Differentiate kappa = sum max(|c| - e, 0), e >= 0: sign(c) where |c| > e, else 0.

    Adds e|x|_1 to l1's box.
    """
    _checks.check_nonnegative("kappa.dead_zone", e=e)
    return lambda c: jnp.where(jnp.abs(c) > e, jnp.sign(c), 0)


def top_k(k: int) -> Kappa:
    """Differentiate kappa = sum of the k largest |c|: sign(c) on them, else 0.

    Holds |x|_1 <= k/w within l1's box.
    Ties go to the lower index; a leaf of at most k entries is l1's.
    """
    _checks.check_steps("kappa.top_k", 1, k=k)

    def gradient(c: jax.Array) -> jax.Array:
        if c.size <= k:
            return jnp.sign(c)
        _, chosen = jax.lax.top_k(jnp.abs(c).reshape(-1), k)
        keep = jnp.zeros(c.size, bool).at[chosen].set(True).reshape(c.shape)
        return jnp.where(keep, jnp.sign(c), 0)

    return gradient


def smooth_sign(s: float = 1.0) -> Kappa:
    """Differentiate kappa = s sum log cosh(c/s), s > 0: tanh(c/s), nearly linear below s."""
    _checks.check_positive("kappa.smooth_sign", s=s)
    return lambda c: jnp.tanh(c / s)


by_name: dict[str, Kappa] = {
    "l1": l1,
    "l2": l2,
    "quadratic": quadratic,
    "nuclear": nuclear,
}


def resolve(name: str, kappa: Kappa | str) -> Kappa:
    """Return the function meant by a name or a function, or refuse it."""
    if callable(kappa):
        return kappa
    if not isinstance(kappa, str):
        must = "a name or a function of one leaf"
        raise _checks.refusal(TypeError, name, "kappa", must, kappa)
    if kappa not in by_name:
        must = f"one of {', '.join(map(repr, by_name))} or a function of one leaf"
        fix = " Of optlab.kappa, call lp(p), huber(e), dead_zone(e), top_k(k) or smooth_sign(s)."
        raise _checks.refusal(ValueError, name, "kappa", must, kappa, fix)
    return by_name[kappa]
