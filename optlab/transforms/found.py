"""What the subspaces of a state tell of themselves."""

from typing import Any

import jax
import jax.numpy as jnp


def found_metrics(kept: Any) -> dict[str, jax.Array]:
    """Return how many subspaces were found, and the mean share of the ones before in the last ones.

    One of each matrix whose subspace was found twice: a first one has none before it.
    """
    if not isinstance(kept, tuple) or not kept:
        return {}
    found = jnp.concatenate([k.found.ravel() for k in kept])
    overlap = jnp.concatenate([k.overlap.ravel() for k in kept])
    again = jnp.sum(found > 1)
    mean = jnp.sum(jnp.where(found > 1, overlap, 0)) / jnp.maximum(again, 1)
    return {"subspace_overlap": mean, "subspaces_found": jnp.sum(found)}
