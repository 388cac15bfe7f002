"""Noise scale, signal-to-noise ratio and critical batch size, against what they estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optlab.diagnostics import (
    critical_batch,
    critical_batch_of_loss,
    gradient_noise_scale,
    gsnr,
    micro_batch_norms,
    noise_scale_tracker,
)

RNG = np.random.default_rng(0)


def gradients(steps, count, size=40, noise=3.0):
    """Return examples' gradients around one mean, (steps, count, size)."""
    mean = np.linspace(-1, 1, size)
    return mean + noise * RNG.normal(size=(steps, count, size)), mean


def test_estimates_are_unbiased_and_their_ratio_of_averages_is_the_noise_scale():
    drawn, mean = gradients(4000, 16)
    by_four = drawn.reshape(4000, 4, 4, 40).mean(2)
    small, big = (by_four**2).sum(2).mean(1), (by_four.mean(1) ** 2).sum(1)
    found = gradient_noise_scale(small, big, b_small=4, b_big=16)
    np.testing.assert_allclose(found.gradient_sq.mean(), mean @ mean, rtol=0.02)
    np.testing.assert_allclose(found.trace.mean(), 40 * 9, rtol=0.02)
    # Single estimates of |G|^2 are often not positive; their scale says so.
    lost = np.asarray(found.gradient_sq) <= 0
    assert lost.any()
    np.testing.assert_array_equal(np.isnan(found.scale), lost)


def test_micro_batches_give_the_two_norms_of_all_leaves():
    stack = {
        "w": jnp.asarray(RNG.normal(size=(4, 2, 3))),
        "b": jnp.asarray(RNG.normal(size=(4, 5))),
    }
    flat = np.concatenate([np.reshape(stack[key], (4, -1)) for key in ("w", "b")], 1)
    small, big = micro_batch_norms(stack)
    np.testing.assert_allclose(small, (flat**2).sum(1).mean(), rtol=1e-6)
    np.testing.assert_allclose(big, (flat.mean(0) ** 2).sum(), rtol=1e-6)


def test_norms_of_half_precision_are_taken_in_float32():
    small, big = micro_batch_norms(jnp.full((2, 10), 300, jnp.float16))
    np.testing.assert_array_equal([small, big], [9e5, 9e5])  # the largest float16 is 65504


def test_the_tracker_averages_both_parts_before_it_divides():
    tracker = noise_scale_tracker(2, 8, decay=0.9)
    update, state = jax.jit(tracker.update), tracker.init()
    assert np.isnan(state.metrics()["noise_scale"])
    trace = gradient_sq = 0.0
    for small, big in ((5.0, 1.0), (6.0, 4.0), (2.0, 1.5)):
        state = update(state, small, big)
        new = gradient_noise_scale(small, big, b_small=2, b_big=8)
        trace = 0.9 * trace + 0.1 * float(new.trace)
        gradient_sq = 0.9 * gradient_sq + 0.1 * float(new.gradient_sq)
    assert state.count == 3
    np.testing.assert_allclose((state.trace, state.gradient_sq), (trace, gradient_sq), rtol=1e-5)
    np.testing.assert_allclose(state.metrics()["noise_scale"], trace / gradient_sq, rtol=1e-5)


def test_the_tracker_under_scan_keeps_its_state_s_types():
    tracker = noise_scale_tracker(1, 4)
    norms = (jnp.full(50, 5.0), jnp.full(50, 2.0))
    state, _ = jax.lax.scan(lambda s, x: (tracker.update(s, *x), None), tracker.init(), norms)
    np.testing.assert_allclose(state.metrics()["noise_scale"], 4, rtol=1e-5)


def test_gsnr_of_a_coordinate_without_noise_or_without_gradient():
    found = gsnr({"w": jnp.array([[2.0, 0.0, 3.0], [2.0, 0.0, 1.0]])})
    np.testing.assert_array_equal(found.coordinates["w"], [np.inf, 0, 2])
    assert found.mean == np.inf
    np.testing.assert_allclose(found.batch, (4 + 4) / (2 / 2))


