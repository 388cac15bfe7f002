"""Weights of tasks: certificates of the optimum, SciPy's linear programs, what is not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optlab.combine.multitask import combine_gradients, mgda, pareto_da
from optlab.testing.sharding import mesh_of

SHAPES = {"kernel": (3, 4), "bias": (4,), "scale": ()}


def draw(tasks, seed=0, shapes=SHAPES, dtype="float32"):
    """Return a tree of gradients with the tasks in front."""
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=(tasks, *s)).astype(dtype) for k, s in shapes.items()}


def matrix(tree):
    """Return the gradients as rows, in float64."""
    rows = [np.asarray(x, "float64").reshape(len(x), -1) for x in jax.tree.leaves(tree)]
    return np.concatenate(rows, axis=1)


PARETO_DA = jax.jit(pareto_da)
MGDA = jax.jit(mgda, static_argnames="normalize")
BATCHED = jax.jit(jax.vmap(lambda g: mgda(g)))


def shortest(g):
    """Return SciPy's weights, by the non-negative least squares problem of Wolfe."""
    g = np.asarray(g, "float64")
    size = np.linalg.norm(g, axis=1).min()
    rows = np.vstack([g.T, np.full(len(g), size)])
    y, _ = scipy.optimize.nnls(rows, np.append(np.zeros(g.shape[1]), size))
    return y / y.sum()


def problems(tasks, count=300):
    """Return gradients near and far, large and small, more than dimensions and fewer."""
    rng = np.random.default_rng(tasks)
    sizes = 10 ** rng.uniform(-2, 2, size=(count, tasks, 1))
    used = np.arange(9) < rng.integers(2, 10, size=(count, 1, 1))
    shared = rng.normal(size=(count, 1, 9)) * rng.choice([0, 3], size=(count, 1, 1))
    return (rng.normal(size=(count, tasks, 9)) * sizes + shared) * used


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("float64", 1e-11)])
@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_no_combination_is_shorter(tasks, dtype, bound):
    # <d, g_i> >= |d|^2 for every i is necessary and sufficient. Of the smallest gradient's square.
    g = problems(tasks)
    with jax.enable_x64(dtype == "float64"):
        found = BATCHED(jnp.asarray(g, dtype))
        w = np.asarray(found.weights, "float64")
        np.testing.assert_allclose(
            found.gradient, np.einsum("bn,bnd->bd", w, g), rtol=0, atol=bound * np.abs(g).max()
        )
    assert w.min() >= 0
    np.testing.assert_allclose(w.sum(axis=1), 1, rtol=0, atol=1e-6)
    d = np.einsum("bn,bnd->bd", w, g)
    sizes = np.linalg.norm(g, axis=2)
    gap = np.einsum("bd,bnd->bn", d, g) - (d**2).sum(axis=1, keepdims=True)
    # Rounding moves an inner product by the lengths of both.
    unit = sizes.min(axis=1, keepdims=True) * sizes
    assert (gap >= -bound * unit).all(), (gap / unit).min()
    # Means and vertices are what this is measured against.
    assert (w.max(axis=1) < 0.99).mean() > 0.2
    if tasks > 2:
        assert (w == 0).any(axis=1).mean() > 0.2


def test_two_tasks_have_the_closed_form():
    g = matrix(draw(2))
    apart = ((g[0] - g[1]) ** 2).sum()
    wanted = np.clip((g[1] - g[0]) @ g[1] / apart, 0, 1)
    np.testing.assert_allclose(MGDA(draw(2)).weights, [wanted, 1 - wanted], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(MGDA(np.ones((2, 3), "float32")).weights, [0.5, 0.5])
    np.testing.assert_array_equal(MGDA(np.ones((1, 3), "float32")).weights, [1])


@pytest.mark.parametrize("tasks", [2, 4])
def test_sizes_of_any_float32_are_balanced(tasks):
    g = matrix(draw(tasks)).astype("float32")
    for scale in (1e-30, 1, 1e30):
        found = MGDA(g * np.float32(scale))
        np.testing.assert_allclose(found.weights, shortest(g), rtol=0, atol=2e-6)
        assert np.isfinite(found.gradient).all()
    g[1] = 0
    np.testing.assert_array_equal(MGDA(g).weights, np.arange(tasks) == 1)


@pytest.mark.parametrize("tasks", [2, 4])
def test_nothing_is_left_where_tasks_balance(tasks):
    g = matrix(draw(tasks)).astype("float32")
    g[-1] = -g[:-1].sum(axis=0)
    found = MGDA(g)
    np.testing.assert_allclose(found.weights, np.full(tasks, 1 / tasks), rtol=0, atol=1e-5)
    assert np.abs(found.gradient).max() < 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("tasks", [2, 4])
def test_a_task_that_is_not_finite_is_left_out(tasks, bad):
    g = matrix(draw(tasks)).astype("float32")
    others = np.delete(g, 1, axis=0)
    g[1, 2] = bad
    found, wanted = MGDA(g), shortest(others)
    np.testing.assert_allclose(found.weights, np.insert(wanted, 1, 0), rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.gradient, wanted @ others, rtol=0, atol=1e-5)
    none = MGDA(np.full_like(g, bad))
    assert np.isnan(none.weights).all()
    assert np.isnan(none.gradient).all()


def test_a_tree_per_task_is_the_stacked_tree():
    tree = draw(2) | {"frozen": None}
    apart = [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(2)]
    wanted, found = MGDA(tree), MGDA(*apart)
    assert found.gradient["frozen"] is None
    assert found.gradient["kernel"].shape == (3, 4)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    half = jax.eval_shape(mgda, jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree))
    assert half.gradient["bias"].dtype == jnp.bfloat16
    assert half.weights.dtype == jnp.float32


