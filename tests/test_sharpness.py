"""Sharpness, spectrum and trace against exact Hessians; stable learning rates."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from models import filled, nnx_module

from optlab.diagnostics import (
    critical_sharpness,
    gradient_sharpness,
    hessian_spectrum,
    hessian_trace,
    picture,
    sharpness,
    stability_limit,
    stability_margin,
)
from optlab.linalg import lanczos

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "edge_of_stability.json"
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(12, 3)), "float32")
Y = jnp.asarray(RNG.normal(size=(12, 2)), "float32")


def symmetric(eigenvalues, seed=0):
    """Return a matrix of these eigenvalues in a random basis."""
    size = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return jnp.asarray(basis * eigenvalues @ basis.T, "float32")


def quadratic(p, a):
    return p @ a @ p / 2


class Linen(nn.Module):
    """Three inputs, six hidden units, two outputs: 38 parameters."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(jnp.tanh(nn.Dense(6)(x)))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(3, 6, rngs=rngs), nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def linen_loss(params, x, y):
    return jnp.mean((Linen().apply(params, x) - y) ** 2)


def linen_case():
    return linen_loss, filled(jax.eval_shape(Linen().init, jax.random.key(0), X)), (X, Y)


def nnx_case():
    graph, params, rest = nnx.split(nnx_module(Nnx), nnx.Param, ...)

    def loss(params, rest, x, y):
        return jnp.mean((nnx.merge(graph, params, rest)(x) - y) ** 2)

    return loss, params, (rest, X, Y)


def exact(loss, params, batch):
    flat, unflat = ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda w: loss(unflat(w), *batch)))(flat)
    return np.asarray(hessian, "float64")


@pytest.mark.parametrize("case", [linen_case, nnx_case])
def test_networks_have_the_eigenvalues_and_trace_of_their_exact_hessian(case):
    loss, params, batch = case()
    hessian = exact(loss, params, batch)
    values = np.linalg.eigvalsh(hessian)
    # Fewer steps than the 38 parameters: the ends of the spectrum are there already.
    found = hessian_spectrum(loss, params, *batch, steps=24)
    np.testing.assert_allclose(found.values[-1], values[-1], rtol=1e-3)
    np.testing.assert_allclose(found.values[0], values[0], rtol=1e-3)
    assert found.values[-1] == sharpness(loss, params, *batch, steps=24)
    trace = hessian_trace(loss, params, *batch)
    np.testing.assert_allclose(trace.value, np.trace(hessian), rtol=1e-3)
    np.testing.assert_allclose(trace.samples, np.diagonal(hessian), atol=1e-5)
    assert trace.error == 0


def test_parameters_of_half_precision_are_differentiated_in_float32():
    loss, params, batch = linen_case()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    same = jax.tree.map(lambda p: p.astype(jnp.float32), half)
    found = sharpness(loss, half, *batch, steps=24)
    assert found.dtype == jnp.float32
    assert found == sharpness(loss, same, *batch, steps=24)


def test_sharpness_is_the_largest_value_not_the_largest_magnitude():
    a = symmetric([-9.0, -1.0, 0.5, 2.0, 3.0])
    np.testing.assert_allclose(sharpness(quadratic, jnp.ones(5), a), 3, rtol=1e-5)


@pytest.mark.parametrize(
    "eigenvalues", [[0.0] * 6, [2.0] * 6, [0.0] * 5 + [404.0], [-3.0, 0, 0, 0, 0, 7]]
)
def test_an_exhausted_subspace_ends_the_iteration_without_inventing_values(eigenvalues):
    """The length of the next vector is then 0 or rounding, and what follows NaN or arbitrary."""
    found = hessian_spectrum(quadratic, jnp.ones(6), symmetric(np.array(eigenvalues)))
    top = max(abs(value) for value in eigenvalues)
    weighty = np.asarray(found.weights) > 1e-4
    gaps = np.abs(np.asarray(found.values)[weighty, None] - np.array(eigenvalues)).min(1)
    assert gaps.max() <= 1e-5 * top
    np.testing.assert_allclose(found.values[-1], max(eigenvalues), atol=1e-5 * top)
    np.testing.assert_allclose(jnp.sum(found.weights), 1, rtol=1e-5)


