"""Both estimators of curvature give the exact diagonals on average, on any mesh, in any dtype.

"On average" is: the mean of 2000 estimates lies within 4 standard errors of the exact diagonal in
every entry. Seeds are fixed; the bound refuses a diagonal that is wrong by a fifth.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import curvature as reference

from optlab.testing import random_like
from optlab.testing.sharding import mesh_of
from optlab.transforms.estimators import gauss_newton_diagonal, hutchinson_diagonal

DRAWS, ERRORS = 2000, 4.0
PARAMS = random_like({"in": {"kernel": (3, 4), "bias": (4,)}, "out": {"kernel": (4, 3)}}, seed=0)
X = random_like((8, 3), seed=1)
LABELS = jnp.asarray(np.random.default_rng(2).integers(0, 3, 8))
WEIGHTS = jnp.array([1.0, 1.0, 0.0, 1.0, 2.0, 1.0, 0.0, 0.5])


def predict(params, x=X):
    hidden = jnp.tanh(x @ params["in"]["kernel"] + params["in"]["bias"][None])
    return hidden @ params["out"]["kernel"]


def loss(params, x=X, labels=LABELS):
    chances = jax.nn.log_softmax(predict(params, x))
    return -jnp.mean(jnp.take_along_axis(chances, labels[:, None], 1))


@functools.cache
def _exact_gauss_newton(likelihood, weighted):
    flat, unravel = ravel_pytree(PARAMS)
    jacobians = np.asarray(jax.jacobian(lambda f: predict(unravel(f)))(flat), np.float64)
    logits = np.asarray(predict(PARAMS), np.float64)
    chance = 1 / (1 + np.exp(-logits))
    hessians = {
        "categorical": lambda: reference.softmax_hessian(logits),
        "bernoulli": lambda: (chance * (1 - chance))[:, :, None] * np.eye(3),
        "normal": lambda: np.broadcast_to(np.eye(3), (8, 3, 3)),
    }[likelihood]()
    return reference.gauss_newton_diagonal(
        jacobians, hessians, np.asarray(WEIGHTS) if weighted else None
    )


def _exact_hessian():
    flat, unravel = ravel_pytree(PARAMS)
    return np.diag(jax.hessian(lambda f: loss(unravel(f)))(flat))


def _draws(estimate, params=PARAMS):
    """Return many estimates as rows."""
    keys = jax.random.split(jax.random.key(3), DRAWS)
    one = lambda key: ravel_pytree(estimate(params, key))[0]  # noqa: E731
    return np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)


def _standard_errors(draws, exact):
    spread = draws.std(axis=0, ddof=1) / np.sqrt(len(draws))
    return np.max(np.abs(draws.mean(axis=0) - exact) / spread)


def _check(draws, exact):
    assert _standard_errors(draws, exact) < ERRORS
    for wrong in (0.8, 1.2):
        assert _standard_errors(draws, wrong * exact) > ERRORS, "the bound proves nothing"


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "normal"])
def test_gauss_newton_is_exact_on_average(likelihood, weighted):
    weights = WEIGHTS if weighted else None
    draws = _draws(gauss_newton_diagonal(predict, likelihood=likelihood, weights=weights))
    assert draws.min() >= 0
    _check(draws, _exact_gauss_newton(likelihood, weighted))


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_hutchinson_is_exact_on_average(distribution):
    _check(_draws(hutchinson_diagonal(loss, distribution=distribution)), _exact_hessian())


def test_hutchinson_sees_negative_curvature_and_is_exact_on_a_diagonal():
    estimate = hutchinson_diagonal(lambda p: jnp.sum(p**3), distribution="rademacher")
    p = jnp.array([-2.0, 0.0, 1.0])
    np.testing.assert_allclose(estimate(p, jax.random.key(0)), 6 * p, rtol=1e-6)


def test_rows_of_sequences_count_as_rows():
    split = gauss_newton_diagonal(lambda p: predict(p).reshape(2, 4, 3), likelihood="normal")
    _check(_draws(split), _exact_gauss_newton("normal", False))


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(gauss_newton_diagonal, predict),
        functools.partial(hutchinson_diagonal, loss),
    ],
)
def test_samples_are_averaged(build):
    key = jax.random.key(5)
    got, one = jax.jit(build(samples=3))(PARAMS, key), jax.jit(build())
    each = [one(PARAMS, k) for k in jax.random.split(key, 3)]
    want = jax.tree.map(lambda *x: sum(x) / 3, *each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)


@pytest.mark.parametrize(
    ("estimate", "want"),
    [
        # Neither depends on what is drawn.
        (gauss_newton_diagonal(lambda p: p[None] * 3, likelihood="bernoulli"), 2.25),
        (hutchinson_diagonal(lambda p: jnp.sum(1.5 * p**2), distribution="rademacher"), 3.0),
    ],
    ids=["gnb", "hutchinson"],
)
def test_bfloat16_parameters_give_float32_estimates(estimate, want):
    found = estimate(jnp.zeros(4, jnp.bfloat16), jax.random.key(0))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.full(4, want))


def test_split_over_devices_each_draws_its_own_labels():
    mesh = mesh_of(AxisType.Auto, (8,), ("batch",))

    def part(params, x, keys):
        estimate = gauss_newton_diagonal(lambda p: predict(p, x), axis_name="batch")
        return jax.vmap(lambda k: ravel_pytree(estimate(params, k))[0])(keys)

    keys = jax.random.split(jax.random.key(3), DRAWS)
    for checked in (True, False):
        specs = {"in_specs": (P(), P("batch"), P()), "out_specs": P(), "check_vma": checked}
        mapped = jax.jit(jax.shard_map(part, mesh=mesh, **specs))
        draws = np.asarray(mapped(PARAMS, X, keys), np.float64)
        _check(draws, _exact_gauss_newton("categorical", False))


def _mapped(fn, how):
    """Split the second and third argument over 8 devices."""
    if how == "pmap":
        cut = lambda x: x.reshape(8, -1, *x.shape[1:])  # noqa: E731
        split = jax.pmap(fn, "batch", in_axes=(None, 0, 0, None), devices=jax.devices()[:8])
        whole = lambda *a: split(a[0], cut(a[1]), cut(a[2]), a[3])  # noqa: E731
        return lambda *a: jax.tree.map(lambda x: x[5], whole(*a))
    mesh, specs = mesh_of(AxisType.Auto, (8,), ("batch",)), (P(), P("batch"), P("batch"), P())
    checked = how == "checked"
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=checked))


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["checked", "unchecked", "pmap"])
def test_split_over_devices_hutchinson_is_the_whole_batch(how):
    def part(params, x, labels, key):
        mean = lambda p: loss(p, x, labels)  # noqa: E731
        return hutchinson_diagonal(mean, axis_name="batch")(params, key)

    key = jax.random.key(1)
    got = _mapped(part, how)(PARAMS, X, LABELS, key)
    want = hutchinson_diagonal(loss)(PARAMS, key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
@pytest.mark.parametrize("how", ["checked", "unchecked", "pmap"])
def test_split_over_devices_gauss_newton_is_summed_once(how):
    # Of one weight, whose estimate at the seen labels' residuals can be written down.
    def part(p, x, weights, key):
        estimate = gauss_newton_diagonal(
            lambda p: x[:, :1] * p[None], likelihood="normal", weights=weights, axis_name="batch"
        )
        return estimate(p, key)

    key, p = jax.random.key(1), jnp.ones(1)
    draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), (1, 1))[0, 0]  # noqa: E731
    residual = np.array([draw(i) for i in range(8)]) * np.sqrt(WEIGHTS)
    g = np.sum(residual * X[:, 0]) / np.sum(WEIGHTS)
    got = _mapped(part, how)(p, X, WEIGHTS, key)
    np.testing.assert_allclose(got, [np.sum(WEIGHTS) * g**2], rtol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_and_batch_give_the_numbers_of_one_device(kind):
    mesh, key = mesh_of(kind), jax.random.key(1)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    x, labels = place(X, "data"), place(LABELS, "data")
    params = {
        "in": {"kernel": place(PARAMS["in"]["kernel"], None, "model"), "bias": None},
        "out": {"kernel": place(PARAMS["out"]["kernel"], "model")},
    }
    params["in"]["bias"] = place(PARAMS["in"]["bias"], "model")

    def out(p, x):
        hidden = jnp.tanh(x @ p["in"]["kernel"] + p["in"]["bias"][None])
        spec = P("data") if kind is AxisType.Explicit else None
        contract = (((1,), (0,)), ((), ()))
        return jax.lax.dot_general(hidden, p["out"]["kernel"], contract, out_sharding=spec)

    def mean(p, x, labels):
        chances = jax.nn.log_softmax(out(p, x))
        return -jnp.mean(jnp.sum(chances * jax.nn.one_hot(labels, 3), axis=1))

    def both(params, x, labels, key):
        gnb = gauss_newton_diagonal(lambda p: out(p, x))(params, key)
        return gnb, hutchinson_diagonal(lambda p: mean(p, x, labels))(params, key)

    with jax.set_mesh(mesh):
        got = jax.jit(both)(params, x, labels, key)
        if kind is AxisType.Explicit:
            for tree in got:
                same = lambda h, p: h.sharding.is_equivalent_to(p.sharding, h.ndim)  # noqa: E731
                assert all(jax.tree.leaves(jax.tree.map(same, tree, params)))
        got = jax.device_get(got)
    want = (gauss_newton_diagonal(predict)(PARAMS, key), hutchinson_diagonal(loss)(PARAMS, key))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gauss_newton_diagonal(predict, likelihood="softmax"), "one of 'categorical'"),
        (lambda: gauss_newton_diagonal(3), "a function or None"),
        (lambda: gauss_newton_diagonal(predict, samples=0), "a whole number >= 1"),
        (lambda: hutchinson_diagonal(loss, distribution="gauss"), "one of 'normal', 'rademacher'"),
        (lambda: hutchinson_diagonal(loss, probes=2), "unknown keyword 'probes'"),
        (
            lambda: gauss_newton_diagonal(predict, weights=jnp.ones(3))(PARAMS, jax.random.key(0)),
            "weights must be one per row of the outputs (8, 3), got shape (3,)",
        ),
    ],
)
def test_wrong_calls_are_refused(call, says):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert says in str(error.value)
    assert str(error.value).startswith(("gauss_newton_diagonal: ", "hutchinson_diagonal: "))
