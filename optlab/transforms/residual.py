"""What `in_low_rank` does with the part of a gradient that its subspace leaves out."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks
from optlab.linalg.norms import frobenius

Axes = tuple[int, ...]


class Residual(NamedTuple):
    """A rule for the residual of one leaf, and a transformation of all residuals.

    `rule(g, part, low, new, axes, matrix)` returns what is added to the leaf's update: from the
    gradient, its part inside the subspace, its coordinates before and after the inner
    transformation, the projected axes, along which coordinates lie, and all axes of one matrix.
    `then` sees the residuals of all projected leaves, the others masked.
    """

    rule: Callable[..., jax.Array]
    then: optax.GradientTransformation = optax.identity()


@_checks.explain_calls
def column_scaled_residual(
    *,
    inside: ArrayLike = 1.0,
    eps: ArrayLike = 1e-8,
    per: str = "column",
    then: optax.GradientTransformation | None = None,
) -> Residual:
    """Scale the residual as the inner transformation scaled the coordinates (Fira, APOLLO).

    S = psi (G - inside P P^T G),  psi_j = |N_j|/(|R_j| + eps), where R_j are the coordinates of one
    slice of the side that is not projected, and N_j what the inner transformation made of them.

    Args:
      inside: how much of the part inside the subspace is taken out; Fira's released code takes its
        `scale`, APOLLO 0.
      eps: guards the division, > 0.
      per: "column" for one factor per slice, "matrix" for one of all. (static)
      then: run on the residuals, as `norm_growth_limiter()`.

    Returns:
      A handler for `in_low_rank(residual=...)`.

    Example:
      >>> import optax, optlab
      >>> residual = optlab.column_scaled_residual(then=optlab.norm_growth_limiter())
      >>> tx = optlab.in_low_rank(optax.scale_by_adam(), rank=64, residual=residual)

    References:
      Chen et al., Fira, arXiv:2410.01623, 2024; Zhu et al., APOLLO, arXiv:2412.05270, 2024.
    """
    name = "column_scaled_residual"
    _checks.check_nonnegative(name, inside=inside)
    _checks.check_positive(name, eps=eps)
    _checks.check_choice(name, "per", per, ("column", "matrix"))
    if then is not None:
        _checks.check_transform(name, "then", then)

    def rule(g, part, low, new, axes, matrix):
        along = axes if per == "column" else matrix
        after, before = (frobenius(x, along, keepdims=True) for x in (new, low))
        # A slice without a gradient has no size to compare with.
        psi = jnp.where(before > 0, after / (before + eps), 0)
        # Python's 0 spares the product that `part` is.
        return psi * (g if isinstance(inside, int | float) and inside == 0 else g - inside * part)

    return Residual(rule, optax.identity() if then is None else then)


@_checks.explain_calls
def sign_residual(factor: ArrayLike = 1.0) -> Residual:
    """Add `factor` times the sign of the residual (FRUGAL).

    Args:
      factor: size of the entries, >= 0.

    Returns:
      A handler for `in_low_rank(residual=...)`. An entry that is a rounding of the gradient's has
      no sign.

    Example:
      >>> import optax, optlab
      >>> tx = optlab.in_low_rank(
      ...     optax.scale_by_adam(), rank=0.25, residual=optlab.sign_residual()
      ... )

    References:
      Zmushko et al., FRUGAL, arXiv:2411.07837, 2024.
    """
    _checks.check_nonnegative("sign_residual", factor=factor)

    def rule(g, part, low, new, axes, matrix):
        del low, new, axes, matrix
        left = g - part
        noise = 4 * jnp.finfo(left.dtype).eps * jnp.abs(g)
        return jnp.multiply(factor, jnp.where(jnp.abs(left) > noise, jnp.sign(left), 0))

    return Residual(rule)


@_checks.explain_calls
def plain_residual(factor: ArrayLike = 1.0) -> Residual:
    """Add `factor` times the residual itself: gradient descent outside the subspace (FRUGAL).

    Args:
      factor: >= 0.

    Returns:
      A handler for `in_low_rank(residual=...)`.

    Example:
      >>> import optax, optlab
      >>> tx = optlab.in_low_rank(
      ...     optax.scale_by_adam(), rank=0.25, residual=optlab.plain_residual(0.1)
      ... )
    """
    _checks.check_nonnegative("plain_residual", factor=factor)

    def rule(g, part, low, new, axes, matrix):
        del low, new, axes, matrix
        return factor * (g - part)

    return Residual(rule)
