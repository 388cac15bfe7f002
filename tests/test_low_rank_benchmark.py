"""The parts of benchmarks/low_rank.py that only compute."""

import jax.numpy as jnp
import numpy as np

from benchmarks import gradients, low_rank
from optlab.linalg import subspace


def test_a_stretched_spectrum_keeps_its_ends_and_its_shape():
    values = 7.0 * np.geomspace(1, 1e-3, 16)
    np.testing.assert_allclose(gradients.stretched(values, 40), np.geomspace(1, 1e-3, 40))


def test_a_turned_basis_is_orthonormal_and_has_the_share_it_is_given():
    u = gradients.random_basis(24, 24)
    found = gradients.turned(u, 4, 0.3)
    np.testing.assert_allclose(found.T @ found, np.eye(4), atol=1e-12)
    share = subspace.overlap(jnp.asarray(found, "float32"), jnp.asarray(u[:, :4], "float32"))
    np.testing.assert_allclose(share, 0.3, rtol=1e-5)


def test_left_vectors_are_those_of_the_short_side():
    x = np.diag([1.0, 3.0, 2.0])[:, :2]
    vectors, values = gradients.left(x)
    assert vectors.shape == (2, 2)
    np.testing.assert_allclose(values, [3, 1])


def test_the_tail_finds_the_steps_with_a_refresh():
    times = np.full(low_rank.STEPS, 10.0)
    times[low_rank.EVERY - 1 :: low_rank.EVERY] = 60.0
    assert low_rank.tail(times) == {
        "p50 ms": 10.0,
        "refresh ms": 60.0,
        "p99 ms": 60.0,
        "p99/p50": 6.0,
    }


def test_the_tail_of_few_steps_says_nothing():
    few = low_rank.tail(np.full(low_rank.FEWER_STEPS, 10.0))
    assert few["p99 ms"] is None
    assert few["p99/p50"] is None
