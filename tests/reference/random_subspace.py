"""Training in a random subspace, arXiv:2012.13255 eq. 1 to 3, by explicit reparameterization."""

import numpy as np


def fastfood_matrix(signs, order, normals, size, dim):
    """P = H diag(G) Pi H diag(B), first D rows and d columns, over sqrt(L sum G^2) sqrt(D/L)."""
    length = len(signs)
    h = np.ones((1, 1))
    while len(h) < length:
        h = np.kron(h, [[1, 1], [1, -1]])
    scale = np.sqrt(length * np.sum(normals**2)) * np.sqrt(size / length)
    return (h @ np.diag(normals) @ np.eye(length)[order] @ h @ np.diag(signs))[:size, :dim] / scale


def random_subspace(params, grads, maps, rate, momentum, scales=False):
    """Yield the leaves after every step of SGD with momentum on z, and on lam with `scales`.

    theta_l = theta_0l + lam_l P_l z is computed anew from z and lam at every step.
    """
    z, trace_z = np.zeros(maps[0].shape[1]), 0.0
    lam, trace_lam = np.ones(len(params)), 0.0
    for g in grads:
        g_z = sum(s * P.T @ x.ravel() for s, P, x in zip(lam, maps, g, strict=True))
        g_lam = np.array([(P @ z) @ x.ravel() for P, x in zip(maps, g, strict=True)])
        trace_z, trace_lam = momentum * trace_z + g_z, momentum * trace_lam + g_lam
        z = z - rate * trace_z
        if scales:
            lam = lam - rate * trace_lam
        yield [p + (s * P @ z).reshape(p.shape) for p, s, P in zip(params, lam, maps, strict=True)]
