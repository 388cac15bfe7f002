"""The one rule for what is a spike, for entries of a gradient and for norms of whole trees."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def exceeds(square: jax.Array, level: jax.Array, threshold: ArrayLike) -> jax.Array:
    """Tell where a square is over `threshold` times its usual level, or not finite.

    Where nothing is known yet, a level of 0, nothing finite is a spike: in SPAM's released code an
    entry that has never seen a gradient would be clipped to 0 for ever.
    """
    return ~jnp.isfinite(square) | ((level > 0) & (square > threshold * level))
