"""Checks the golden cases of the diagnostics: every field of a JSON is used, or refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optlab import diagnostics

# Relative; the cases are float64, the functions float32 but for the fits of the host.
RELATIVE, HOST = 1e-5, 1e-10


def _fields(given: dict[str, Any], *known: str) -> list[Any]:
    unknown = given.keys() - {*known, "method", "source", "verified"}
    if unknown:
        raise NotImplementedError(f"unknown fields {sorted(unknown)}")
    return [given[key] for key in known]


def _close(found: Any, wanted: Any, relative: float = RELATIVE) -> None:
    np.testing.assert_allclose(found, wanted, rtol=relative)


def _quadratic(p: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return p @ a @ p / 2 - b @ p


def _logistic(w: jax.Array, x: jax.Array, y: jax.Array, l2: jax.Array) -> jax.Array:
    return jnp.mean(jnp.logaddexp(0, x @ w) - y * (x @ w)) + l2 * w @ w / 2


def _check_quadratic(given: dict[str, Any]) -> None:
    a, b, values, algebraic, magnitude, trace, frobenius, rate, sgd_rate = _fields(
        given, "A", "b", "eigenvalues", "lambda_max_algebraic", "lambda_max_magnitude", "trace",
        "frobenius", "gd_max_stable_lr", "sgd_trace_bound_lr",
    )  # fmt: skip
    case = (_quadratic, jnp.ones(len(b)), jnp.asarray(a), jnp.asarray(b))
    ritz = diagnostics.hessian_spectrum(*case)
    np.testing.assert_allclose(ritz.values, values, rtol=0, atol=2e-6)
    sharpness = diagnostics.sharpness(*case)
    _close(sharpness, algebraic)
    _close(jnp.max(jnp.abs(ritz.values)), magnitude)
    _close(jnp.linalg.norm(ritz.values), frobenius)
    found = diagnostics.hessian_trace(*case).value
    _close(found, trace)
    _close(diagnostics.stability_margin(sharpness, 1.0), rate)
    _close(diagnostics.stability_margin(found, 1.0), sgd_rate)


def _check_logistic(given: dict[str, Any]) -> None:
    *numbers, hessian, most, least, trace, optimal = _fields(
        given, "X", "y", "w", "l2", "hessian", "lambda_max", "lambda_min", "trace",
        "heavy_ball_optimal",
    )  # fmt: skip
    x, y, w, l2 = map(jnp.asarray, numbers)
    _close(jax.hessian(_logistic)(w, x, y, l2), hessian, 1e-4)
    values = diagnostics.hessian_spectrum(_logistic, w, x, y, l2).values
    _close((values[0], values[-1]), (least, most))
    _close(diagnostics.hessian_trace(_logistic, w, x, y, l2).value, trace)
    # At the best rate and momentum the roots of both ends of the spectrum are double: +-sqrt(b).
    rate, momentum = _fields(optimal, "lr", "momentum")
    roots = [momentum**0.5, -(momentum**0.5)]
    for value, root in zip((values[0], values[-1]), roots, strict=True):
        np.testing.assert_allclose(1 + momentum - rate * value, 2 * root, atol=1e-5)


def hessian(case: dict[str, Any], arrays: Any) -> None:
    """Compare eigenvalues, traces and stable rates of a quadratic and of logistic regression."""
    quadratic, logistic = _fields(case, "quadratic", "logistic")
    _check_quadratic(quadratic)
    _check_logistic(logistic)


def noise_scale(case: dict[str, Any], arrays: Any) -> None:
    """Compare the estimates from two batches and the ratios of a batch."""
    pairs, ratios = _fields(case, "two_batch", "gsnr")
    for given in pairs:
        b_small, b_big, small, big, *wanted = _fields(
            given, "b_small", "b_big", "g2_small", "g2_big", "true_grad_sq", "trace_sigma",
            "simple_noise_scale",
        )  # fmt: skip
        _close(diagnostics.gradient_noise_scale(small, big, b_small=b_small, b_big=b_big), wanted)
    examples, mean, variance, ratio, average = _fields(
        ratios, "per_sample", "mean", "var_ddof1", "gsnr", "mean_gsnr"
    )
    gradients = jnp.asarray(examples)
    found = diagnostics.gsnr(gradients)
    # A mean of 0.006 out of terms near 1 has lost two digits, its square twice that.
    np.testing.assert_allclose(found.coordinates, ratio, rtol=RELATIVE, atol=1e-8)
    _close(found.mean, average)
    _close(found.batch, len(examples) * np.square(mean).sum() / np.sum(variance))


def critical_batch(case: dict[str, Any], arrays: Any) -> None:
    """Compare the fit, its two curves, and the law of the loss."""
    sizes, steps, examples, fit, law = _fields(
        case, "batch_sizes", "steps", "examples", "fit", "power_law"
    )
    found = diagnostics.critical_batch(sizes, steps)
    wanted = _fields(fit, "S_min", "E_min", "B_crit")
    _close((found.min_steps, found.min_examples, found.size), wanted, HOST)
    _close(found.steps(sizes), steps, HOST)
    _close(found.examples(sizes), examples, HOST)
    scale, exponent, losses, critical = _fields(law, "B_star", "alpha_B", "losses", "B_crit")
    of_loss = diagnostics.critical_batch_of_loss(
        jnp.asarray(losses), scale=scale, exponent=exponent
    )
    _close(of_loss, critical)


def lr_sensitivity(case: dict[str, Any], arrays: Any) -> None:
    """Compare every case over the grid that they share."""
    rates, cases = _fields(case, "learning_rates", "cases")
    for given in cases:
        losses, init_loss, wanted = _fields(given, "losses", "init_loss", "lr_sensitivity")
        _close(diagnostics.lr_sensitivity(rates, losses, init_loss).value, wanted, HOST)


def logit_sharpness(case: dict[str, Any], arrays: Any) -> None:
    """Compare at the box of the case and at the wide one."""
    (cases,) = _fields(case, "cases")
    for given in cases:
        logits, label, eps, *wanted = _fields(
            given, "logits", "label", "eps", "sharpness_percent", "sharpness_percent_eps_0p05"
        )
        found = [
            diagnostics.logit_sharpness(jnp.asarray(logits), label, eps=e) for e in (eps, 0.05)
        ]
        _close(found, wanted)


CASES = {
    "critical_batch": critical_batch,
    "gradient_noise_scale": noise_scale,
    "hessian_diagnostics": hessian,
    "logit_sharpness": logit_sharpness,
    "lr_sensitivity": lr_sensitivity,
}