@pytest.mark.parametrize("normalize", ["l2", "loss", "loss+"])
def test_weights_are_those_of_normalized_gradients(normalize):
    g, losses = matrix(draw(4)).astype("float32"), np.asarray([0.5, 2.0, 8.0, 1.0], "float32")
    lengths = np.linalg.norm(g, axis=1)
    scale = {"l2": lengths, "loss": losses, "loss+": losses * lengths}[normalize]
    found = MGDA(g, normalize=normalize, losses=None if normalize == "l2" else losses)
    np.testing.assert_allclose(found.weights, shortest(g / scale[:, None]), rtol=0, atol=2e-6)
    assert np.abs(found.weights - shortest(g)).max() > 0.01
    np.testing.assert_allclose(found.gradient, found.weights @ g, rtol=0, atol=1e-6)


def linear_program(g, v, balance):
    """Return SciPy's optimum of ParetoDA's program, or None where there is none."""
    c, gram = g @ v, g @ g.T
    if balance:
        bounds = np.where(c > 0, -np.inf, c)
        bounds[c == c.max()] = 0
        bounds = bounds if (c > 0).any() else np.zeros(len(c))
        objective, rows = c, gram
    else:
        bounds = np.append(np.zeros(len(c)), min(c.max(), 0))
        objective, rows = gram.sum(axis=0), np.vstack([gram, c])
    kept = np.isfinite(bounds)
    given = {"A_ub": -rows[kept], "b_ub": -bounds[kept]} if kept.any() else {}
    found = scipy.optimize.linprog(-objective, **given, A_eq=np.ones((1, len(c))), b_eq=[1])
    return (objective, -found.fun) if found.status == 0 else (objective, None)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("tasks", [2, 4])
def test_pareto_da_is_scipys_linear_program(tasks, balance):
    rng = np.random.default_rng(tasks)
    g, v = rng.normal(size=(60, tasks, 5)), rng.normal(size=(60, 5))
    given = jnp.arange(1.0, tasks + 1)
    rule = lambda g, v: pareto_da(  # noqa: E731
        g, target_gradient=v, target_loss=0.7 if balance else 1e-4, preference=given
    )
    weights = jax.jit(jax.vmap(rule))(jnp.asarray(g, "float32"), jnp.asarray(v, "float32")).weights
    solved = 0
    for w, rows, toward in zip(np.asarray(weights) / tasks, g, v, strict=True):
        objective, wanted = linear_program(rows, toward, balance)
        assert w.min() >= 0
        if wanted is None:
            np.testing.assert_allclose(w, given / given.sum(), rtol=0, atol=1e-6)
        else:
            solved += 1
            assert abs(w @ objective - wanted) < 2e-5 * np.abs(objective).max()
    assert solved == 60 if balance else 30 < solved < 60


def test_pareto_da_leaves_out_what_is_not_finite():
    g, v = matrix(draw(2)).astype("float32"), matrix(draw(1, seed=5))[0].astype("float32")
    g[0, 3] = np.nan
    found = PARETO_DA(g, target_gradient=v, target_loss=0.7)
    np.testing.assert_array_equal(found.weights, [0, 2])
    np.testing.assert_array_equal(found.gradient, 2 * g[1])
    # Both are finite; without a target the preference decides.
    lost = PARETO_DA(np.stack([g[1], -g[1]]), target_gradient=v * np.nan, target_loss=0.7)
    np.testing.assert_array_equal(lost.weights, [1, 1])


