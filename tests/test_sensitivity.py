"""Sensitivity to the learning rate; sharpness and growth of logits."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optlab.diagnostics import logit_sharpness, logit_stats, lr_sensitivity

RNG = np.random.default_rng(0)


def test_a_run_that_diverged_counts_as_the_loss_at_the_start():
    for lost in (None, math.nan, math.inf, 7.0, 4.0):
        found = lr_sensitivity([0.01, 0.1, 1.0], [2.0, 1.0, lost], 4.0)
        np.testing.assert_allclose(found.value, (1 + 0 + 3) / 3)
        assert (found.learning_rate, found.loss) == (0.1, 1.0)
        assert found.diverged == (() if lost in (7.0, 4.0) else (1.0,))


def test_a_method_whose_loss_does_not_depend_on_the_rate_has_no_sensitivity():
    assert lr_sensitivity([0.1, 1.0], [2.0, 2.0], 4.0).value == 0


def test_runs_that_all_diverged_have_no_best_rate():
    found = lr_sensitivity([0.1, 1.0], [None, 9.0], 4.0)
    assert (found.value, found.loss, found.diverged) == (0, 4, (0.1,))
    assert math.isnan(found.learning_rate)


def test_weights_stand_for_the_spacing_of_the_grid():
    twice = lr_sensitivity([0.1, 1.0, 1.0], [1.0, 3.0, 3.0], 4.0)
    weighted = lr_sensitivity([0.1, 1.0], [1.0, 3.0], 4.0, weights=[1, 2])
    np.testing.assert_allclose(weighted.value, twice.value)


def cross_entropy(z, y):
    return np.log(np.exp(z).sum()) - z[y]


def test_logit_sharpness_is_the_maximum_over_the_corners_of_the_box():
    z = np.array([1.5, -0.3, 0.2, 4.0])
    box = 0.05 * (np.abs(z) + 1)
    corners = [z + box * signs for signs in itertools.product((-1, 1), repeat=4)]
    for y in range(4):
        here = cross_entropy(z, y)
        wanted = 100 * (max(cross_entropy(c, y) for c in corners) - here) / (1 + here)
        found = logit_sharpness(jnp.asarray(z, "float32"), y, eps=0.05)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_logit_sharpness_keeps_its_digits_where_the_growth_is_far_below_the_loss():
    """The difference of two float32 cross-entropies of 30 would have none left at this box."""
    z, y, eps = np.array([0.0, 20.0, 30.0]), 0, 1e-8
    box = eps * (z + 1)
    growth = np.sum(np.exp(z) / np.exp(z).sum() * box) + box[0]  # to first order, float64
    wanted = 100 * growth / (1 + cross_entropy(z, y))
    np.testing.assert_allclose(logit_sharpness(jnp.asarray(z), y, eps=eps), wanted, rtol=1e-5)


def test_logit_sharpness_of_a_batch_is_that_of_its_rows():
    z, y = RNG.normal(size=(2, 3, 5)), RNG.integers(0, 5, (2, 3))
    found = jax.jit(logit_sharpness)(jnp.asarray(z, jnp.bfloat16), y)
    assert found.dtype == jnp.float32
    rows = jnp.asarray(z, jnp.bfloat16).reshape(6, 5)
    single = [logit_sharpness(row, label) for row, label in zip(rows, y.ravel(), strict=True)]
    np.testing.assert_allclose(found.ravel(), single, rtol=1e-5)


def test_logit_stats_are_those_of_float64():
    z = RNG.normal(size=(3, 4, 6)) * 5
    log_z = np.log(np.exp(z).sum(-1))
    wanted = np.abs(z).max(), np.sqrt((z**2).mean()), log_z.mean(), (log_z**2).mean()
    np.testing.assert_allclose(logit_stats(jnp.asarray(z, "float32")), wanted, rtol=1e-5)


def test_logit_stats_of_large_logits_are_finite():
    found = logit_stats(jnp.array([[1e5, -1e5]]))
    np.testing.assert_allclose(found, (1e5, 1e5, 1e5, 1e10), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: lr_sensitivity([0.1], [1.0, 2.0], 4.0), "lists of one length"),
        (lambda: lr_sensitivity([], [], 4.0), "lists of one length"),
        (lambda: lr_sensitivity([0.1], [1.0], math.nan), "init_loss must be a finite number"),
        (lambda: logit_sharpness(jnp.ones((2, 3)), jnp.ones(3, int)), r"shape \(2,\) for logits"),
        (lambda: logit_sharpness(jnp.ones(()), 0), "logits"),
    ],
)
def test_wrong_input_is_refused_by_name(call, says):
    with pytest.raises(ValueError, match=says):
        call()
