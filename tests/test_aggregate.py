"""Robust means: against NumPy, over examples, groups and steps; what is not finite is outvoted."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import aggregate as reference

from optlab.testing.sharding import mesh_of
from optlab.transforms.aggregate import _network, median_of_groups, rolling_median, winsorize

SHAPES = {"cube": (2, 3, 4), "bias": (4,), "temperature": ()}
PARAMS = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
# Absolute: a few roundings of gradients, whose tails reach 20.
TOLERANCE = {"float32": 5e-6, "float64": 2e-14}


def draw(n, seed=0):
    rng = np.random.default_rng(seed)
    # Student's t with two degrees of freedom: the tails that robust means are for.
    single = {k: rng.standard_t(2, size=(n, *s)).astype("float32") for k, s in SHAPES.items()}
    return {name: np.asarray(x, "float64") for name, x in single.items()}


def update(tx, grads, dtype="float32"):
    grads = jax.tree.map(lambda g: jnp.asarray(g, dtype), grads)
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS)
    return tx.update(grads, tx.init(params), params)[0]


def close(found, wanted, dtype="float32"):
    for name, want in wanted.items():
        assert found[name].dtype == dtype
        np.testing.assert_allclose(found[name], want, rtol=0, atol=TOLERANCE[dtype], err_msg=name)


@pytest.mark.parametrize("n", range(1, 18))
def test_network_sorts_every_sequence_of_zeros_and_ones(n):
    # A network that sorts these sorts everything (Knuth, 5.3.4, theorem Z); all up to 10 items.
    rng = np.random.default_rng(n)
    rows = (
        np.asarray(list(itertools.product((0, 1), repeat=n)))
        if n <= 10
        else rng.random((4096, n)) < rng.random((4096, 1))
    ).T.astype(int)
    wanted = np.sort(rows, axis=0)
    for i, j in _network(n):
        assert i < j < n
        rows[[i, j]] = np.minimum(rows[i], rows[j]), np.maximum(rows[i], rows[j])
    np.testing.assert_array_equal(rows, wanted)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "percent"), [(1, 20), (12, 10), (12, 0), (5, 50), (40, 4.0)])
def test_winsorized_mean_is_the_papers(n, percent, dtype):
    grads = draw(n)
    wanted = {name: reference.winsorized(g, percent) for name, g in grads.items()}
    with jax.enable_x64(dtype == "float64"):
        close(update(winsorize(percent), grads, dtype), wanted, dtype)


def test_zero_percent_is_the_mean_and_fifty_the_median():
    grads = draw(7)
    close(update(winsorize(0), grads), {k: g.mean(axis=0) for k, g in grads.items()})
    close(update(winsorize(50), grads), {k: np.median(g, axis=0) for k, g in grads.items()})
    same = update(winsorize(50), grads)
    close(update(median_of_groups(7), grads), jax.tree.map(np.asarray, same))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "groups"), [(3, 3), (12, 3), (12, 4), (5, 1), (40, 20)])
def test_median_of_groups_is_the_papers(n, groups, dtype):
    grads = draw(n)
    wanted = {name: reference.m3(g, groups) for name, g in grads.items()}
    with jax.enable_x64(dtype == "float64"):
        close(update(median_of_groups(groups), grads, dtype), wanted, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("warmup", ["passthrough", "zeros"])
def test_rolling_median_is_the_papers(window, warmup, dtype):
    grads = draw(7)
    wanted = {name: reference.rm3(g, window, warmup == "passthrough") for name, g in grads.items()}
    with jax.enable_x64(dtype == "float64"):
        tx = rolling_median(window, warmup=warmup)
        state = tx.init(jax.tree.map(lambda p: jnp.asarray(p, dtype), PARAMS))
        for t in range(7):
            g = {name: jnp.asarray(x[t], dtype) for name, x in grads.items()}
            updates, state = tx.update(g, state)
            close(updates, {name: x[t] for name, x in wanted.items()}, dtype)
    assert len(state.previous) == window - 1


def test_examples_lie_along_any_axis():
    grads = {"cube": draw(6)["cube"].astype("float32")}
    wanted = winsorize(20).update(grads, optax.EmptyState())[0]["cube"]
    turned = {"cube": np.moveaxis(grads["cube"], 0, 2)}
    found = winsorize(20, axis=2).update(turned, optax.EmptyState())[0]["cube"]
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, -3e38])
@pytest.mark.parametrize(
    "tx", [winsorize(10), winsorize(50), median_of_groups(5), median_of_groups(20)]
)
def test_a_bad_example_stays_within_the_others(tx, bad):
    grads = draw(20)
    for g in grads.values():
        g[7] = bad
    found = update(tx, grads)
    for name, g in grads.items():
        good = np.delete(g, 7, axis=0)
        assert (found[name] >= good.min(axis=0)).all()
        assert (found[name] <= good.max(axis=0)).all()
    # The plain mean is what this is measured against.
    plain = update(winsorize(0), grads)
    assert all(np.abs(x).min() > 1e28 for x in jax.tree.leaves(plain))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e30])
def test_a_bad_step_never_reaches_the_median_of_three(bad):
    tx, grads = rolling_median(), draw(6)
    for g in grads.values():
        g[3] = bad
    state = tx.init(PARAMS)
    for t in range(6):
        g = {name: jnp.asarray(x[t], jnp.float32) for name, x in grads.items()}
        updates, state = tx.update(g, state)
        for name, x in grads.items() if t >= 3 else ():
            others = np.delete(x[t - 2 : t + 1], 5 - t, axis=0).astype("float32")
            assert (updates[name] >= others.min(axis=0)).all()
            assert (updates[name] <= others.max(axis=0)).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_the_percentage_can_be_injected():
    grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), draw(9))
    tx = optax.inject_hyperparams(winsorize, static_args="axis")(percent=20.0)
    found, state = jax.jit(tx.update)(grads, tx.init(PARAMS))
    assert float(state.hyperparams["percent"]) == 20
    close(found, jax.tree.map(np.asarray, update(winsorize(20.0), grads)))


@pytest.mark.parametrize("make", [functools.partial(winsorize, 20), median_of_groups])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_examples_give_the_same_mean(make, kind):
    mesh, tx = mesh_of(kind), make()
    grads = {"cube": jnp.asarray(draw(12)["cube"], jnp.float32)}
    wanted = tx.update(grads, optax.EmptyState())[0]["cube"]
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, PartitionSpec("data", "model", None, None))
        placed = {"cube": jax.device_put(grads["cube"], where)}
        found = jax.jit(lambda g: tx.update(g, optax.EmptyState())[0])(placed)["cube"]
        if kind == AxisType.Explicit:
            assert jax.typeof(found).sharding.spec == PartitionSpec("model", None, None)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_the_median_over_devices_is_the_median_of_gathered_gradients():
    mesh, tx = mesh_of(AxisType.Auto, (8,), ("batch",)), median_of_groups(8)
    grads = {"cube": jnp.asarray(draw(8)["cube"], jnp.float32)}

    def step(mine):
        gathered = jax.lax.all_gather(mine, "batch", tiled=True)
        return tx.update(gathered, optax.EmptyState())[0]

    spec = PartitionSpec("batch")
    # `all_gather` gives every device the same, which its type does not say.
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False
    )
    close(jax.jit(mapped)(grads), {"cube": reference.m3(np.asarray(grads["cube"]), 8)})


def test_half_precision_gradients_stay_half():
    grads = jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), draw(6))
    for tx in (winsorize(10), median_of_groups()):
        updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def test_the_mean_trains_what_follows_it_in_a_chain():
    inputs = jnp.linspace(-1, 1, 12)[:, None]
    targets = (2 * inputs[:, 0] + 1).at[5].set(100.0)  # one wrong label

    def loss(p, x, y):
        return (jnp.dot(x, p["w"]) + p["b"] - y) ** 2

    start = {"w": jnp.zeros(1), "b": jnp.zeros([])}
    per_example = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))
    errors = {}
    for percent in (0, 10):
        tx, params = optax.chain(winsorize(percent), optax.adam(0.1)), start
        step = jax.jit(tx.update)
        state = tx.init(params)
        for _ in range(150):
            updates, state = step(per_example(params, inputs, targets), state, params)
            params = optax.apply_updates(params, updates)
        errors[percent] = abs(params["w"][0] - 2) + abs(params["b"] - 1)
    # Off by 9.7 and by 0.001: the mean goes where the wrong label pulls.
    assert errors[0] > 5
    assert errors[10] < 0.01


WRONG = [
    (
        lambda: winsorize(51),
        ValueError,
        r"winsorize: percent must be a number in \[0, 50\], got 51",
    ),
    (lambda: winsorize("10"), TypeError, "winsorize: percent must be"),
    (lambda: winsorize(10, axis=-1), ValueError, "winsorize: axis must be a whole number >= 0"),
    (
        lambda: median_of_groups(0),
        ValueError,
        "median_of_groups: num_groups must be .* >= 1, got 0",
    ),
    (lambda: rolling_median(0), ValueError, "rolling_median: window must be .* >= 1, got 0"),
    (lambda: rolling_median(warmup="zero"), ValueError, "Did you mean 'zeros'"),
    (
        lambda: update(winsorize(10), PARAMS),
        ValueError,
        r"winsorize: leaf 'bias' needs a gradient per example .* got shape \(4,\) for parameters "
        r"of \(4,\)\. Compute them with jax\.vmap",
    ),
    (
        lambda: median_of_groups().update({"temperature": jnp.ones([])}, optax.EmptyState()),
        ValueError,
        r"leaf 'temperature' needs a gradient per example or group along axis 0, got shape \(\)\.",
    ),
    (
        lambda: update(median_of_groups(3), draw(4)),
        ValueError,
        "leaf 'bias' has 4 gradients along its first axis, a multiple of num_groups=3",
    ),
    (
        lambda: update(winsorize(10), {"bias": np.ones((3, 4))}),
        ValueError,
        "the updates and a tree beside them are different trees",
    ),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG)
def test_wrong_calls_are_refused_with_the_fix(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
