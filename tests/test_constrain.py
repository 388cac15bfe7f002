"""Updates held to a set: subspaces, before and after Adam, and the zeros of pruned weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import constrain as reference
from stepping import flat, steps

import optlab
from benchmarks import hlo
from optlab import layout
from optlab.compress import shared_basis
from optlab.testing import random_like
from optlab.transforms.constrain import keep_sparsity, project_onto_subspace

LEAVES = {"attn/query/kernel": (6, 2, 4), "conv/kernel": (2, 2, 3, 8), "dense/kernel": (6, 10)}
MATRICES = {"attn/query/kernel": (6, 8), "conv/kernel": (12, 8), "dense/kernel": (6, 10)}
PARAMS = random_like({**LEAVES, "dense/bias": (10,)}, seed=0)
GRADS = [random_like(PARAMS, seed=t + 1) for t in range(5)]
RATE = 0.1


def basis(size, k, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, k)))[0].astype(np.float32)


def bases(side, k=3):
    sizes = {name: shape[side == "cols"] for name, shape in MATRICES.items()}
    return {name: basis(size, k) for name, size in sizes.items()} | {"dense/bias": None}


def matrix(tree, name):
    return np.asarray(tree[name], np.float64).reshape(MATRICES[name])


def run(tx, params=PARAMS, grads=GRADS):
    """Return the parameters after every step."""
    out = []
    for u in steps(tx, grads, params):
        params = optax.apply_updates(params, u)
        out.append(params)
    return out


def outside(u, columns, side):
    """Return the share of u that lies outside of the subspace."""
    rest = reference.project(u, np.float64(columns), away=True, side=side)
    return np.linalg.norm(rest) / np.linalg.norm(u)


# --- a given subspace ---------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(("side", "away"), [("rows", False), ("rows", True), ("cols", True)])
def test_adam_agrees_with_the_reference_on_either_side_of_the_projection(side, away, place):
    link = project_onto_subspace(bases(side), side=side, away=away)
    links = (link, optax.scale_by_adam()) if place == "before" else (optax.scale_by_adam(), link)
    found = run(optax.chain(*links, optax.scale_by_learning_rate(RATE)))[-1]
    for name in LEAVES:
        u = np.float64(bases(side)[name])
        form = functools.partial(reference.project, basis=u, away=away, side=side)
        grads = [matrix(g, name) for g in GRADS]
        (*_, want) = reference.adam(matrix(PARAMS, name), grads, RATE, **{place: form})
        np.testing.assert_allclose(matrix(found, name), want, rtol=0, atol=5e-6, err_msg=name)
    plain = run(optax.adam(RATE))[-1]
    np.testing.assert_allclose(found["dense/bias"], plain["dense/bias"], rtol=1e-6)


@pytest.mark.parametrize("side", ["rows", "cols"])
def test_only_after_adam_does_every_step_lie_in_the_subspace(side):
    link = project_onto_subspace(bases(side), side=side)
    before, after = (
        steps(optax.chain(*links, optax.scale_by_learning_rate(RATE)), GRADS, PARAMS)
        for links in ((link, optax.scale_by_adam()), (optax.scale_by_adam(), link))
    )
    for name in LEAVES:
        columns = bases(side)[name]
        assert all(outside(matrix(u, name), columns, side) < 1e-6 for u in after)
        assert all(outside(matrix(u, name), columns, side) > 0.05 for u in before)


def test_before_and_after_momentum_are_the_same():
    link = project_onto_subspace(bases("rows"), away=True)
    before, after = (
        run(optax.chain(*links, optax.scale(-RATE)))[-1]
        for links in ((link, optax.trace(0.9)), (optax.trace(0.9), link))
    )
    np.testing.assert_allclose(flat(before), flat(after), rtol=0, atol=2e-6)
    assert np.abs(flat(after) - flat(run(optax.sgd(RATE, 0.9))[-1])).max() > 0.1


@pytest.mark.parametrize("k", [0, 1, 6])
def test_onto_and_away_add_up_to_the_update_at_every_rank(k):
    u, columns = {"kernel": GRADS[0]["dense/kernel"]}, basis(6, k)
    onto, away = (
        project_onto_subspace(columns, away=away).update(u, optax.EmptyState())[0]["kernel"]
        for away in (False, True)
    )
    np.testing.assert_allclose(onto + away, u["kernel"], rtol=0, atol=1e-6)
    if k in (0, 6):
        np.testing.assert_allclose(away if k else onto, np.zeros_like(onto), atol=1e-6)
    else:
        assert np.linalg.matrix_rank(onto, tol=1e-5) == k


def test_stacked_layers_have_a_basis_each_or_share_one():
    policy = layout.stacked("^layers")
    u = random_like({"layers/kernel": (3, 6, 4)}, seed=1)
    own = np.stack([basis(6, 2, seed) for seed in range(3)])
    for given in (own, own[0]):
        tx = project_onto_subspace({"layers/kernel": given}, layout=policy)
        found, _ = tx.update(u, tx.init(u))
        for i, layer in enumerate(np.float64(u["layers/kernel"])):
            columns = np.float64(given[i] if given.ndim == 3 else given)
            want = reference.project(layer, columns, away=False, side="rows")
            np.testing.assert_allclose(found["layers/kernel"][i], want, rtol=0, atol=2e-6)


def test_a_tree_a_prefix_and_a_function_are_the_same_basis():
    params = random_like({"a": {"x": (4, 3), "y": (4, 5)}, "b": {"bias": (5,), "z": (4, 2)}}, 0)
    shared = basis(4, 2)
    forms = (
        {"a": {"x": shared, "y": shared}, "b": {"bias": None, "z": None}},
        {"a": shared, "b": None},
        lambda path, leaf: shared if path.startswith("a/") else None,
    )
    found = [project_onto_subspace(f).update(params, optax.EmptyState())[0] for f in forms]
    for other in found[1:]:
        np.testing.assert_array_equal(flat(other), flat(found[0]))
    np.testing.assert_array_equal(found[0]["b"]["z"], params["b"]["z"])
    assert np.linalg.matrix_rank(found[0]["a"]["y"], tol=1e-5) == 2


def test_columns_of_zeros_do_nothing():
    u = {"kernel": GRADS[0]["dense/kernel"]}
    columns = basis(6, 2)
    padded = np.concatenate([columns, np.zeros((6, 3), np.float32)], axis=1)
    got, want = (
        project_onto_subspace(b).update(u, optax.EmptyState())[0] for b in (padded, columns)
    )
    np.testing.assert_allclose(flat(got), flat(want), rtol=0, atol=1e-6)


def test_the_projector_is_never_formed():
    size, k = 512, 4
    u = {"kernel": jax.ShapeDtypeStruct((size, 8), jnp.float32)}
    update = lambda u, b: project_onto_subspace(b).update(u, optax.EmptyState())[0]  # noqa: E731
    step = jax.jit(update).lower(u, jax.ShapeDtypeStruct((size, k), jnp.float32))
    assert f"{size},{size}" not in step.compile().as_text()


def test_bases_given_to_the_step_are_no_constants_of_it():
    u, columns = {"kernel": GRADS[0]["dense/kernel"]}, basis(6, 2)

    def step(u, columns):
        return project_onto_subspace(columns).update(u, optax.EmptyState())[0]

    want = project_onto_subspace(columns).update(u, optax.EmptyState())[0]
    np.testing.assert_allclose(flat(jax.jit(step)(u, columns)), flat(want), rtol=0, atol=1e-6)
    assert not jax.make_jaxpr(step)(u, columns).consts


def test_half_precision_projects_in_float32():
    u = {"kernel": GRADS[0]["dense/kernel"].astype(jnp.bfloat16)}
    columns = basis(6, 2)
    found, _ = project_onto_subspace(columns).update(u, optax.EmptyState())
    exact = reference.project(
        np.float64(u["kernel"].astype(jnp.float32)), np.float64(columns), away=False, side="rows"
    )
    want = jnp.asarray(exact, jnp.bfloat16)
    assert found["kernel"].dtype == jnp.bfloat16
    off = np.abs(np.float32(found["kernel"]) - np.float32(want))
    assert np.all(off <= 2**-8 * np.abs(np.float32(want)) + 1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("side", "away"), [("rows", False), ("cols", True)])
def test_sharded_leaves_are_projected_where_they_lie(kind, side, away):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    specs = {"heads/query/kernel": P("data", "model", None), "up/kernel": P("data", "model")}
    u = random_like({"heads/query/kernel": (16, 4, 8), "up/kernel": (16, 32)}, seed=0)
    given = {name: basis(16 if side == "rows" else 32, 3) for name in specs}
    tx = project_onto_subspace(given, side=side, away=away)
    stepped = lambda p: optax.apply_updates(p, tx.update(p, optax.EmptyState())[0])  # noqa: E731
    want = stepped(u)
    placed = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in u.items()}
    with jax.set_mesh(mesh):
        compiled = jax.jit(stepped).lower(placed).compile()
        found = compiled(placed)
    np.testing.assert_allclose(flat(found), flat(want), rtol=0, atol=1e-5)
    for name, spec in specs.items():
        assert found[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), found[name].ndim)
    # A sum of coordinates for each leaf, and nothing else is sent.
    assert set(hlo.collective_counts(compiled.as_text())) == {"all-reduce"}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_basis_may_be_sharded_like_its_leaf(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    u, columns = random_like({"up/kernel": (16, 32)}, seed=0), basis(16, 3)
    want, _ = project_onto_subspace(columns, away=True).update(u, optax.EmptyState())
    placed = jax.device_put(u, NamedSharding(mesh, P("data", "model")))
    tx = project_onto_subspace(jax.device_put(columns, NamedSharding(mesh, P("data"))), away=True)
    found = jax.jit(lambda u: tx.update(u, optax.EmptyState())[0])(placed)
    np.testing.assert_allclose(flat(found), flat(want), rtol=0, atol=1e-5)
    assert found["up/kernel"].sharding.is_equivalent_to(placed["up/kernel"].sharding, 2)


def _step(tx, params=PARAMS):
    return tx.update(params, tx.init(params), params)


WRONG_BASES = {
    "not_orthonormal": (lambda: project_onto_subspace(2 * basis(6, 2)), "jnp.linalg.qr(basis)[0]"),
    "a_number": (lambda: project_onto_subspace(3), "got int. Give None"),
    "one_vector": (
        lambda: project_onto_subspace({"w": np.ones(3, "f4")}),
        "'w' must be a floating",
    ),
    "side": (lambda: project_onto_subspace(basis(6, 2), side="left"), "one of 'rows', 'cols'"),
    "size": (
        lambda: _step(project_onto_subspace(bases("cols"))),
        "has matrices with 6 rows, got a basis of shape (8, 3). Give (6, 'k'), None",
    ),
    "layers": (
        lambda: _step(project_onto_subspace(np.stack([basis(8, 2)] * 3), side="cols")),
        "'attn/query/kernel' of shape (6, 2, 4) has matrices with 8 cols, got a basis of shape (3,",
    ),
    "tree": (lambda: _step(project_onto_subspace({"w": basis(6, 2)})), "it has the leaves ['w']"),
}


@pytest.mark.parametrize("wrong", WRONG_BASES)
def test_a_wrong_basis_is_refused(wrong):
    call, fix = WRONG_BASES[wrong]
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert str(error.value).startswith("project_onto_subspace: ")
    assert fix in str(error.value)


# --- the subspace that tasks share --------------------------------------------------------------


def _tasks(m, n, seed=0):
    """Return three tasks that change the same two outputs most."""
    rng = np.random.default_rng(seed)
    common = np.linalg.qr(rng.normal(size=(n, 2)))[0]
    return [
        (4 * rng.normal(size=(m, 2)) @ common.T + 0.3 * rng.normal(size=(m, n))).astype("f4")
        for _ in range(3)
    ], common


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_shared_basis_agrees_with_the_reference_and_finds_what_is_common(shape):
    taus, common = _tasks(*shape)
    found = np.asarray(shared_basis([jnp.asarray(tau) for tau in taus], 2))
    want = reference.shared_basis([np.float64(tau.T) for tau in taus], 2)
    np.testing.assert_allclose(found @ found.T, want @ want.T, rtol=0, atol=1e-5)
    assert np.linalg.norm(found.T @ common) ** 2 > 2 * 0.98


def test_shared_basis_takes_shares_sides_and_layers():
    taus, _ = _tasks(12, 8)
    assert shared_basis(taus, 0.5).shape == (8, 4)
    assert shared_basis(taus).shape == (8, 1)  # a sixth of 8, rounded down
    assert shared_basis([np.ones((100, 110), "f4")] * 2, 0.29).shape == (110, 29)
    # Three tasks times int(8/3) vectors each are all there are.
    assert shared_basis(taus, 8).shape == (8, 6)
    rows = shared_basis(taus, 2, side="rows")
    other = shared_basis([tau.T for tau in taus], 2)
    np.testing.assert_allclose(rows @ rows.T, other @ other.T, rtol=0, atol=1e-5)
    layers = shared_basis(np.stack([np.stack([t, 2 * t[::-1]]) for t in taus]), 2)
    one = shared_basis(taus, 2)
    np.testing.assert_allclose(layers[0] @ layers[0].T, one @ one.T, rtol=0, atol=1e-5)
    assert layers.shape == (2, 8, 2)


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        (lambda: shared_basis(np.ones((3, 4), "f4"), 1), "Give one kernel of every task"),
        (lambda: shared_basis(np.ones((2, 3, 4), "f4"), 1, side="left"), "'rows', 'cols'"),
    ],
)
def test_wrong_task_vectors_are_refused(call, fix):
    with pytest.raises(ValueError, match=r"^shared_basis: ") as error:
        call()
    assert fix in str(error.value)


# --- zeros that stay ----------------------------------------------------------------------------

MASKS = {name: np.random.default_rng(9).random(shape) < 0.5 for name, shape in LEAVES.items()}
MASKS |= {"dense/bias": None}
PRUNED = {n: x if MASKS[n] is None else x * MASKS[n] for n, x in PARAMS.items()}


@pytest.mark.parametrize("mask", [None, MASKS], ids=["from_params", "given"])
def test_masked_adamw_agrees_with_the_reference(mask):
    tx = optax.chain(optax.adamw(RATE, weight_decay=0.1), keep_sparsity(mask))
    found = run(tx, PRUNED)
    for name, p in PRUNED.items():
        kept = 1.0 if MASKS[name] is None else MASKS[name]
        grads = [np.float64(g[name]) for g in GRADS]
        want = reference.adam(np.float64(p), grads, RATE, decay=0.1, kept=kept)
        for got, expected in zip(found, want, strict=True):
            np.testing.assert_allclose(got[name], expected, rtol=0, atol=5e-6, err_msg=name)
            np.testing.assert_array_equal(np.asarray(got[name])[np.float64(kept) * p == 0], 0.0)


def test_weights_that_start_off_zero_are_zero_after_the_first_step():
    tx = optax.chain(optax.adamw(RATE), keep_sparsity(MASKS))
    for params in run(tx, PARAMS):
        for name, mask in MASKS.items():
            if mask is not None:
                np.testing.assert_array_equal(np.asarray(params[name])[~mask], 0.0)
                assert np.all(np.asarray(params[name])[mask] != 0)


def test_a_weight_that_meets_zero_moves_on():
    params = {"kernel": jnp.array([[1.0, 0.0]])}
    tx = keep_sparsity()
    state = tx.init(params)
    for u in (-1.0, 0.5):
        updates, state = tx.update({"kernel": jnp.full((1, 2), u)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["kernel"], [[0.5, 0.0]])


def test_what_is_not_finite_stays_out_of_the_zeros():
    params = {"kernel": jnp.array([[0.0, -0.0, 1.0], [0.0, 0.0, jnp.nan]])}
    tx = keep_sparsity()
    bad = {"kernel": jnp.array([[jnp.nan, jnp.inf, 2.0], [-jnp.inf, 1.0, 1.0]])}
    updates, _ = tx.update(bad, tx.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], [[0.0, 0.0, 2.0], [0.0, 0.0, 1.0]])


def test_biases_that_start_at_zero_move_unless_a_mask_says_no():
    params = {"dense": {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}}
    grads = jax.tree.map(jnp.ones_like, params)
    for mask, moves in ((None, 1.0), ({"dense": {"kernel": True, "bias": False}}, 0.0)):
        tx = keep_sparsity(mask)
        updates, _ = tx.update(grads, tx.init(params), params)
        np.testing.assert_array_equal(updates["dense"]["bias"], [moves, moves])


@pytest.mark.parametrize("mask", [None, lambda params: MASKS], ids=["from_params", "function"])
def test_one_in_front_hides_pruned_weights_from_moments_and_clipping(mask):
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    tx = optax.chain(keep_sparsity(mask), inner, optax.scale(-RATE), keep_sparsity(mask))
    state = tx.init(PRUNED)
    _, state = tx.update(GRADS[0], state, PRUNED)
    moments = state[1][1]
    shown = {n: g if MASKS[n] is None else g * MASKS[n] for n, g in GRADS[0].items()}
    norm = np.linalg.norm(flat(shown))
    assert norm > 1
    for name, g in shown.items():
        np.testing.assert_allclose(moments.mu[name], 0.1 * g / norm, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(moments.nu[name] == 0, g == 0)


def test_lower_precision_gets_there_in_a_few_steps():
    params = {"kernel": jnp.asarray(PARAMS["dense/kernel"])}
    tx = keep_sparsity({"kernel": False})
    state = tx.init(params)
    for _ in range(4):
        grads = jax.tree.map(lambda p: jnp.ones_like(p, jnp.bfloat16), params)
        updates, state = tx.update(grads, state, params)
        assert updates["kernel"].dtype == jnp.bfloat16
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["kernel"], np.zeros((6, 10)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("given", [False, True])
def test_the_mask_lies_where_the_parameter_does(kind, given):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    where = NamedSharding(mesh, P("data", "model"))
    mask = np.random.default_rng(0).random((8, 4)) < 0.5
    start = {"kernel": np.where(mask, 1.0, 0.0).astype("f4")}
    params = jax.device_put(start, where)
    tx = keep_sparsity({"kernel": mask} if given else None)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        updates, after = jax.jit(tx.update)(params, state, params)
    assert state.held["kernel"].sharding.is_equivalent_to(where, 2)
    assert tx.init(params).held["kernel"].sharding.is_equivalent_to(where, 2)
    assert jax.typeof(after.held["kernel"]) == jax.typeof(state.held["kernel"])
    np.testing.assert_array_equal(updates["kernel"], start["kernel"])
    told = optlab.state_sharding(tx, params)
    assert told.held["kernel"].is_equivalent_to(where, 2)


def _pattern(n, m, axis, shape):
    """Return ones with the first n of every m zero along an axis."""
    place = np.arange(shape[axis]) % m
    return np.broadcast_to(
        np.expand_dims(place >= n, [a for a in range(len(shape)) if a != axis]), shape
    ).astype("f4")


def test_a_pattern_is_counted_along_the_inputs_of_every_matrix():
    stack = layout.stacked("^layers")
    good = {
        "layers/kernel": _pattern(2, 4, 1, (3, 8, 4)),
        "dense/kernel": np.ones((6, 4), "f4"),  # dense, so it needs no pattern
        "bias": np.zeros(3, "f4"),
    }
    keep_sparsity(pattern=(2, 4), layout=stack).init(good)
    jax.jit(keep_sparsity(pattern=(2, 4), layout=stack).init)(good)
    torch = {"weight": _pattern(2, 4, 1, (3, 8))}
    keep_sparsity(pattern=(2, 4), layout=layout.output_first).init(torch)
    wrong = {
        "along_the_outputs": {"layers/kernel": _pattern(2, 4, 2, (3, 8, 4))},
        "too_few": {"layers/kernel": _pattern(1, 4, 1, (3, 8, 4))},
        "a_rest": {"dense/kernel": np.zeros((6, 4), "f4")},
    }
    for tree in wrong.values():
        with pytest.raises(ValueError, match="must have 2 zeros in every 4 consecutive inputs"):
            keep_sparsity(pattern=(2, 4), layout=stack).init(tree)


WRONG_MASKS = {
    "shape": (lambda: keep_sparsity({"w": np.ones(3, bool)}), "'w' must be bools of shape (2, 3)"),
    "numbers": (lambda: keep_sparsity({"w": np.ones((2, 3))}), "got float64(2, 3)"),
    "a_word": (lambda: keep_sparsity({"w": "all"}), "got str. True keeps an entry"),
    "tree": (lambda: keep_sparsity({"v": True}), "it has the leaves ['v']"),
    "pattern": (lambda: keep_sparsity(pattern=(4, 2)), "with 0 < n < m, got (4, 2)"),
    "ratio": (lambda: keep_sparsity(pattern=0.5), "got 0.5. 2:4 is (2, 4)"),
}


@pytest.mark.parametrize("wrong", WRONG_MASKS)
def test_a_wrong_mask_is_refused(wrong):
    make, fix = WRONG_MASKS[wrong]
    with pytest.raises(ValueError, match=r"^keep_sparsity: ") as error:
        make().init({"w": jnp.ones((2, 3))})
    assert fix in str(error.value)


def test_params_are_asked_for():
    tx = keep_sparsity()
    with pytest.raises(ValueError, match="keep_sparsity: update needs the current parameters"):
        tx.update(PARAMS, tx.init(PARAMS))