def test_ritz_values_are_within_their_errors_and_weights_integrate_polynomials():
    eigenvalues = np.concatenate([np.linspace(-1, 1, 50), [3.0, 8.0]])
    a, start = symmetric(eigenvalues), jnp.asarray(RNG.normal(size=52), "float32")
    found = lanczos.Ritz(*map(np.float64, lanczos.ritz(lambda v: a @ v, start, 12)))
    off = np.abs(found.values[:, None] - eigenvalues).min(1)
    assert (off <= found.errors + 1e-5).all()
    assert found.errors[-1] < 1e-3 < found.errors[5]
    unit = np.asarray(start, "float64") / np.linalg.norm(start)
    moments = [unit @ np.linalg.matrix_power(np.asarray(a, "float64"), k) @ unit for k in range(4)]
    ours = [np.sum(found.weights * found.values**k) for k in range(4)]
    np.testing.assert_allclose(ours, moments, rtol=1e-4)


def test_a_preconditioner_divides_on_both_sides():
    a, p = symmetric([-1.0, 1.0, 2.0, 4.0]), jnp.array([0.5, 1.0, 4.0, 9.0])
    root = np.sqrt(p)
    wanted = np.linalg.eigvalsh(np.asarray(a) / np.outer(root, root))
    found = hessian_spectrum(quadratic, jnp.ones(4), a, preconditioner=p)
    np.testing.assert_allclose(found.values, wanted, atol=1e-5)


def test_preconditioned_descent_with_momentum_turns_unstable_at_its_limit():
    """Adam with its second moments held still, as one matrix on (position, momentum)."""
    a, p, b = symmetric([0.5, 1.0, 2.0, 4.0]), jnp.array([0.5, 1.0, 4.0, 9.0]), 0.9
    top = sharpness(quadratic, jnp.ones(4), a, preconditioner=p)
    rate, eye = float(stability_margin(top, 1.0, momentum=b, form="ema")), np.eye(4)

    def radius(rate):
        m = (1 - b) * np.asarray(a, "float64")
        scale = rate * np.diag(1 / np.asarray(p, "float64"))
        step = np.block([[eye - scale @ m, -b * scale], [m, b * eye]])
        return np.abs(np.linalg.eigvals(step)).max()

    assert radius(0.999 * rate) < 1 < radius(1.001 * rate)


@jax.custom_vjp
def square(x):
    return x**2


@jax.custom_vjp
def cube(x):
    return x**3


square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * square(x) * g,))


def test_a_gradient_without_forward_derivative_is_named_and_has_another_product():
    loss = lambda p: jnp.sum(cube(p))  # noqa: E731
    p = jnp.array([1.0, 2.0])
    with pytest.raises(TypeError, match=r"sharpness: .*custom_vjp.*reverse_over_reverse"):
        sharpness(loss, p)
    found = hessian_spectrum(loss, p, hvp="reverse_over_reverse")
    np.testing.assert_allclose(found.values, [6, 12], rtol=1e-5)


def test_a_loss_is_traced_once_for_all_calls_of_one_shape():
    traced = []

    def loss(p, a):
        traced.append(p)
        return quadratic(p, a)

    def measure(p):
        sharpness(loss, p, a), hessian_spectrum(loss, p, a)
        hessian_trace(loss, p, a)
        critical_sharpness(loss, p, -p, a)

    a = symmetric([1.0, 2.0, 3.0])
    measure(jnp.ones(3))
    first = len(traced)
    assert first > 0
    measure(2 * jnp.ones(3))
    assert len(traced) == first


