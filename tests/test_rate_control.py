"""Rates that follow an accuracy, a hypergradient, a spectrum, or gradients of scales."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optlab.controllers.rate_control import (
    accuracy_gradient_rate,
    alrs_rate,
    hypergradient_rate,
)
from optlab.controllers.spectral import SpectralRate
from optlab.state.metrics import metrics

X = jnp.zeros(2)
CURVATURE = jnp.array([1.0, 0.2])


def scales(values, **given):
    """Return the factor after every value; one program for all."""
    tx = accuracy_gradient_rate(**given)
    traces = []

    def step(state, value):
        traces.append(value)
        updates, state = tx.update(jnp.ones(2), state, value=value)
        return state, (updates, state.scale)

    last, (updates, found) = jax.lax.scan(step, tx.init(X), jnp.asarray(values, jnp.float32))
    assert len(traces) == 1
    np.testing.assert_array_equal(updates, np.broadcast_to(found[:, None], updates.shape))
    return np.asarray(found), last


def by_definition(values, factor, window, patience, threshold, least):
    """Return the factor after every value, from the whole history."""
    scale, quiet, means, found = 1.0, patience, [], []
    for n in range(1, len(values) + 1):
        mean = np.mean(values[max(0, n - window) : n])
        quiet += 1
        if len(means) > window and quiet > patience and mean - means[-1] < threshold:
            scale, quiet = max(scale * factor, least), 1
        means.append(mean)
        found.append(scale)
    return found


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_factor_follows_the_rule(window, mode):
    rng = np.random.default_rng(window)
    values = (1 - np.exp(-np.arange(60) / 15) + 0.01 * rng.normal(size=60)).astype(np.float32)
    want = by_definition(values.astype(np.float64), 0.7, window, 2, 0.01, 0.1)
    assert 0.1 in want, "the least factor is not reached: it proves nothing"
    given = {"window": window, "patience": 2, "threshold": 0.01, "min_scale": 0.1}
    found, _ = scales(values if mode == "max" else -values, factor=0.7, mode=mode, **given)
    np.testing.assert_allclose(found, want, rtol=1e-6)


def test_steps_without_a_value_change_nothing():
    values = np.linspace(0.5, 0.6, 12)
    want, alone = scales(values, window=2, patience=1, threshold=0.05)
    between = np.full((12, 3), np.nan)
    between[:, 0] = values
    found, last = scales(between.ravel(), window=2, patience=1, threshold=0.05)
    np.testing.assert_array_equal(found[::3], want)
    np.testing.assert_array_equal(found[2::3], want)
    assert want[-1] < 1
    for a, b in zip(last, alone, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_rising_accuracy_reduces_nothing():
    found, last = scales(np.linspace(0, 1, 30))
    np.testing.assert_array_equal(found, 1)
    shown = metrics(last)
    assert int(shown["epochs"]) == 30
    assert float(shown["rate_scale"]) == 1
    assert float(shown["moving_mean"]) == pytest.approx(np.linspace(0, 1, 30)[-5:].mean())


def test_a_missing_or_wrong_value_is_refused():
    tx = accuracy_gradient_rate()
    with pytest.raises(ValueError, match=r"accuracy_gradient_rate: .*'value'.*value=\.\.\."):
        tx.update(X, tx.init(X))
    with pytest.raises(ValueError, match=r"value must be a scalar, got shape \(2,\)"):
        tx.update(X, tx.init(X), value=jnp.ones(2))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"factor": 0.0}, r"factor must be a number in \(0, 1\]"),
        ({"window": 0}, "window must be a whole number >= 1"),
        ({"patience": -1}, "patience must be a whole number >= 0"),
        ({"mode": "maximum"}, "mode must be one of 'max', 'min'"),
    ],
)
def test_wrong_arguments_of_the_accuracy_are_refused(given, says):
    with pytest.raises(ValueError, match=f"accuracy_gradient_rate: {says}"):
        accuracy_gradient_rate(**given)


GRADS = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
AUX = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("previous", [True, False])
def test_the_rate_follows_its_hypergradient(accumulate, previous):
    tx = hypergradient_rate(
        optax.trace(0.5), 0.1, 0.05, bounds=(0.02, 0.3), accumulate=accumulate, previous=previous
    )
    state, u, rate, seen = tx.init(X), np.zeros(2), 0.1, []
    for t, (g, a) in enumerate(zip(GRADS, AUX, strict=True)):
        updates, state = tx.update(jnp.asarray(g), state, X, aux_grad=jnp.asarray(a))
        before, u = u, g + 0.5 * u
        if t:
            start = rate if accumulate else 0.1
            rate = np.clip(start + 0.05 * a @ (before if previous else u), 0.02, 0.3)
        seen.append(float(rate))
        np.testing.assert_allclose(updates, -rate * u, rtol=1e-5)
        np.testing.assert_allclose(metrics(state)["learned_rate"], rate, rtol=1e-5)
    assert len(set(seen)) > 3


def loss(x):
    return jnp.sum(CURVATURE * x * x) / 2


def test_with_the_direction_before_it_is_the_slope_of_the_loss_in_the_last_rate():
    x, g = jnp.array([1.0, -2.0]), jax.grad(loss)
    slope = jax.grad(lambda rate: loss(x - rate * g(x)))(0.1)
    tx = hypergradient_rate(optax.identity(), 0.1, 1e-3, previous=True)
    updates, state = tx.update(g(x), tx.init(x), aux_grad=g(x))
    x = x + updates
    _, state = tx.update(g(x), state, aux_grad=g(x))
    np.testing.assert_allclose(state.rate, 0.1 - 1e-3 * slope, rtol=1e-6)


def test_a_rate_that_is_far_too_small_grows_and_gets_there():
    def descend(tx):
        def step(carry, _):
            x, state = carry
            g = CURVATURE * x
            updates, state = tx.update(g, state, x, aux_grad=g)
            return (x + updates, state), None

        x = jnp.array([1.0, -2.0])
        (x, state), _ = jax.lax.scan(step, (x, tx.init(x)), length=50)
        return float(loss(x)), float(state.rate)

    learned, rate = descend(hypergradient_rate(optax.identity(), 1e-3, 0.05, bounds=(1e-4, 1.5)))
    fixed, _ = descend(hypergradient_rate(optax.identity(), 1e-3, 0.0))
    assert rate > 0.05
    assert learned < 0.5 * fixed


def test_a_hypergradient_that_is_no_number_leaves_the_rate():
    tx = hypergradient_rate(optax.identity(), 0.1, 0.01)
    state = tx.init(X)
    for a in (1.0, 2.0, np.nan, np.inf):
        _, state = tx.update(jnp.ones(2), state, aux_grad=jnp.full(2, a))
        kept = float(state.rate)
        assert kept == pytest.approx({1.0: 0.1, np.inf: 0.5}.get(a, 0.14))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"inner": 0.1}, "inner must be an optax.GradientTransformation"),
        ({"bounds": (0.5, 0.1)}, "bounds must be two numbers 0 <= low <= high"),
        ({"bounds": 3}, "bounds must be two numbers"),
        ({"meta_rate": -1}, "meta_rate must be a number >= 0"),
        ({"learning_rate": 0}, "learning_rate must be a number > 0"),
    ],
)
def test_wrong_arguments_of_the_hypergradient_are_refused(given, says):
    with pytest.raises((ValueError, TypeError), match=f"hypergradient_rate: {says}"):
        hypergradient_rate(**{"inner": optax.identity(), **given})


def test_the_gradient_of_the_objective_is_asked_for_by_name():
    tx = hypergradient_rate(optax.identity())
    with pytest.raises(ValueError, match=r"hypergradient_rate: .*'aux_grad'"):
        tx.update(X, tx.init(X))


def test_alrs_never_turns_negative_and_clips_layer_by_layer():
    assert float(alrs_rate(0.1, [jnp.array([0.5]), jnp.array([0.3])], 8)) == 0
    long = jnp.array([30.0, 40.0])  # of norm 1 after clipping: largest entry 0.8
    assert float(alrs_rate(1.0, {"a": long}, 8)) == pytest.approx(0.2)
    assert float(alrs_rate(1.0, {"a": long}, 3, top_bits=4)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0.1, [], 8), "scale_grads must be a tree of gradients"),
        ((0.1, [X], 9), "top_bits must be a whole number >= 9"),
        ((-0.1, [X], 8), "learning_rate must be a number >= 0"),
    ],
)
def test_wrong_arguments_of_alrs_are_refused(arguments, says):
    with pytest.raises(ValueError, match=f"alrs_rate: {says}"):
        alrs_rate(*arguments)


def test_the_spectrum_of_a_quadratic_gives_the_optimal_rates():
    learner = SpectralRate(lambda params, batch: (batch.max(), batch.min()))
    rate, momentum = learner.observe(None, np.array([1.0, 0.01]))
    assert (rate, momentum) == pytest.approx(((2 / 1.1) ** 2, (0.9 / 1.1) ** 2))
    x = last = np.ones(2)
    for _ in range(60):
        x, last = x - rate * np.array([1.0, 0.01]) * x + momentum * (x - last), x
    # Plain descent at its best rate is at 0.98^60 = 0.3.
    assert np.abs(x).max() < 1e-3


def test_measurements_are_averaged_and_resumed():
    measured = iter([(4.0, 1.0), (8.0, -1.0), (6.0, 0.5)])
    learner = SpectralRate(lambda params, batch: next(measured), smoothing=0.5)
    learner.observe(None, None)
    assert (learner.largest, learner.smallest) == (4.0, 1.0)
    learner.observe(None, None)
    # Weights 1/3 and 2/3.
    assert learner.largest == pytest.approx(20 / 3)
    assert learner.smallest == pytest.approx(-1 / 3)
    again = SpectralRate(lambda params, batch: (6.0, 0.5), smoothing=0.5)
    again.load_state_dict(json.loads(json.dumps(learner.state_dict())))
    assert again.observe(None, None) == learner.observe(None, None)
    assert again.state_dict() == learner.state_dict()


def test_a_spectrum_below_zero_is_refused_and_so_is_what_measures_none():
    with pytest.raises(ValueError, match="SpectralRate: the largest eigenvalue must be > 0"):
        SpectralRate(lambda params, batch: (-1.0, -2.0)).observe(None, None)
    with pytest.raises(TypeError, match="SpectralRate: spectrum must be a function"):
        SpectralRate(None)
    with pytest.raises(ValueError, match=r"SpectralRate: smoothing must be a number in \[0, 1"):
        SpectralRate(max, smoothing=1.0)
