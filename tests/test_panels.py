"""Householder's basis found panel by panel, as a TPU finds it, is LAPACK's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optlab.linalg import subspace

# Columns that fill their panels and that do not; as many as rows, or fewer.
SHAPES = [(40, 40), (40, 37), (48, 19)]
WIDTH = 8
TOLERANCE = 1e-5


def _normal(shape):
    return jax.random.normal(jax.random.key(0), shape)


def _short(shape):
    """Columns that repeat, and zeros in the first panel: rank 3."""
    x = _normal((shape[0], 3)) @ _normal((3, shape[1]))
    return x.at[:, 2].set(0)


def _graded(shape):
    return _normal(shape) * 10.0 ** -jnp.linspace(0, 30, shape[1])[None, :]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [_normal, _short, _graded, jnp.zeros], ids=lambda f: f.__name__)
def test_panels_give_an_orthonormal_basis_of_the_first_columns(make, shape):
    x = make(shape)
    q = np.asarray(subspace.in_panels(x, WIDTH), np.float64)
    assert q.shape == shape
    np.testing.assert_allclose(q.T @ q, np.eye(shape[1]), atol=TOLERANCE)
    # Column j lies in the span of the first j: what is below the diagonal of q^T x is nothing.
    below = np.tril(q.T @ np.asarray(x, np.float64), -1)
    assert np.abs(below).max() <= TOLERANCE * max(1, np.abs(x).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [_normal, _graded], ids=lambda f: f.__name__)
def test_panels_give_lapacks_basis(make, shape):
    ours, lapack = subspace.in_panels(make(shape), WIDTH), jnp.linalg.qr(make(shape))[0]
    np.testing.assert_allclose(ours, lapack, atol=TOLERANCE)