def test_random_signs_estimate_the_trace_with_the_error_they_state():
    """The variance of z^T A z is twice the sum of squares off the diagonal."""
    size, samples = 300, 256
    a = RNG.normal(size=(size, size)) / size**0.5
    a = (a + a.T) / 2 + np.eye(size) / 10
    found = hessian_trace(quadratic, jnp.ones(size), jnp.asarray(a, "float32"), samples=samples)
    error = (2 * np.sum((a - np.diag(np.diag(a))) ** 2) / samples) ** 0.5
    np.testing.assert_allclose(found.error, error, rtol=0.2)
    assert abs(found.value - np.trace(a)) < 3 * error
    assert found.samples.shape == (samples,)


def test_a_diagonal_hessian_needs_no_second_sample():
    found = hessian_trace(lambda p: jnp.sum(p**4), jnp.arange(5.0), samples=2)
    np.testing.assert_allclose(found.samples, [360, 360], rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_parameters_on_a_mesh_are_measured_whole(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    both = lambda p: (jnp.sum(p["w"]) + jnp.sum(p["b"])) ** 2 / 2  # noqa: E731
    specs = {"w": P(None, "x"), "b": P("x")}
    params = {"w": np.ones((3, 8), "float32"), "b": np.ones(8, "float32")}
    shardings = {key: NamedSharding(mesh, spec) for key, spec in specs.items()}
    placed = jax.device_put(params, shardings)
    with jax.set_mesh(mesh):
        found = sharpness(both, placed, steps=3), hessian_trace(both, placed).value
    np.testing.assert_allclose(found, [32, 32], rtol=1e-5)  # the Hessian's entries are all 1


def test_progress_is_silent_unless_asked_for(capsys):
    a = symmetric([1.0, 2.0, 3.0])
    sharpness(quadratic, jnp.ones(3), a)
    assert capsys.readouterr() == ("", "")
    sharpness(quadratic, jnp.ones(3), a, progress=True)
    hessian_trace(quadratic, jnp.ones(3), a, progress=True)
    shown = capsys.readouterr().out
    assert "sharpness" in shown
    assert "hessian_trace" in shown
    assert shown.count("3/3") >= 2


@pytest.mark.parametrize("p", [jnp.array([1.0, -2.0, 0.5]), 1e-25 * jnp.ones(3)])
def test_gradient_sharpness_is_the_rayleigh_quotient_of_the_gradient(p):
    a = symmetric([-1.0, 2.0, 5.0])
    g = np.asarray(a, "float64") @ np.asarray(p, "float64")
    wanted = g @ np.asarray(a, "float64") @ g / (g @ g)
    np.testing.assert_allclose(gradient_sharpness(quadratic, p, a), wanted, rtol=1e-4)


def step_matrix(form, rate, b, value):
    """Return one step of (position, momentum) on a parabola of curvature `value`."""
    if form == "nesterov":
        return np.array([[1 - rate * (1 + b) * value, -rate * b * b], [value, b]])
    take = 1 - b if form == "ema" else 1.0
    return np.array([[1 - rate * take * value, -rate * b], [take * value, b]])


@pytest.mark.parametrize("form", ["heavy_ball", "nesterov", "ema"])
@pytest.mark.parametrize("b", [0.0, 0.5, 0.9])
def test_the_limit_is_where_the_recursion_begins_to_grow(form, b):
    rate = 0.03
    limit = float(stability_limit(rate, momentum=b, form=form))
    radius = lambda v: np.abs(np.linalg.eigvals(step_matrix(form, rate, b, v))).max()  # noqa: E731
    assert radius(0.999 * limit) < 1 < radius(1.001 * limit)
    margin = stability_margin(limit / 4, rate, momentum=b, form=form)
    np.testing.assert_allclose(margin, 4, rtol=1e-6)


def test_the_margin_is_infinite_without_positive_curvature():
    np.testing.assert_array_equal(stability_margin(jnp.array([0.0, -2.0]), 0.1), [np.inf] * 2)


def test_critical_sharpness_along_the_gradient_is_its_rayleigh_quotient():
    a, p = symmetric([0.5, 2.0, 30.0]), jnp.array([1.0, -2.0, 0.5])
    g = a @ p
    wanted = g @ a @ g / (g @ g)
    fine = critical_sharpness(quadratic, p, -g, a, tolerance=1e-3)
    np.testing.assert_allclose(fine.value, wanted, rtol=1e-3)
    np.testing.assert_allclose(fine.value * fine.step, 2, rtol=1e-6)
    near = critical_sharpness(quadratic, p, -g, a, start=1.5 / wanted)
    np.testing.assert_allclose(near.value, wanted, rtol=0.06)
    assert near.forwards <= 7
    assert critical_sharpness(quadratic, p, -g, a, start=1e4 / wanted).forwards > near.forwards


def test_critical_sharpness_of_lines_that_never_or_always_or_abruptly_rise():
    falls = critical_sharpness(jnp.sum, jnp.ones(2), -jnp.ones(2))
    assert (falls.value, falls.step) == (0, jnp.inf)
    rises = critical_sharpness(jnp.sum, jnp.ones(2), jnp.ones(2))
    assert rises.value > 1e6
    wall = critical_sharpness(lambda p: jnp.log(p), jnp.float32(3), jnp.float32(-1), tolerance=1e-3)
    np.testing.assert_allclose(wall.step, 3, rtol=1e-3)  # the logarithm is NaN beyond


class Unhashable(dict):
    def __call__(self, p):
        return p.sum()


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: sharpness(quadratic, {"n": jnp.arange(3)}), TypeError, r"sharpness: leaf 'n'"),
        (lambda: sharpness(quadratic, {}), ValueError, r"params must have entries"),
        (
            lambda: sharpness(lambda p: p, jnp.ones(3)),
            ValueError,
            r"sharpness: loss must be .* \(3,\)",
        ),
        (lambda: sharpness(3, jnp.ones(3)), TypeError, r"loss must be a function"),
        (lambda: sharpness(Unhashable(), jnp.ones(3)), TypeError, r"loss must be a hashable func"),
        (
            lambda: sharpness(jnp.sum, jnp.ones(3), preconditioner=jnp.ones(2)),
            ValueError,
            r"preconditioner must be a tree like params, got \(2,\)",
        ),
        (lambda: sharpness(jnp.sum, jnp.ones(3), steps=0), ValueError, r"steps must be"),
        (lambda: sharpness(jnp.sum, jnp.ones(3), hvp="forward"), ValueError, r"hvp must be one of"),
        (lambda: hessian_trace(jnp.sum, jnp.ones(3), samples=1), ValueError, r"samples must be"),
        (lambda: stability_limit(0.1, form="nadam"), ValueError, r"form must be one of"),
        (
            lambda: critical_sharpness(jnp.sum, {"a": jnp.ones(1)}, {"b": jnp.ones(1)}),
            ValueError,
            r"critical_sharpness: updates must be a tree like params, got nothing at 'a'",
        ),
        (
            lambda: critical_sharpness(jnp.sum, jnp.ones(1), jnp.ones(1), start=0),
            ValueError,
            r"start must be a number > 0",
        ),
    ],
)
def test_wrong_input_is_refused_by_name(call, kind, says):
    with pytest.raises(kind, match=says):
        call()


def test_missing_packages_are_named_with_their_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matfree", None)
    with pytest.raises(ImportError, match=r'matfree. pip install "optlab\[diagnostics\]"'):
        lanczos.ritz(lambda v: v, jnp.ones(2), 2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'matplotlib. pip install "optlab\[diagnostics\]"'):
        picture.draw_sharpness({}, tmp_path / "none.png")


def test_shipped_runs_hover_at_the_edge_of_stability():
    found = json.loads(RESULTS.read_text())
    assert len(found["runs"]) == 3
    for run in found["runs"].values():
        ratio = np.asarray(run["sharpness"]) / run["limit"]
        assert ratio[0] < 0.9
        assert np.abs(ratio[len(ratio) // 2 :] - 1).max() < 0.05
        assert run["loss"][-1] < 0.03 * run["loss"][0]
        assert run["share_of_rising_steps"] > 0.1