def test_gsnr_falls_with_the_square_of_the_noise():
    (quiet, mean), (loud, _) = gradients(1, 4000, noise=1.0), gradients(1, 4000, noise=2.0)
    ratios = [gsnr(jnp.asarray(x[0], "float32")) for x in (quiet, loud)]
    np.testing.assert_allclose(ratios[0].coordinates, mean**2, rtol=0.2, atol=0.02)
    np.testing.assert_allclose(ratios[0].batch / ratios[1].batch, 4, rtol=0.05)


def test_the_fit_finds_the_minima_in_spite_of_noise_and_reports_runs_that_never_arrived():
    sizes = 2.0 ** np.arange(3, 13)
    steps = 900 * (1 + 300 / sizes) * np.exp(0.03 * RNG.normal(size=10))
    given = [*steps, None, np.inf, np.nan]
    found = critical_batch([*sizes, 1, 2, 4], given)
    np.testing.assert_allclose(found.min_steps, 900, rtol=0.05)
    np.testing.assert_allclose(found.size, 300, rtol=0.1)
    assert found.left_out == (1, 2, 4)
    assert 0.01 < found.error < 0.05
    # At the critical batch a run takes twice the least of both.
    np.testing.assert_allclose(found.steps(found.size), 2 * found.min_steps)
    np.testing.assert_allclose(found.examples(found.size), 2 * found.min_examples)


@pytest.mark.parametrize(
    ("steps", "size", "minima"),
    [([800.0, 400.0, 100.0], np.inf, (0, 8000)), ([100.0, 110.0, 120.0], 0.0, (109.4, 0))],
)
def test_runs_without_a_bend_have_no_critical_batch_and_no_negative_minimum(steps, size, minima):
    found = critical_batch([10, 20, 80], steps)
    assert found.size == size
    np.testing.assert_allclose((found.min_steps, found.min_examples), minima, rtol=0.01, atol=1e-6)


def test_the_critical_batch_of_a_loss_is_a_power_law_within_float32():
    found = critical_batch_of_loss(jnp.array([1.0, 2.0, 2e-4]), scale=3.0, exponent=0.25)
    np.testing.assert_allclose(found, [3, 3 / 16, 3 / (2e-4) ** 4], rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: gradient_noise_scale(1, 1, b_small=8, b_big=8), ValueError, "b_big must be above"),
        (lambda: noise_scale_tracker(0, 8), ValueError, "noise_scale_tracker: b_small must be"),
        (lambda: noise_scale_tracker(1, 8, decay=1), ValueError, "decay must be"),
        (lambda: gsnr(jnp.ones((1, 3))), ValueError, "gsnr: at least 2 gradients .* got 1"),
        (lambda: gsnr({"a": jnp.ones((2, 3)), "b": jnp.ones(3)}), ValueError, "same size"),
        (lambda: micro_batch_norms(jnp.ones(())), ValueError, "micro_batch_norms: every leaf"),
        (lambda: micro_batch_norms({"n": jnp.arange(3)}), TypeError, "leaf 'n' has dtype int32"),
        (lambda: critical_batch([8, 16], [None, 5.0]), ValueError, "two batch sizes .* got 1 of 2"),
        (lambda: critical_batch([8, 8], [5.0, 6.0]), ValueError, "two batch sizes .* got 1"),
        (lambda: critical_batch([8, 16], [5.0]), ValueError, "one per entry of steps"),
        (lambda: critical_batch([0, 16], [5.0, 6.0]), ValueError, "must be positive"),
        (lambda: critical_batch_of_loss(2.0, scale=0, exponent=1), ValueError, "scale must be"),
    ],
)
def test_wrong_input_is_refused_by_name(call, kind, says):
    with pytest.raises(kind, match=says):
        call()
