"""Replays the golden cases of controllers, from each case's own fields."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import interpolate, optimize

from optlab.controllers.averaging import adaptive_ema
from optlab.controllers.batch_growth import norm_test
from optlab.controllers.forecast import forecast_exponential
from optlab.controllers.rate_control import accuracy_gradient_rate, alrs_rate
from optlab.controllers.refine import refine_schedule

EXACT = 1e-12  # relative, float64 on both sides
SINGLE = 2e-6  # relative, float32 on one side
FORECAST = 1e-3  # relative, two minimizers of one function
_ABOUT = {"method", "source", "note", "tolerance_hint"}


def _known(fields: dict[str, Any], *keys: str) -> None:
    unknown = fields.keys() - {*keys} - _ABOUT
    if unknown:
        raise NotImplementedError(f"unknown fields {sorted(unknown)}")


def _as_released(losses: Any, index: int, is_training: bool) -> float:
    """Forecast as AutoLRS's code does: splines without outliers, then an exponential."""
    x, y = np.arange(float(len(losses))), np.asarray(losses)
    half = x[(len(x) - 1) // 2]
    for _ in range(10 if is_training else 1):
        off = np.abs(y - interpolate.UnivariateSpline(x, y, k=2)(x))
        worst = np.argsort(off, kind="stable")[-round(0.03 * len(x)) if is_training else -1 :]
        # As in the code: places, which shift when points go, and not times.
        gone = [i for i in worst if i < half]
        x, y = np.delete(x, gone), np.delete(y, gone)
    t = np.arange(float(len(losses)))
    smooth = interpolate.UnivariateSpline(x, y, k=2)(t)

    def basis(u, t):
        return np.stack([np.exp(-np.exp(u) * t), np.ones(np.shape(t))], -1)

    def error(u):
        return np.linalg.lstsq(basis(u[0], t), smooth, rcond=None)[1]

    u = optimize.fmin(lambda u: error(u).sum(), 0, xtol=1e-5, ftol=1e-5, disp=False)[0]
    ends = np.linalg.lstsq(basis(u, t), smooth, rcond=None)[0]
    return float(basis(u, float(index)) @ ends)


def _deviation(true: Any, t: Any, index: int) -> float:
    """Return the standard deviation that noise alone gives the best fit's forecast."""

    def slopes(t):
        decay = np.exp(true["b"] * t)
        return np.stack([decay, true["a"] * t * decay, np.ones_like(decay)], -1)

    there = slopes(np.asarray(float(index)))
    covariance = np.linalg.inv(slopes(t).T @ slopes(t))
    return true["noise"] * float(there @ covariance @ there) ** 0.5


def autolrs_forecast(case: Any, arrays: Any) -> None:
    """The recorded forecast is the released code's; ours is as near to the truth as noise lets."""
    del arrays
    _known(case, "cases")
    for one in case["cases"]:
        _known(one, "true", "is_training", "loss", "fit", "pred_index", "forecast",
               "true_value_at_pred")  # fmt: skip
        losses, index, true = one["loss"], one["pred_index"], one["true"]
        released = _as_released(losses, index, one["is_training"])
        np.testing.assert_allclose(released, one["forecast"], rtol=FORECAST)
        t = np.arange(len(losses))
        fit = one["fit"]["a"] * np.exp(one["fit"]["b"] * index) + one["fit"]["c"]
        np.testing.assert_allclose(one["forecast"], fit, rtol=1e-9)
        truth = true["a"] * np.exp(true["b"] * t) + true["c"]
        np.testing.assert_allclose(losses, truth, rtol=0, atol=5 * true["noise"] + 1e-12)
        off = abs(forecast_exponential(losses, index) - one["true_value_at_pred"])
        assert off <= 3 * _deviation(true, t, index) + 1e-6
        if not true["noise"]:
            assert abs(released - one["true_value_at_pred"]) > 0.1, "the code's bias is gone"


def refined_schedule(case: Any, arrays: Any) -> None:
    """Weights, filter and both scales, of l2 and of l1 norms."""
    del arrays
    _known(case, "params", "sgd_l2", "adam_l1", "constant_norm_sanity_paper",
           "constant_norm_code_output")  # fmt: skip
    _known(case["params"], "T", "filter_fraction")
    share = case["params"]["filter_fraction"]
    for key, optimizer, power in (("sgd_l2", "sgd", 2), ("adam_l1", "adam", 1)):
        one = case[key]
        _known(one, "grad_norms", "filter_width", "filtered", "weights", "refined_unfiltered",
               "refined", "refined_normalized_to_peak", "argmax")  # fmt: skip
        given = one["grad_norms"]
        assert len(given) == case["params"]["T"]
        np.testing.assert_allclose(np.asarray(one["filtered"]) ** -power, one["weights"], EXACT)
        paper = refine_schedule(given, optimizer, smoothing=share, normalize=False)
        np.testing.assert_allclose(paper, one["refined"], EXACT)
        plain = refine_schedule(given, optimizer, smoothing=0.0, normalize=False)
        np.testing.assert_allclose(plain, one["refined_unfiltered"], EXACT)
        shape = refine_schedule(given, optimizer, smoothing=share)
        np.testing.assert_allclose(shape, one["refined_normalized_to_peak"], EXACT)
        assert shape.argmax() == one["argmax"]
    linear, code = (np.asarray(case[f"constant_norm_{key}"]) for key in
                    ("sanity_paper", "code_output"))  # fmt: skip
    found = refine_schedule(np.ones(len(linear)), smoothing=share, normalize=False)
    np.testing.assert_allclose(found, linear, rtol=0, atol=EXACT)
    np.testing.assert_allclose(found / found.max(), code / code.max(), rtol=0, atol=EXACT)


def adadagrad_norm_test(case: Any, arrays: Any) -> None:
    """Both tests of the authors' code: variances, norms and the batch to go on with."""
    del arrays
    _known(case, "cases")
    for one in case["cases"]:
        _known(one, "per_sample_grads", "batch_size", "eta", "next_batch_size", "variance_l1",
               "batch_grad_sq_norm", "norm_test_passes", "inner_product_theta",
               "inner_product_next_batch", "inner_product_variance_sum_blockwise")  # fmt: skip
        grads = [jnp.asarray(g, jnp.float32) for g in one["per_sample_grads"]]
        assert {len(g) for g in grads} == {one["batch_size"]}
        found = norm_test(grads, one["eta"])
        np.testing.assert_allclose(found.variance, one["variance_l1"], 10 * SINGLE)
        np.testing.assert_allclose(found.squared_norm, one["batch_grad_sq_norm"], 10 * SINGLE)
        assert int(found.next_batch) == one["next_batch_size"]
        assert bool(found.passes) == one["norm_test_passes"]
        inner = one["inner_product_variance_sum_blockwise"]
        for theta, batch in _thetas(one, inner):
            found = norm_test(grads, test="inner", theta=theta, official=True)
            assert int(found.next_batch) == batch


def _thetas(one: Any, inner: float) -> list[tuple[float, int]]:
    """Return the case's own threshold, and two around which its variance asks for 50 and 51."""
    squared = one["batch_grad_sq_norm"]
    edge = [(inner / (squared**2 * wanted)) ** 0.5 for wanted in (49.99, 50.01)]
    own = (one["inner_product_theta"], one["inner_product_next_batch"])
    return [own, (edge[0], 50), (edge[1], 51)]


def accelat_controller(case: Any, arrays: Any) -> None:
    """The rate after every epoch of the executed callback."""
    del arrays
    _known(case, "params", "val_accuracy", "lr_after_epoch")
    p = case["params"]
    _known(p, "init_lr", "factor", "min_lr", "window", "quiet", "threshold")
    tx = accuracy_gradient_rate(
        p["factor"],
        window=p["window"],
        patience=p["quiet"],
        threshold=p["threshold"],
        min_scale=p["min_lr"] / p["init_lr"],
    )
    state, found = tx.init(jnp.ones(1)), []
    step = jax.jit(tx.update)
    for value in case["val_accuracy"]:
        _, state = step(jnp.ones(1), state, value=jnp.float32(value))
        found.append(p["init_lr"] * state.scale)
    np.testing.assert_allclose(found, case["lr_after_epoch"], SINGLE)
    assert found[-1] < found[0], "the case does not reduce: it proves nothing"


def dema(case: Any, arrays: Any) -> None:
    """Weights and averages; the first average follows from the first weight."""
    del arrays
    _known(case, "fallback", "initial_ema", "steps")
    assert case["initial_ema"] is None
    tx = adaptive_ema(optax.set_to_zero(), case["fallback"])
    first = case["steps"][0]
    theta, ema, a = (np.asarray(first[key]) for key in ("theta", "ema", "alpha"))
    state = tx.init(jnp.asarray(theta, jnp.float32))
    before = jnp.asarray((ema - a * theta) / (1 - a), jnp.float32)
    average = state.average._replace(count=jnp.int32(1), average=before)
    previous = jnp.asarray(first["grad_prev"], jnp.float32)
    state, step = state._replace(average=average, previous=previous), jax.jit(tx.update)
    for one in case["steps"]:
        _known(one, "theta", "grad", "grad_prev", "alpha", "ema")
        np.testing.assert_allclose(state.previous, one["grad_prev"], SINGLE)
        theta, grad = (jnp.asarray(one[key], jnp.float32) for key in ("theta", "grad"))
        _, state = step(grad, state, theta)
        np.testing.assert_allclose(state.weights, [one["alpha"]], 10 * SINGLE)
        np.testing.assert_allclose(state.average.average, one["ema"], 0, 10 * SINGLE)


def alrs(case: Any, arrays: Any) -> None:
    """The rate at every width, and the table of eta_b."""
    del arrays
    _known(case, "cases")
    for one in case["cases"]:
        _known(one, "bits", "eta_b", "scale_grads", "base_lr", "lr_b")
        grads = [jnp.asarray(g, jnp.float32) for g in one["scale_grads"]]
        rate = alrs_rate(one["base_lr"], grads, one["bits"])
        np.testing.assert_allclose(rate, max(one["lr_b"], 0.0), 10 * SINGLE)
        still = alrs_rate(1.0, [jnp.zeros(2)], one["bits"])
        np.testing.assert_allclose(still, one["eta_b"], SINGLE)


CASES = {
    "accelat_controller": accelat_controller,
    "adadagrad_norm_test": adadagrad_norm_test,
    "alrs": alrs,
    "autolrs_forecast": autolrs_forecast,
    "dema": dema,
    "refined_schedule": refined_schedule,
}
