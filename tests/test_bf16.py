"""bfloat16 and float16 parameters take the steps of float32 ones."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_problem import mesh_of
from rows import fed

import optlab
from optlab import recipes
from optlab.linalg import rounding
from optlab.testing import Case, default_params, run_check
from optlab.transforms.narrow import apply_updates_stochastic, compensated_updates

BFLOAT16, FLOAT16, FLOAT32 = jnp.bfloat16, jnp.float16, jnp.float32
by_gradient = pytest.mark.parametrize("given", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
ADAM, STEPS, KEY = optax.adam(1e-3), 100, jax.random.key(0)


def normal(shape, seed, dtype=FLOAT32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def wide(tree):
    return jax.tree.map(lambda x: x.astype(FLOAT32), tree)


def random(params, updates, t):
    return apply_updates_stochastic(params, updates, jax.random.fold_in(KEY, t))


def trained(tx, params, grads, apply=lambda p, u, t: optax.apply_updates(p, u)):
    """Return parameters and state after a step for every entry of the gradients."""

    def body(carry, both):
        (params, state), (g, t) = carry, both
        updates, state = tx.update(g, state, params)
        return (apply(params, updates, t), state), None

    steps = jnp.arange(len(jax.tree.leaves(grads)[0]))
    run = jax.jit(lambda p, gs: jax.lax.scan(body, (p, tx.init(p)), (gs, steps))[0])
    return run(params, grads)


def stepped(tx, params, grads):
    """Return what `trained` does, op by op: the compiled programs of two loops round apart."""
    state = tx.init(params)
    for t in range(len(grads)):
        updates, state = tx.update(grads[t], state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def spacing(x, dtype=BFLOAT16):
    """Return the distance of neighbours at x, in the normal range of a dtype."""
    return 2.0 ** (np.floor(np.log2(np.abs(x))) - ml_dtypes.finfo(dtype).nmant)


@by_gradient
def test_adam_moves_a_one_that_a_plain_sum_leaves_alone(given):
    ones, grads = jnp.ones(4, BFLOAT16), jnp.ones((STEPS, 4), given)
    # Moments that keep their dtypes, which Adam's of bfloat16 parameters and wide gradients do not.
    fed = lambda p, u, t: optax.apply_updates(p, u.astype(given))  # noqa: E731
    still = ones
    for _ in range(STEPS):
        still = optax.apply_updates(still, jnp.full(4, -1e-3, given))
    np.testing.assert_array_equal(still, ones)
    x, _ = trained(ADAM, wide(ones), wide(grads))
    np.testing.assert_allclose(x, 0.9, atol=1e-5)
    p, _ = trained(compensated_updates(ADAM), ones, grads, fed)
    assert p.dtype == BFLOAT16
    np.testing.assert_array_equal(p, x.astype(BFLOAT16))


@by_gradient
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
def test_compensated_parameters_are_those_of_float32_rounded(dtype, given):
    start = normal((64, 32), 0, dtype)
    grads = normal((STEPS, 64, 32), 1, given)
    adamw = optax.adamw(1e-3, weight_decay=0.1)
    tx = optax.GradientTransformationExtraArgs(adamw.init, jax.jit(adamw.update))
    x, _ = stepped(tx, wide(start), wide(grads))
    p, state = stepped(compensated_updates(tx), start, grads)
    found = rounding.with_rest(wide(p), state.rest)
    if (dtype, given) == (BFLOAT16, FLOAT32):
        np.testing.assert_array_equal(found, x)
        np.testing.assert_array_equal(p, rounding.nearest_with_rest(x, BFLOAT16).astype(BFLOAT16))
    # Narrow updates longer than their parameter are rounded; float16 has no room for a rest below
    # its normal range; in steps of about 1e-3 either costs at most 2^-9 of one.
    lost = 0 if given == FLOAT32 and dtype == BFLOAT16 else STEPS * 1.2e-3 * 2**-9
    np.testing.assert_allclose(found, x, rtol=2**-24, atol=lost)
    gap = np.maximum(spacing(x, dtype), spacing(p.astype(FLOAT32), dtype))
    assert np.all(np.abs(wide(p) - x) <= gap / 2 + lost)
    assert np.abs(x - wide(start)).max() > 0.02
    plain, _ = trained(tx, wide(start), wide(grads), lambda p, u, t: nearest_sum(p, u, dtype))
    if dtype == BFLOAT16:  # steps of 1e-3 are below half a spacing of most weights
        assert np.abs(plain - x).mean() > 5 * np.abs(wide(p) - x).mean()


def nearest_sum(p, u, dtype):
    """Return what a plain sum of narrow parameters gives, in float32."""
    return rounding.nearest(rounding.nearest(p, dtype) + u, dtype)


def test_a_run_of_single_calls_is_the_run_in_one_program():
    # XLA may keep in float32 what a program of many steps rounds to bfloat16 between them.
    start, grads = normal((32,), 0, BFLOAT16), normal((6, 32), 1)
    tx = compensated_updates(optax.sgd(1e-3))
    want, state = start, tx.init(start)
    for g in grads:
        updates, state = tx.update(g, state, want)
        want = optax.apply_updates(want, updates)

    @jax.jit
    def unrolled(p):
        state = tx.init(p)
        for g in grads:
            updates, state = tx.update(g, state, p)
            p = optax.apply_updates(p, updates)
        return p, state.rest

    for found, expected in zip(unrolled(start), (want, state.rest), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(want, start)


def test_steps_of_a_thousandth_of_a_spacing_add_up():
    ones = jnp.ones(1, BFLOAT16)
    tiny = jnp.full((5000, 1), 2.0**-17)
    p, state = trained(compensated_updates(optax.scale(1.0)), ones, tiny)
    assert float(p[0]) == 1 + 5 * 2**-7  # 4.88 spacings
    assert float(rounding.with_rest(wide(p), state.rest)[0]) == 1 + 5000 * 2**-17


@by_gradient
def test_stochastic_steps_are_right_on_average(given):
    count, d = 4096, 1e-3 * 2**8  # of a spacing below 1
    ones = jnp.ones(count, BFLOAT16)
    step = jnp.full(count, -1e-3, given)
    d = -float(step[0]) * 2**8
    p, _ = trained(optax.identity(), ones, jnp.broadcast_to(step, (STEPS, count)), random)
    assert p.dtype == BFLOAT16
    moved = (np.asarray(wide(p)) - 1) * 2**8
    std = np.sqrt(STEPS * d * (1 - d))
    assert abs(moved.mean() + STEPS * d) < 5 * std / np.sqrt(count)
    assert abs(moved.std() / std - 1) < 5 / np.sqrt(2 * count)


def test_stochastic_adam_follows_float32():
    start, grads = normal((64, 64), 0, BFLOAT16), normal((STEPS, 64, 64), 1)
    x, _ = trained(ADAM, wide(start), grads)
    drawn = lambda p, u, t: random(p, u, t)  # noqa: E731
    tx = optax.GradientTransformation(lambda p: ADAM.init(wide(p)), ADAM.update)
    p, _ = trained(tx, start, grads, drawn)
    error = np.asarray(wide(p) - x)
    size = np.maximum(np.abs(x), np.abs(wide(start))) + STEPS * 1e-3
    assert np.all(np.abs(error) < 6 * np.sqrt(STEPS) / 2 * spacing(size))
    # Independent errors of mean 0: of their mean, five standard deviations.
    bound = np.sqrt(np.mean(STEPS / 4 * spacing(size) ** 2) / x.size)
    assert abs(error.mean()) < 5 * bound


def mixed(dtype=BFLOAT16):
    """Return leaves of four dtypes, a hole, a scalar, and their updates."""
    params = {
        "half": normal((8, 4), 0, dtype),
        "hole": None,
        "masked": optax.MaskedNode(),
        "other": normal((3,), 1, FLOAT16),
        "scalar": jnp.asarray(1.5, dtype),
        "whole": normal((5,), 2),
    }
    return params, jax.tree.map(lambda p: jnp.full(p.shape, 2.0**-12), params)


@pytest.mark.parametrize("given", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_a_mixed_tree_keeps_its_types(given):
    params, updates = mixed()
    updates = jax.tree.map(lambda u: u.astype(given), updates)
    tx = compensated_updates(optax.identity())
    state = tx.init(params)
    assert state.rest["half"].dtype == jnp.int16
    assert isinstance(state.rest["whole"], optax.MaskedNode)
    new, after = jax.jit(tx.update)(updates, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (new, after)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), (updates, state)
    )
    landed = jax.jit(optax.apply_updates)(params, new)
    drawn = jax.jit(apply_updates_stochastic)(params, updates, KEY)
    for tree in (landed, drawn):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
        assert jax.tree.map(lambda x: x.dtype, tree) == jax.tree.map(lambda x: x.dtype, params)
        np.testing.assert_array_equal(tree["whole"], params["whole"] + updates["whole"])


def test_missing_gradients_and_masks_leave_parameters_and_rests():
    params, updates = mixed()
    updates["half"] = None
    tx = compensated_updates(optax.identity())
    new, state = tx.update(updates, tx.init(params), params)
    assert new["half"] is None
    assert not np.any(state.rest["half"])
    drawn = apply_updates_stochastic(params, updates, KEY)
    np.testing.assert_array_equal(drawn["half"], params["half"])
    del params["hole"], params["half"], updates["hole"], updates["half"]
    again = apply_updates_stochastic(params, updates, KEY)
    np.testing.assert_array_equal(again["other"], drawn["other"])
    assert apply_updates_stochastic({}, {}, KEY) == {}
    only = optax.masked(tx, {"half": True, "whole": False})
    params, updates = ({k: tree[k] for k in ("half", "whole")} for tree in mixed())
    new, _ = only.update(updates, only.init(params), params)
    np.testing.assert_array_equal(new["whole"], updates["whole"])
    assert set(np.unique(new["half"] / spacing(params["half"]))) <= {-0.5, 0, 0.5, 1}


def test_a_zero_update_moves_nothing():
    params, _ = mixed()
    params.pop("hole")
    zeros = jax.tree.map(jnp.zeros_like, params)
    drawn = apply_updates_stochastic(params, zeros, KEY)
    jax.tree.map(np.testing.assert_array_equal, drawn, params)
    # Of what is a rest it moves nothing either.
    tx = compensated_updates(optax.identity())
    p, state = jnp.ones(3, BFLOAT16), tx.init(jnp.ones(3, BFLOAT16))
    _, moved = tx.update(jnp.full(3, 2.0**-10), state, p)
    update, same = tx.update(jnp.zeros(3), moved, p)
    assert np.all(moved.rest == 2**13)
    np.testing.assert_array_equal(same.rest, moved.rest)
    assert not np.any(update)


def test_the_inner_transformation_sees_float32_and_the_rest():
    seen = []

    def update(updates, state, params=None, **extra_args):
        seen.append((updates.dtype, params, extra_args))
        return updates, state

    tx = compensated_updates(optax.GradientTransformationExtraArgs(lambda p: p.dtype.num, update))
    p = jnp.ones(2, BFLOAT16)
    state = tx.init(p)
    assert state.inner == FLOAT32.dtype.num
    for _ in range(2):
        u, state = tx.update(jnp.full(2, 2.0**-10, BFLOAT16), state, p, value=3)
        p = optax.apply_updates(p, u)
    assert [s[0] for s in seen] == [FLOAT32] * 2
    np.testing.assert_array_equal(seen[1][1], np.full(2, 1 + 2**-10, "f4"))
    assert seen[1][2] == {"value": 3}


def test_parameters_set_by_something_else_are_off_by_half_a_spacing_at_most():
    tx = compensated_updates(optax.identity())
    p = jnp.ones(5, BFLOAT16)
    _, state = tx.update(jnp.full(5, -(2.0**-9)), tx.init(p), p)
    assert np.all(state.rest < 0)
    new = jnp.asarray([0, -2, 2e-38, np.inf, np.nan], BFLOAT16)
    u, _ = tx.update(jnp.zeros(5), state, new)
    landed = optax.apply_updates(new, u)
    np.testing.assert_array_equal(landed[:3], new[:3])
    assert not np.any(np.isfinite(wide(landed)[3:]))
    huge = jnp.full(2, jnp.finfo(BFLOAT16).max, BFLOAT16)
    u, state = tx.update(jnp.full(2, 1e36), tx.init(huge), huge)  # above it, below float32's
    assert np.all(np.isfinite(wide(optax.apply_updates(huge, u))))


def recipe(name):
    arguments = {"lion_k": {"kappa": "l2"}}.get(name, {})
    rank = {"rank": 2} if name in ("galore", "q_galore", "fira", "apollo", "ldadam") else {}
    rate = 1.0 if name == "lars" else 1e-3  # of the norm of the weights, a thousandth
    make = getattr(recipes, name)
    if name == "sophia":
        make = fed(make, curvature=lambda updates: jax.tree.map(jnp.square, updates))
    return make(learning_rate=rate, **arguments, **rank)


@pytest.mark.parametrize("name", recipes.__all__)
def test_a_recipe_follows_its_float32_run(name):
    shapes = {"dense": {"bias": (8,), "kernel": (8, 16)}}
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    draw = lambda seed, dtype: jax.tree.map(  # noqa: E731
        lambda s: normal(s, seed, dtype), shapes, is_leaf=is_shape
    )
    tx = recipe(name)
    inner = optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))  # compiled once
    kept = compensated_updates(inner)
    p, plain, x = draw(0, BFLOAT16), draw(0, BFLOAT16), wide(draw(0, BFLOAT16))
    state, inner_state = kept.init(p), inner.init(x)
    for t in range(4):
        g = draw(t + 1, FLOAT32)
        step, inner_state = inner.update(g, inner_state, x)
        x, plain = optax.apply_updates(x, step), optax.apply_updates(plain, step)
        u, state = kept.update(g, state, p)
        p = optax.apply_updates(p, u)
    rests = jax.tree.map(rounding.with_rest, wide(p), state.rest)
    jax.tree.map(np.testing.assert_array_equal, rests, x)
    ours, theirs, true = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (wide(p), wide(plain), x)
    )
    assert np.all(np.isfinite(ours))
    assert np.abs(ours - true).mean() < np.abs(theirs - true).mean()


BFLOAT16_CASE = Case(
    "compensated_updates[bfloat16]",
    functools.partial(compensated_updates, optlab.heavy_ball(0.5)),
    params=lambda: jax.tree.map(lambda p: p.astype(BFLOAT16), default_params()),
)


@pytest.mark.parametrize(
    "check",
    [
        *("state_type_fixed_point", "init_abstract", "no_aliasing", "donate", "no_retrace"),
        *("none_leaf", "masked_node", "scalar_leaf", "zero_size_leaf", "state_is_arrays"),
        *("state_sharding", "state_sharding_under_jit", "explicit_mesh"),
        *("sharded_equals_replicated", "checkpoint_round_trip", "params_none"),
    ],
)
def test_contract_on_bfloat16(check):
    run_check(BFLOAT16_CASE, check)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize("spec", [P("data", "model"), P(None, ("fsdp", "model")), P()], ids=str)
def test_random_bits_do_not_depend_on_the_mesh(kind, spec):
    start, updates = normal((16, 48), 0, BFLOAT16), normal((16, 48), 1) * 1e-3
    want = apply_updates_stochastic(start, updates, KEY)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (start, updates)]
        got = jax.jit(apply_updates_stochastic)(*placed, KEY)
        if kind == AxisType.Explicit:
            assert jax.typeof(got) == jax.typeof(placed[0])
    assert got.sharding.is_equivalent_to(placed[0].sharding, 2)
    np.testing.assert_array_equal(got, want)
    assert 0.05 < np.mean(np.asarray(got) != np.asarray(start)) < 0.95


def test_one_trace_and_other_numbers_for_other_keys_and_leaves():
    traces = 0

    @jax.jit
    def step(p, u, key):
        nonlocal traces
        traces += 1
        return apply_updates_stochastic(p, u, key)

    p, u = (dict.fromkeys("ab", x) for x in (jnp.ones(64, BFLOAT16), jnp.full(64, 2.0**-8)))
    first, again, second = (step(p, u, jax.random.key(seed)) for seed in (0, 0, 1))
    assert traces == 1
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["a"], second["a"])
    assert not np.array_equal(first["a"], first["b"])
    raw = apply_updates_stochastic(p, u, jax.random.PRNGKey(0))
    jax.tree.map(np.testing.assert_array_equal, raw, first)


def test_boxes_of_linen_hold_rests_too():
    box = lambda x: nn.Partitioned(x, names=("data", "model"))  # noqa: E731
    params = {"kernel": box(normal((4, 8), 0, BFLOAT16)), "other": box(normal((4, 8), 1))}
    tx = compensated_updates(optax.adam(1e-3))
    state = tx.init(params)
    specs = nn.get_partition_spec(state)
    assert specs.rest["kernel"] == P("data", "model")
    u, state = tx.update(params, state, params)
    assert state.rest["kernel"].value.dtype == jnp.int16
    drawn = apply_updates_stochastic(params, u, KEY)
    assert drawn["kernel"].value.dtype == BFLOAT16


def test_wrong_calls_are_refused_with_the_fix():
    with pytest.raises(TypeError, match=r"apply_updates_stochastic: key .* got 0\. Write jax\.ran"):
        apply_updates_stochastic(jnp.ones(2), jnp.ones(2), 0)
    with pytest.raises(TypeError, match=r"one key of jax\.random"):
        apply_updates_stochastic(jnp.ones(2), jnp.ones(2), jax.random.split(KEY))
    pair = {"a": jnp.ones(2)}, {"a": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"leaf 'a' has shape \(3,\) in the updates and \(2,\)"):
        apply_updates_stochastic(*pair, KEY)
    with pytest.raises(ValueError, match=r"apply_updates_stochastic: .* different trees"):
        apply_updates_stochastic({"b": jnp.ones(2)}, pair[0], KEY)
    with pytest.raises(TypeError, match="compensated_updates: inner must be an optax"):
        compensated_updates(0.1)
    tx = compensated_updates(ADAM)
    with pytest.raises(ValueError, match=r"leaf 'w' has dtype float8_e4m3fn, .* optax\.masked"):
        tx.init({"w": jnp.ones(2, jnp.float8_e4m3fn)})
    state = tx.init(pair[0])
    with pytest.raises(ValueError, match="compensated_updates: update needs the current param"):
        tx.update(pair[0], state)
    with pytest.raises(ValueError, match=r"leaf 'a' has shape \(3,\)"):
        tx.update(pair[1], state, pair[0])


def test_flax_models_in_bfloat16_take_the_steps_of_float32():
    class Model(nnx.Module):
        def __init__(self, dtype):
            self.dense = nnx.Linear(8, 4, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))

    half, whole = Model(BFLOAT16), Model(FLOAT32)
    nnx.update(whole, wide(nnx.state(half)))
    start = whole.dense.kernel[...]
    optimizers = [
        nnx.Optimizer(half, compensated_updates(optax.MultiSteps(ADAM, 2)), wrt=nnx.Param),
        nnx.Optimizer(whole, optax.MultiSteps(ADAM, 2), wrt=nnx.Param),
    ]
    update = nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads))
    for t in range(6):
        grads = jax.tree.map(lambda x, t=t: normal(x.shape, t), nnx.state(whole))
        for optimizer, model in zip(optimizers, (half, whole), strict=True):
            update(optimizer, model, grads)
    found, x = (model.dense.kernel[...] for model in (half, whole))
    assert found.dtype == BFLOAT16
    gap = np.maximum(spacing(x), spacing(wide(found)))
    assert np.all(np.abs(wide(found) - x) <= gap / 2 * (1 + 1e-3))
    assert np.abs(x - start).max() > 1e-3
