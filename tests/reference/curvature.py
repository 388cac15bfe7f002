"""Sophia, arXiv:2305.14342, and TrAct, arXiv:2410.23970."""

import numpy as np


def sophia(p, gs, lrs, curvatures, *, b1, b2, gamma, eps, weight_decay=0.0):
    """Alg. 3, given the estimate of every step, None where t mod k is not 1."""
    m, h, out = np.zeros_like(p), np.zeros_like(p), []
    for g, lr, estimate in zip(gs, lrs, curvatures, strict=True):
        m = b1 * m + (1 - b1) * g
        h = h if estimate is None else b2 * h + (1 - b2) * estimate
        p = p - lr * weight_decay * p
        p = p - lr * np.clip(m / np.maximum(gamma * h, eps), -1, 1)
        out.append(p)
    return out


def gauss_newton_diagonal(jacobians, hessians, weights=None):
    """Diagonal of the weighted mean of J^T S J; J: (rows, outputs, params), S: square, by row."""
    weights = np.ones(len(jacobians)) if weights is None else weights
    terms = np.einsum("bip,bij,bjp->bp", jacobians, hessians, jacobians)
    return weights @ terms / np.sum(weights)


def softmax_hessian(logits):
    """Hessian of the cross-entropy by the logits (rows, classes): diag(q) - q q^T."""
    q = np.exp(logits - logits.max(-1, keepdims=True))
    q = q / q.sum(-1, keepdims=True)
    return q[:, :, None] * np.eye(q.shape[-1]) - q[:, :, None] * q[:, None, :]


def tract(g, rows, damping):
    """Eq. 8 for a kernel (fan_in, fan_out): (A^T A/N + damping I)^-1 g."""
    gram = rows.T @ rows / len(rows)
    return np.linalg.solve(gram + damping * np.eye(len(gram)), g)


def patches(x, window, strides, dilation):
    """Rows (positions, window x channels) of x (batch, height, width, channels), padded before."""
    rows, (h, w) = [], x.shape[1:3]
    spans = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    for image in x:
        for i in range(0, h - spans[0] + 1, strides[0]):
            for j in range(0, w - spans[1] + 1, strides[1]):
                cut = image[i : i + spans[0] : dilation[0], j : j + spans[1] : dilation[1]]
                rows.append(cut.reshape(-1))
    return np.asarray(rows)
