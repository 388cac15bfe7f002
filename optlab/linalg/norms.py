"""Norms, and division by them that is safe at zero."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Axes = int | tuple[int, ...] | None


def sum_of_squares(x: jax.Array, axis: Axes = None, *, keepdims: bool = False) -> jax.Array:
    """Return the sum of x^2 over `axis`."""
    return jnp.sum(x * x, axis=axis, keepdims=keepdims)


def frobenius(x: jax.Array, axis: Axes = None, *, keepdims: bool = False) -> jax.Array:
    """Return the Frobenius norm over `axis`; 0 for an empty array."""
    return jnp.sqrt(sum_of_squares(x, axis, keepdims=keepdims))


def largest(x: jax.Array) -> jax.Array:
    """Return max |x|; 0 for an empty array."""
    return jnp.max(jnp.abs(x), initial=0)


def safe_divide(x: ArrayLike, by: ArrayLike, at_zero: ArrayLike = 0.0) -> jax.Array:
    """Return x / by where `by` is not zero, else `at_zero`; differentiable on both sides."""
    nonzero = by != 0
    return jnp.where(nonzero, x / jnp.where(nonzero, by, 1), at_zero)
