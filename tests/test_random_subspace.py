"""Laws of `random_subspace`: its maps, their transposes, and that only coordinates are trained."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference.random_subspace import fastfood_matrix
from reference.random_subspace import random_subspace as reference
from stepping import FULL, flat, steps

import optlab
from optlab.linalg import fastfood
from optlab.testing.case import random_like
from optlab.transforms import random_subspace as module
from optlab.transforms.random_subspace import random_subspace

SHAPES = {"a": (6, 5), "b": (5,), "c": (), "d": (5, 2, 3)}
STEPS = 6
# Absolute, on parameters of size 1: a few roundings.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}
KINDS = {
    "fastfood": {},
    "dense": {"kind": "dense"},
    "orthonormal": {"kind": "dense", "orthonormal": True},
}
# A normal number is the same in every program if a loop rounds it as a vector does.
compiled = functools.partial(jax.jit, compiler_options=FULL)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_kind_and_form = pytest.mark.parametrize(
    ("kind", "scales"),
    [("fastfood", False), ("fastfood", True), ("dense", True), ("orthonormal", False)],
)
# Emits what is passed as `move`, in coordinates.
MOVED = optax.GradientTransformationExtraArgs(
    optax.init_empty_state, lambda g, state, params=None, *, move, **_: (move, state)
)


def _tree(dtype="float64", seed=0):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), random_like(SHAPES, seed))


def _maps(params, dim, **arguments):
    """Return P_l of every leaf as a matrix, column by column."""
    tx = random_subspace(MOVED, dim, **arguments)
    state = tx.init(params)
    column = jax.vmap(lambda move: tx.update(params, state, params, move=move)[0])
    columns = compiled(column)(jnp.eye(dim, dtype=state.coordinates.dtype))
    return {k: np.asarray(x, np.float64).reshape(dim, -1).T for k, x in columns.items()}


def _jitted(tx):
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


def _stacked(maps):
    return np.concatenate(list(maps.values()))


@functools.cache
def _exact(kind, dim):
    """Return `_maps` in float64, computed once."""
    with jax.enable_x64(True):
        return _maps(_tree(), dim, **KINDS[kind])


def test_hadamard_is_the_orthogonal_matrix():
    with jax.enable_x64(True):
        for bits in (0, 1, 3, 4, 7):
            found = fastfood.hadamard(jnp.eye(2**bits))
            want = fastfood_matrix(
                np.ones(2**bits), np.arange(2**bits), np.ones(2**bits), 2**bits, 2**bits
            )
            np.testing.assert_allclose(want, np.eye(2**bits), atol=1e-12)  # H H is one
            np.testing.assert_allclose(found @ found, np.eye(2**bits), atol=1e-12)
            rows = np.arange(2**bits)
            signs = [[(-1) ** (i & j).bit_count() for j in rows.tolist()] for i in rows.tolist()]
            np.testing.assert_allclose(found, np.array(signs) / math.sqrt(2**bits), atol=1e-12)


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 7, 12])
def test_order_is_a_permutation(bits):
    orders = [
        fastfood.permutation(jax.random.bits(jax.random.key(seed), (4, 2)), bits)
        for seed in range(5)
    ]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(2**bits))
    if bits > 2:
        assert len(np.unique(orders, axis=0)) == 5


def test_draws_are_normal_and_signs_are_fair():
    parts = fastfood.draw(jax.random.key(0), 2**16, jnp.float32)
    g, sigma = np.asarray(parts.normals, np.float64), 2**-8
    for power, want in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert abs(np.mean(g**power) - want) < 5 * math.sqrt(96) * sigma
    assert set(np.unique(parts.signs)) == {-1.0, 1.0}
    assert abs(np.mean(parts.signs)) < 5 * sigma
    # The sign and the normal of an entry share a word of the generator, not its bits.
    assert abs(np.mean(parts.signs * g)) < 5 * sigma
    extremes = fastfood._normals(jnp.array([0, 2**32 - 1], jnp.uint32))
    assert np.isfinite(extremes).all()
    np.testing.assert_allclose(extremes[0], -extremes[1], rtol=1e-6)


@pytest.mark.parametrize(("size", "dim"), [(1, 1), (1, 7), (5, 3), (64, 7), (100, 20), (30, 200)])
def test_fastfood_is_the_papers_matrix_and_project_its_transpose(size, dim):
    with jax.enable_x64(True):
        length = fastfood.length(size, dim)
        parts = fastfood.draw(jax.random.key(size), length, jnp.float64)
        want = fastfood_matrix(*(np.asarray(part) for part in parts), size, dim)
        expand = jax.vmap(lambda z: fastfood.cut(fastfood.expand(parts, z), size))
        project = jax.vmap(lambda x: fastfood.project(parts, fastfood.fill(x, length), dim))
        np.testing.assert_allclose(expand(jnp.eye(dim)).T, want, atol=1e-12)
        np.testing.assert_allclose(project(jnp.eye(size)), want, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 50, 2**20])
def test_dense_chunks_are_rows_of_one_matrix(chunk, monkeypatch):
    monkeypatch.setattr(fastfood, "CHUNK", chunk)
    key = jax.random.key(3)
    with jax.enable_x64(True):
        z, x = (jnp.asarray(random_like((n,), 1), jnp.float64) for n in (7, 23))
        matrix = compiled(lambda: fastfood.dense(key, 23, 7, jnp.float64))()
        assert np.linalg.matrix_rank(matrix) == 7
        expanded = compiled(lambda z: fastfood.expand_dense(key, z, 23))(z)
        np.testing.assert_allclose(expanded, matrix @ z, atol=1e-12)
        product, squares = compiled(lambda x: fastfood.project_dense(key, x, 7))(x)
        np.testing.assert_allclose(product, matrix.T @ x, atol=1e-12)
        np.testing.assert_allclose(squares, np.sum(matrix**2, 0), atol=1e-12)


@each_kind
@pytest.mark.parametrize("dim", [3, 40])
def test_the_gradient_of_the_coordinates_is_by_the_true_transpose(kind, dim):
    with jax.enable_x64(True):
        tx, g = random_subspace(optax.identity(), dim, **KINDS[kind]), _tree(seed=1)
        _, state = compiled(tx.update)(g, tx.init(g))
        np.testing.assert_allclose(state.coordinates, _stacked(_exact(kind, dim)).T @ flat(g))


def test_columns_have_the_norms_that_are_stated():
    np.testing.assert_allclose(np.linalg.norm(_stacked(_exact("dense", 40)), axis=0), 1)
    whole = _stacked(_exact("orthonormal", 40))
    np.testing.assert_allclose(whole.T @ whole, np.eye(40), atol=1e-12)
    alone = _maps({"w": jnp.ones((8, 4))}, 20)["w"]  # D = L: exactly 1
    np.testing.assert_allclose(np.linalg.norm(alone, axis=0), 1, rtol=1e-5)
    squares = [np.mean(np.sum(m**2, 0)) for m in _exact("fastfood", 40).values()]
    np.testing.assert_allclose(squares, 1, atol=0.5)  # one for every leaf


@pytest.mark.parametrize("dtype", TOLERANCE)
@each_kind_and_form
def test_trajectory_is_the_references(kind, scales, dtype):
    rate, momentum, leaves = 0.1, 0.9, len(SHAPES)
    with jax.enable_x64(True):
        trees = [_tree(seed=t) for t in range(STEPS + 1)]
    start, *grads = [[np.asarray(x) for x in tree.values()] for tree in trees]
    maps = list(_exact(kind, 9).values())
    expected = reference(start, grads, maps, rate, momentum, scales)
    with jax.enable_x64(dtype == "float64"):
        inner, dim = optax.sgd(rate, momentum=momentum), 9 + leaves * scales
        tx = random_subspace(inner, dim, layerwise_scale=scales, **KINDS[kind])
        params, *fed = [{k: jnp.asarray(x, dtype) for k, x in tree.items()} for tree in trees]
        state, step = tx.init(params), compiled(tx.update)
        for t, (g, want) in enumerate(zip(fed, expected, strict=True)):
            updates, state = step(g, state, params)
            params = optax.apply_updates(params, updates)
            for name, x, y in zip(SHAPES, params.values(), want, strict=True):
                np.testing.assert_allclose(
                    x, y, rtol=0, atol=TOLERANCE[dtype], err_msg=f"{t}, {name}"
                )


def _loss(params):
    terms = jax.tree.map(lambda p: jnp.sum(jnp.cosh(p - 0.3)) + jnp.sum(p) ** 2 / 9, params)
    return sum(jax.tree.leaves(terms))


@each_kind_and_form
def test_training_is_that_of_the_coordinates_themselves(kind, scales):
    """Adam with decay on z, by autodiff through theta_0 + lam P z, in float64."""
    inner = optax.adamw(0.05, weight_decay=0.1)
    dim = 9 + len(SHAPES) * scales
    with jax.enable_x64(True):
        start = params = _tree()
        maps = {k: jnp.asarray(m) for k, m in _exact(kind, 9).items()}

        def at(coordinates):
            z = coordinates["z"] if scales else coordinates
            lam = coordinates["scale"] if scales else jnp.ones(len(SHAPES))
            moved = zip(start.items(), lam, strict=True)
            return {k: p + (s * (maps[k] @ z)).reshape(p.shape) for (k, p), s in moved}

        tx = random_subspace(inner, dim, layerwise_scale=scales, **KINDS[kind])
        state, step = tx.init(params), compiled(tx.update)
        coordinates, theirs = state.coordinates, inner.init(state.coordinates)
        descend = jax.jit(lambda c, s: inner.update(jax.grad(lambda c: _loss(at(c)))(c), s, c))
        for _ in range(STEPS):
            updates, state = step(jax.grad(_loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            changes, theirs = descend(coordinates, theirs)
            coordinates = optax.apply_updates(coordinates, changes)
        for found, want in ((params, at(coordinates)), (state.coordinates, coordinates)):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), found, want)
        assert _loss(params) < 0.98 * _loss(start)


@each_kind
def test_all_moves_lie_in_the_range_of_the_map_where_the_state_says(kind):
    maps = _stacked(_exact(kind, 7))
    tx, params = random_subspace(optax.adam(0.1), 7, **KINDS[kind]), _tree("float32")
    state, moved, step = tx.init(params), 0.0, compiled(tx.update)
    for t in range(3):
        updates, state = step(_tree("float32", seed=t + 1), state, params)
        moved = moved + flat(updates)
        np.testing.assert_allclose(moved, maps @ np.asarray(state.coordinates), atol=1e-6)
    assert np.linalg.norm(moved) > 0.1


def test_all_orthonormal_coordinates_are_plain_descent():
    grads, rate = [_tree("float32", seed=t) for t in range(4)], optax.sgd(0.1, momentum=0.9)
    tx = random_subspace(rate, 66, kind="dense", orthonormal=True)
    for found, want in zip(
        steps(_jitted(tx), grads[1:], grads[0]), steps(rate, grads[1:], grads[0]), strict=True
    ):
        np.testing.assert_allclose(flat(found), flat(want), atol=2e-6)


@each_kind
def test_a_seed_is_one_subspace_in_every_precision(kind):
    params = _tree("float32")
    maps = [_stacked(_maps(params, 5, seed=seed, **KINDS[kind])) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(maps[0], maps[1])
    np.testing.assert_allclose(maps[0], _stacked(_exact(kind, 5)), atol=2e-6)
    cosines = np.linalg.svd(np.linalg.qr(maps[0])[0].T @ np.linalg.qr(maps[2])[0])[1]
    assert cosines.max() < 0.9


def test_leaves_of_one_shape_have_maps_of_their_own():
    maps = list(_maps({"a": jnp.ones((4, 8)), "b": jnp.ones((4, 8))}, 5).values())
    assert np.abs(maps[0] - maps[1]).max() > 0.1


@pytest.mark.parametrize("kind", ["fastfood", "dense"])
def test_large_leaves_one_by_one_are_those_together(kind, monkeypatch):
    params = {name: jnp.ones((4, 8)) for name in "abc"}
    together = _maps(params, 5, **KINDS[kind])
    monkeypatch.setattr(module, "TOGETHER", 1)
    alone = _maps(params, 5, **KINDS[kind])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), alone, together)


def test_large_leaves_need_the_memory_of_one():
    """Eight leaves of 2^20: what is drawn for one is gone before the next."""
    params = {f"{i}": jax.ShapeDtypeStruct((2**20,), jnp.float32) for i in range(8)}
    tx = random_subspace(optax.sgd(0.1), 200)
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(tx.update, donate_argnums=0).lower(params, state).compile()
    found = compiled.memory_analysis().temp_size_in_bytes / 2**22
    # The stack of the gradients, that of the updates, and seven vectors of a leaf's size.
    assert found < 24, f"{found} leaves"


@each_kind_and_form
def test_an_explicit_mesh_gives_one_devices_numbers(kind, scales):
    specs = {"a": PartitionSpec("x", None), "b": PartitionSpec(), "c": PartitionSpec()}
    specs |= {"d": PartitionSpec(None, "x", None)}
    inner = optax.adam(0.1)
    tx = random_subspace(inner, 9, layerwise_scale=scales, **KINDS[kind])
    trees = [_tree("float32", seed=t) for t in range(3)]
    want = steps(_jitted(tx), trees[1:], trees[0])
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        trees = [
            {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}
            for tree in trees
        ]
        state, step = jax.jit(tx.init)(trees[0]), jax.jit(tx.update)
        for g, expected in zip(trees[1:], want, strict=True):
            updates, state = step(g, state)
            for k, u in updates.items():
                assert u.sharding.is_equivalent_to(trees[0][k].sharding, u.ndim)
            np.testing.assert_allclose(flat(updates), flat(expected), atol=1e-5)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))


def test_decay_inside_pulls_the_parameters_to_their_start():
    inner = optax.chain(optax.add_decayed_weights(0.5), optax.scale(-1.0))
    tx, start = _jitted(random_subspace(inner, 5)), _tree("float32")
    updates, state = tx.update(_tree("float32", seed=1), tx.init(start), start)
    away = flat(updates)
    for _ in range(3):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, start), state, start)
        away = away + flat(updates)
    np.testing.assert_allclose(
        away, flat(steps(tx, [_tree("float32", seed=1)], start)) / 8, atol=1e-6
    )


@pytest.mark.parametrize("scales", [False, True])
def test_inner_sees_the_coordinates_as_parameters_and_every_extra_argument(scales):
    seen = {}

    def spy(updates, state, params=None, **extra_args):
        seen.update(updates=updates, params=params, **extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, spy)
    tx, params = random_subspace(inner, 9, layerwise_scale=scales), _tree("float32")
    _, state = tx.update(params, tx.init(params), note=3)
    tx.update(params, state, note=4)
    assert seen["note"] == 4
    shapes = {"scale": (4,), "z": (5,)} if scales else (9,)
    for tree in (seen["params"], seen["updates"]):
        assert jax.tree.map(jnp.shape, tree) == shapes
    jax.tree.map(np.testing.assert_array_equal, seen["params"], state.coordinates)


def test_all_of_the_state_is_a_few_numbers():
    kernel = {"w": jax.ShapeDtypeStruct((2**15, 2**15), jnp.bfloat16)}
    state = jax.eval_shape(random_subspace(optax.adam(0.1), 200).init, kernel)
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == 4 * (3 * 200 + 1)


WRONG = {
    "inner": (lambda: random_subspace(optax.sgd, 5), TypeError, "inner must be an optax.Grad"),
    "no_dim": (lambda: random_subspace(optax.sgd(1.0), 0), ValueError, "dim must be a whole"),
    "fraction": (lambda: random_subspace(optax.sgd(1.0), 0.5), TypeError, "dim must be a whole"),
    "kind": (
        lambda: random_subspace(optax.sgd(1.0), 5, kind="fastfod"),
        ValueError,
        "kind must be one of 'fastfood', 'dense', got 'fastfod'. Did you mean 'fastfood'?",
    ),
    "seed": (lambda: random_subspace(optax.sgd(1.0), 5, seed=-1), ValueError, "seed must be"),
    "orthonormal": (
        lambda: random_subspace(optax.sgd(1.0), 5, orthonormal=True),
        ValueError,
        'orthonormal must be False for kind="fastfood", got True. Write kind="dense".',
    ),
    "too_many": (
        lambda: random_subspace(optax.sgd(1.0), 67, **KINDS["orthonormal"]).init(_tree("float32")),
        ValueError,
        "needs dim <= the number of parameters, 66, got 67. Write a smaller dim",
    ),
    "all_spent": (
        lambda: random_subspace(optax.sgd(1.0), 4, layerwise_scale=True).init(_tree("float32")),
        ValueError,
        "dim must be above the number of leaves with layerwise_scale",
    ),
    "other_leaves": (
        lambda: steps(
            random_subspace(optax.sgd(1.0), 9, layerwise_scale=True),
            [{"a": None} | {k: x for k, x in _tree("float32").items() if k != "a"}],
            _tree("float32"),
        ),
        ValueError,
        "the updates have 3 leaves, init saw 4. Pass gradients of the very parameters",
    ),
    "integers": (
        lambda: random_subspace(optax.sgd(1.0), 5).init({"ids": jnp.arange(3)}),
        TypeError,
        "leaf 'ids' has dtype int32, floating point is needed",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_refused_with_the_fix(name):
    call, kind, text = WRONG[name]
    with pytest.raises(kind) as error:
        call()
    assert str(error.value).startswith("random_subspace: ")
    assert text in str(error.value)


def test_optlab_chains_with_it():
    tx = optax.chain(random_subspace(optlab.scale_by_moments(), 5), optax.scale(-0.1))
    params = _tree("float32")
    (u,) = steps(tx, [params], params)
    assert np.isfinite(flat(u)).all()
    assert np.linalg.norm(flat(u)) > 0