def test_pareto_da_ends_its_balance_at_eps():
    g, v = np.asarray([[1.0, 0.0], [0.0, 2.0]], "float32"), np.asarray([3.0, 1.0], "float32")
    rule = lambda eps: pareto_da(g, target_gradient=v, target_loss=0.2, eps=eps).weights  # noqa: E731
    found = jax.jit(jax.vmap(rule))(jnp.array([0.1, 0.3]))
    np.testing.assert_allclose(found, [[2, 0], [0, 2]], rtol=0, atol=1e-6)


def test_a_step_lowers_every_task():
    targets = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    steep = jnp.array([1.0, 10.0, 0.1])
    losses = lambda p: steep * jnp.sum((p[None] - targets) ** 2, axis=1)  # noqa: E731
    tx, p = optax.chain(combine_gradients(), optax.sgd(1e-3)), jnp.full(4, 2.0)

    @jax.jit
    def moved(p):
        grads = jax.jacrev(losses)(p)
        updates, _ = tx.update(grads, tx.init(p), p)
        return losses(p + updates) - losses(p), losses(p - 1e-3 * grads.sum(axis=0)) - losses(p)

    change, of_the_sum = moved(p)
    assert (change < 0).all()
    # The plain sum follows the largest.
    assert of_the_sum[1] < change[1]


def test_a_rule_reads_the_extra_arguments_it_names():
    tree = draw(2)
    rule = lambda g, *, first: (None, jax.tree.map(lambda x: first * x[0], g))  # noqa: E731
    tx = combine_gradients(rule)
    found, _ = tx.update(tree, tx.init(None), first=3.0, value=1.0)
    np.testing.assert_array_equal(found["bias"], 3 * tree["bias"][0])
    with pytest.raises(ValueError, match="needs the extra argument 'first', got \\['value'\\]"):
        tx.update(tree, tx.init(None), value=1.0)
    weighted = combine_gradients(functools.partial(mgda, normalize="loss"))
    found, _ = jax.jit(weighted.update)(tree, optax.EmptyState(), losses=jnp.array([1.0, 4.0]))
    wanted = MGDA(tree, normalize="loss", losses=jnp.array([1.0, 4.0])).gradient
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_tasks_give_the_same_gradient(kind):
    mesh, tx = mesh_of(kind), combine_gradients()
    grads = draw(4, shapes={"kernel": (2, 8)})
    weights = shortest(matrix(grads))
    with jax.set_mesh(mesh):
        where = NamedSharding(mesh, PartitionSpec("data", None, "model"))
        placed = jax.tree.map(lambda x: jax.device_put(x, where), grads)
        found = jax.jit(lambda g: tx.update(g, optax.EmptyState())[0])(placed)["kernel"]
        if kind == AxisType.Explicit:
            assert jax.typeof(found).sharding.spec == PartitionSpec(None, "model")
    wanted = np.tensordot(weights, grads["kernel"], 1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mgda(), TypeError, "mgda: gradients are needed, got none. Pass one tree"),
        (lambda: mgda(draw(2), normalize="l1"), ValueError, "normalize must be one of 'l2'"),
        (lambda: mgda(draw(2), normalize="loss"), ValueError, "losses belong to normalize='loss'"),
        (lambda: mgda(draw(2), losses=jnp.ones(2)), ValueError, "losses belong to"),
        (lambda: mgda({"a": jnp.ones((2, 3)), "b": jnp.ones(3)}), ValueError, "leaf 'b' needs"),
        (lambda: mgda({"a": jnp.ones(())}), ValueError, "leaf 'a' needs the tasks along"),
        (lambda: mgda({"a": jnp.ones((2, 3), int)}), TypeError, "leaf 'a' has dtype int32"),
        (
            lambda: pareto_da(jnp.ones((8, 2)), target_gradient=jnp.ones(2), target_loss=1.0),
            ValueError,
            "pareto_da: the gradients must be of at most 7 tasks, got 8. Add some",
        ),
        (
            lambda: pareto_da({"a": jnp.ones((2, 2))}, target_gradient={"a": 0}, target_loss=1.0),
            ValueError,
            r"target_gradient has shape \(\) at 'a', \(2,\) is needed. Take the gradient",
        ),
        (
            lambda: pareto_da(jnp.ones(2), target_gradient=0.0, target_loss=1.0, eps=-1.0),
            ValueError,
            "pareto_da: eps must be a number >= 0, got -1.0",
        ),
        (
            lambda: combine_gradients().update(draw(2), (), jax.tree.map(lambda x: x, draw(2))),
            ValueError,
            r"combine_gradients: leaf 'bias' has shape \(2, 4\) for parameters of \(2, 4\)",
        ),
        (lambda: combine_gradients("mgda"), TypeError, "rule must be a function of gradients"),
    ],
)
def test_what_is_wrong_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
