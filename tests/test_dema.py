"""Averages whose weights follow the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab.controllers.averaging import adaptive_ema
from optlab.state.metrics import metrics

RNG = np.random.default_rng(0)
PARAMS = {"a": jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32), "b": jnp.zeros(4)}
# Of a size that gives weights inside and outside of (0, 1).
GRADS = [{"a": 3 * RNG.normal(size=(2, 3)), "b": 0.2 * RNG.normal(size=4)} for _ in range(6)]


def by_definition(fallback, rate):
    """Return parameters, averages and weights after every step of descent, in NumPy."""
    p = {k: np.asarray(x, np.float64) for k, x in PARAMS.items()}
    e, last = None, None
    for g in GRADS:
        p = {k: p[k] - rate * g[k] for k in p}
        weights = {}
        for k in p:
            if e is None:
                weights[k] = 1.0
                continue
            below = np.abs(p[k] - e[k]).sum() * np.abs(g[k] - last[k]).sum()
            a = 2 * (1 + np.abs(g[k]).sum()) / below
            weights[k] = a if 0 < a < 1 else fallback
        e = p if e is None else {k: e[k] + weights[k] * (p[k] - e[k]) for k in p}
        last = g
        yield p, e, weights


def test_weights_and_averages_are_those_of_the_rule():
    tx = adaptive_ema(optax.sgd(0.5), 0.05)
    state, p, seen = tx.init(PARAMS), PARAMS, []
    step = jax.jit(tx.update)
    for g, (want_p, want_e, weights) in zip(GRADS, by_definition(0.05, 0.5), strict=True):
        g = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), g)
        updates, state = step(g, state, p)
        p = optax.apply_updates(p, updates)
        seen.extend(weights.values())
        np.testing.assert_allclose(state.weights, [weights["a"], weights["b"]], rtol=1e-4)
        found = optlab.eval_params(state, p)
        for k in p:
            np.testing.assert_allclose(p[k], want_p[k], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found[k], want_e[k], rtol=1e-4, atol=1e-5)
    assert any(0.05 < a < 1 for a in seen)
    assert 0.05 in seen


def test_updates_are_those_of_the_optimizer_inside():
    inner = optax.adam(0.1)
    tx = adaptive_ema(inner)
    g = jax.tree.map(jnp.ones_like, PARAMS)
    for a, b in zip(
        jax.tree.leaves(tx.update(g, tx.init(PARAMS), PARAMS)[0]),
        jax.tree.leaves(inner.update(g, inner.init(PARAMS), PARAMS)[0]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_gradient_that_does_not_change_gives_the_fallback():
    tx = adaptive_ema(optax.sgd(1.0), 0.25)
    p, state = jnp.zeros(2), tx.init(jnp.zeros(2))
    for _ in range(2):
        updates, state = tx.update(-jnp.ones(2), state, p)
        p = optax.apply_updates(p, updates)
    np.testing.assert_allclose(state.weights, [0.25])
    np.testing.assert_allclose(optlab.eval_params(state, p), 1.25 * np.ones(2))


def test_outside_of_a_mask_the_parameters_are_evaluated_themselves():
    tx = optax.masked(adaptive_ema(optax.sgd(1.0)), {"a": True, "b": False})
    state, p = tx.init(PARAMS), PARAMS
    for _ in range(2):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, p), state, p)
        p = optax.apply_updates(p, updates)
    found = optlab.eval_params(state, p)
    np.testing.assert_array_equal(found["b"], p["b"])
    assert float(jnp.abs(found["a"] - p["a"]).min()) > 0.1


def test_the_average_of_bfloat16_is_kept_in_float32():
    p = jnp.ones(3, jnp.bfloat16)
    state = adaptive_ema(optax.sgd(0.1)).init(p)
    assert state.average.average.dtype == state.previous.dtype == jnp.float32
    short = adaptive_ema(optax.sgd(0.1), average_dtype=jnp.bfloat16).init(p)
    assert short.average.average.dtype == jnp.bfloat16


def test_huge_gradients_leave_the_weight_finite():
    tx = adaptive_ema(optax.set_to_zero(), 0.5)
    state = tx.init(jnp.zeros(3))
    for g in (1e30, -1e30, 3e38):
        _, state = tx.update(jnp.full(3, g), state, jnp.full(3, 1e-30))
        assert np.isfinite(state.weights).all()
        assert np.isfinite(state.average.average).all()


def test_the_weights_can_be_watched():
    tx = adaptive_ema(optax.sgd(0.1), 0.5)
    state = tx.init(PARAMS)
    for g in GRADS[:2]:
        _, state = tx.update(jax.tree.map(jnp.float32, g), state, PARAMS)
    found = metrics(state)
    assert float(found["ema_weight_min"]) == pytest.approx(float(state.weights.min()))
    assert float(found["ema_weight_max"]) == pytest.approx(float(state.weights.max()))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"fallback": 0}, r"fallback must be a number in \(0, 1\]"),
        ({"inner": optax.sgd}, "inner must be an optax.GradientTransformation"),
        ({"average_dtype": "int8"}, "average_dtype must be a floating dtype"),
    ],
)
def test_wrong_arguments_are_refused(given, says):
    with pytest.raises((ValueError, TypeError), match=f"adaptive_ema: {says}"):
        adaptive_ema(**{"inner": optax.sgd(0.1), **given})
