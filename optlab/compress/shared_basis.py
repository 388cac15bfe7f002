"""The subspace that several tasks share (DOGE)."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optlab.distributed.shardings import everywhere
from optlab.linalg.subspace import svd_basis


def shared_basis(
    task_vectors: Sequence[ArrayLike] | jax.Array, rank: int | float = 1 / 6, *, side: str = "cols"
) -> jax.Array:
    """Return an orthonormal basis of what the changes of several tasks have in common.

    Of each of the N task vectors tau_i = theta_i - theta_0, with matrices (..., m, n), the first
    max(1, min(m, n) // N) singular vectors of a side are taken; of all these together the first k.

    Args:
        task_vectors: N arrays (..., m, n) of one shape, kernels with m inputs and n outputs; batch
            axes are layers, each with a basis of its own.
        rank: k, or the share of min(m, n) that it is, rounded down; 1/6 as in the authors'
            configuration. At most as many as were taken.
        side: "cols", the outputs, which DOGE projects; or "rows".

    Returns:
        Columns (..., n, k), or (..., m, k): the `basis` of `project_onto_subspace`.

    Example:
        >>> import jax.numpy as jnp, optlab
        >>> one, other = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([[2.0, 0.0], [0.0, 0.0]])
        >>> print(abs(optlab.shared_basis([one, other], 1)).T)
        [[1. 0.]]

    References:
        Wei et al., "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent",
        arXiv:2501.01230, 2025, Sec. 4; after its port, tanganke/fusion_bench@10660306. There the
        basis has more columns than were taken where k is larger, in arbitrary directions.
    """
    if side not in ("rows", "cols"):
        raise ValueError(f"shared_basis: side must be one of 'rows', 'cols', got {side!r}.")
    taus = jnp.stack([jnp.asarray(tau) for tau in task_vectors])
    if taus.ndim < 3:
        raise ValueError(
            f"shared_basis: task_vectors must be matrices, got {len(taus)} of shape "
            f"{taus.shape[1:]}. Give one kernel of every task at a time."
        )
    taus = everywhere(taus).astype(jnp.promote_types(taus.dtype, jnp.float32))
    taus = taus if side == "rows" else taus.mT
    short = min(taus.shape[-2:])
    # 1e-9: 0.29 of 100 comes out just below 29.
    wanted = rank if isinstance(rank, int) else math.floor(rank * short + 1e-9)
    firsts = svd_basis(taus, max(1, short // len(taus)))  # (N, ..., a, q)
    together = jnp.concatenate(list(firsts), axis=-1)
    return svd_basis(together, min(wanted, *together.shape[-2:]))
