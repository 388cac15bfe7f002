"""Polar factors of matrices: the nearest (semi-)orthogonal matrix."""

import jax
import jax.numpy as jnp


def svd_polar(x: jax.Array) -> jax.Array:
    """Return U V^T of (..., m, n): the exact polar factor, one on each nonzero singular value.

    Singular values under max(m, n) * eps * (the largest) count as zero and give nothing, so a zero
    matrix returns zero. The SVD of one (1024, 4096) leaf takes the TPU compiler minutes.
    """
    u, s, vh = jnp.linalg.svd(x, full_matrices=False)
    cutoff = max(x.shape[-2:]) * jnp.finfo(x.dtype).eps * s[..., :1]
    return jnp.matmul(u * (s > cutoff)[..., None, :], vh, precision="highest")
