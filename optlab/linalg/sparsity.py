"""Zeros in matrices (..., m, n) of m inputs: which entries to drop, and patterns of them."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_pattern(name: str, pattern: Any) -> None:
    """Refuse what is not (n, m), n zeros in every m consecutive inputs."""
    whole = isinstance(pattern, tuple) and all(isinstance(x, numbers.Integral) for x in pattern)
    if not (whole and len(pattern) == 2 and 0 < pattern[0] < pattern[1]):
        raise ValueError(
            f"{name}: pattern must be (n, m) with 0 < n < m, got {pattern!r}. 2:4 is (2, 4)."
        )


def _keep_largest(scores: jax.Array, drop: int) -> jax.Array:
    """Return what is not among the `drop` smallest along axis -2; of ties the first go."""
    places = jnp.argsort(jnp.argsort(scores, axis=-2), axis=-2)
    return places >= drop


def keep_by_ratio(scores: jax.Array, ratio: float) -> jax.Array:
    """Return bools (..., m, n) that drop the int(ratio m) smallest scores of every column."""
    return _keep_largest(scores, int(scores.shape[-2] * ratio))


def keep_by_pattern(scores: jax.Array, n: int, m: int) -> jax.Array:
    """Return bools that drop the n smallest of every m consecutive scores of every column."""
    *batch, rows, cols = scores.shape
    groups = scores.reshape(*batch, rows // m, m, cols)
    return _keep_largest(groups, n).reshape(scores.shape)


def has_pattern(zeros: np.ndarray, n: int, m: int) -> bool:
    """Tell whether every m consecutive rows of (rows, cols) have n zeros in every column."""
    rows, cols = zeros.shape
    if rows % m:
        return False
    return bool(np.all(zeros.reshape(rows // m, m, cols).sum(axis=1) >= n))
