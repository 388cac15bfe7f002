"""`reset_state` starts chosen leaves anew, and refuses by name what it cannot tell apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import contrib

import optlab
from optlab.linalg import codecs
from optlab.state.metrics import metrics
from optlab.state.reset import reset_state
from optlab.testing.case import leaves_by_path
from optlab.testing.sharding import mesh_of
from optlab.transforms.averages import average_params
from optlab.transforms.quantize import quantize_state

PARAMS = {
    "body": {"kernel": jnp.linspace(-1.0, 2.0, 24).reshape(4, 6), "bias": jnp.ones(6)},
    "top": {"kernel": jnp.linspace(1.0, 2.0, 18).reshape(6, 3)},
}
TOP = {"body": False, "top": True}
WIDE = {"body": PARAMS["body"]["kernel"], "top": PARAMS["top"]["kernel"]}


def stepped(tx, steps=3, params=PARAMS):
    state = tx.init(params)
    for t in range(steps):
        grads = jax.tree.map(lambda p, t=t: jnp.cos(p + t), params)
        _, state = tx.update(grads, state, params)
    return state


def split(state):
    """Return the arrays of the top, of the body, and those that are no leaf's own."""
    parts = {"top": {}, "body": {}, "": {}}
    for path, x in leaves_by_path(state).items():
        part = next((p for p in ("top", "body") if f"/{p}/" in f"/{path}/"), "")
        parts[part][path] = np.asarray(x)
    return parts


def check(tx, **given):
    """Assert that the top is as `init` gives it, and all else as it was."""
    state = stepped(tx)
    before, fresh = split(state), split(tx.init(PARAMS))
    got = split(reset_state(tx, state, PARAMS, TOP, **given))
    assert before["top"]
    assert any(not np.array_equal(before["top"][k], fresh["top"][k]) for k in fresh["top"])
    np.testing.assert_equal(got["top"], fresh["top"])
    np.testing.assert_equal(got["body"], before["body"])
    np.testing.assert_equal(got[""], before[""])


LABELS = {"body": "a", "top": "b"}
TREES = {
    "adam": optax.adam(optax.constant_schedule(0.1)),
    "injected": optax.inject_hyperparams(optax.adamw)(0.1),
    "multi_steps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "partition": optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1, 0.9)}, LABELS),
    "masked": optax.masked(optax.adam(0.1), {"body": True, "top": True}),
    "apply_if_finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "schedule_free": contrib.schedule_free(optax.scale_by_rms(), 0.1),
    "muon": optlab.muon(0.1),
    "lion": optlab.lion(0.1),
    "averaged": optax.chain(optax.sgd(0.1), average_params(None)),
    "projected": optlab.project_radial(optlab.scale_by_moments()),
    "factored": optax.scale_by_factored_rms(min_dim_size_to_factor=2),
}


@pytest.mark.parametrize("tx", TREES.values(), ids=TREES)
def test_chosen_leaves_start_anew_and_nothing_else_changes(tx):
    check(tx)


LOW = optlab.in_low_rank(optax.trace(0.9), optlab.svd_projector(), rank=2, every=100)
SHARED = {
    "low_rank": (LOW, r"Kept\.basis, Kept\.found, Kept\.overlap"),
    "limiter": (
        optax.chain(optax.trace(0.9), optlab.norm_growth_limiter()),
        r"NormGrowthLimiterState\.norms",
    ),
    "normuon": (optlab.normuon(0.1), r"NormalizeNeuronsState\.nu"),
    "sgd_sai": (optlab.sgd_sai(0.1), r"ScaleByInitialSnrState\.snr"),
}


@pytest.mark.parametrize(("tx", "names"), SHARED.values(), ids=SHARED)
def test_arrays_about_several_leaves_are_refused_by_name_kept_or_reset(tx, names):
    state = stepped(tx)
    with pytest.raises(ValueError, match=f"^reset_state: .* got {names}.*[.] Write shared=.keep."):
        reset_state(tx, state, PARAMS, TOP)
    check(tx, shared="keep")
    got = split(reset_state(tx, state, PARAMS, TOP, shared="reset"))[""]
    before, fresh = split(state)[""], split(tx.init(PARAMS))[""]
    assert any(x.ndim for x in fresh.values())
    for path, x in got.items():
        np.testing.assert_array_equal(x, (fresh if x.ndim else before)[path])


def test_a_reset_low_rank_run_finds_its_bases_again():
    state = reset_state(LOW, stepped(LOW, 1), PARAMS, TOP, shared="reset")
    assert int(metrics(state)["subspaces_found"]) == 0
    _, state = LOW.update(PARAMS, state, PARAMS)
    assert int(metrics(state)["subspaces_found"]) == 2


@pytest.mark.parametrize("codec", [codecs.int8(), codecs.fp8(), codecs.int4()], ids=repr)
def test_compressed_state_is_reset_with_the_scales_of_its_codes(codec):
    plain, params = optax.scale_by_adam(), jax.tree.map(lambda p: jnp.tile(p, (1, 32)), WIDE)
    tx = quantize_state(plain, codec, min_size=1)
    state = stepped(tx, 2, params)
    got = reset_state(tx, state, params, TOP)
    fresh = tx.init(params)
    assert state.scales
    for path, scales in got.scales.items():
        want = fresh if path.endswith("top") else state
        jax.tree.map(np.testing.assert_array_equal, scales, want.scales[path])
    for moment in ("mu", "nu"):
        new, old, none = (getattr(s.inner, moment) for s in (got, state, fresh))
        np.testing.assert_array_equal(new["body"], old["body"])
        np.testing.assert_array_equal(new["top"], none["top"])


def test_single_entries_of_compressed_state_are_reset():
    tx = quantize_state(optax.trace(0.9), codecs.int8(), min_size=1)
    params = {"w": jnp.linspace(1.0, 2.0, 256).reshape(1, 256)}
    zeros, first = jax.tree.map(jnp.zeros_like, params), jnp.arange(256).reshape(1, 256) < 100
    state = reset_state(tx, stepped(tx, 2, params), params, {"w": first})
    u, _ = tx.update(zeros, state, params)
    assert not np.any(u["w"][:, :100])
    assert np.all(u["w"][:, 100:])


def test_neurons_are_reset_entry_by_entry():
    tx = optax.adam(0.1)
    state = stepped(tx)
    dead = jnp.arange(6) % 2 == 0
    mask = {
        "body": {"kernel": jnp.broadcast_to(dead, (4, 6)), "bias": dead},
        "top": {"kernel": False},
    }
    got = jax.jit(lambda s, m: reset_state(tx, s, PARAMS, m | {"top": False}))(
        state, {"body": mask["body"]}
    )
    for moment in ("mu", "nu"):
        new, old = (getattr(s[0], moment)["body"] for s in (got, state))
        np.testing.assert_array_equal(new["bias"], np.where(dead, 0, old["bias"]))
        np.testing.assert_array_equal(new["kernel"][:, ::2], 0)
        np.testing.assert_array_equal(new["kernel"][:, 1::2], old["kernel"][:, 1::2])
    np.testing.assert_array_equal(got[0].mu["top"]["kernel"], state[0].mu["top"]["kernel"])


def test_the_first_step_after_a_reset_is_as_large_as_stated():
    tx, params = optax.scale_by_adam(), {"w": jnp.ones(1)}
    state = tx.init(params)._replace(count=jnp.asarray(20_000, jnp.int32))
    u, _ = tx.update(params, reset_state(tx, state, params, True), params)
    assert float(u["w"][0]) == pytest.approx(0.1 / np.sqrt(0.001), rel=1e-4)


def test_a_mask_may_be_a_function_a_prefix_or_all():
    tx = optax.trace(0.9)
    state = stepped(tx)
    by_path = lambda params: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: "top" in jax.tree_util.keystr(path), params
    )
    want = reset_state(tx, state, PARAMS, TOP)
    jax.tree.map(np.testing.assert_array_equal, reset_state(tx, state, PARAMS, by_path), want)
    fresh = tx.init(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, reset_state(tx, state, PARAMS, True), fresh)
    jax.tree.map(np.testing.assert_array_equal, reset_state(tx, state, PARAMS, False), state)


def test_the_state_of_an_nnx_optimizer_is_reset_in_its_boxes():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = optax.adam(0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    old = optimizer.opt_state
    mask = lambda params: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: "kernel" in jax.tree_util.keystr(path), params
    )
    new = reset_state(tx, old, nnx.state(model, nnx.Param), mask)
    assert jax.tree.structure(new) == jax.tree.structure(old)
    optimizer.opt_state = new
    mu = optimizer.opt_state[0].mu
    assert not np.any(mu["kernel"][...])
    assert np.all(mu["bias"][...])
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_a_mesh_a_reset_state_lies_where_it_lay(kind):
    mesh, tx = mesh_of(kind), optlab.lion(0.1)
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, NamedSharding(mesh, P("model", *[None] * (x.ndim - 1))))  # noqa: E731
        params = jax.tree.map(put, PARAMS)
        state = stepped(tx, 1, params)
        got = reset_state(tx, state, params, TOP)
        again = jax.jit(tx.update)(params, got, params)[1]
    for x, y, z in zip(*map(jax.tree.leaves, (got, state, again)), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        assert z.sharding.is_equivalent_to(y.sharding, x.ndim)


ADAM = optax.adam(0.1)
STATE = ADAM.init(PARAMS)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: reset_state(optax.adam, STATE, PARAMS, True), TypeError, "tx must be an optax"),
        (
            lambda: reset_state(optax.sgd(0.1, 0.9), STATE, PARAMS, True),
            ValueError,
            "Give the tx that made the state",
        ),
        (
            lambda: reset_state(ADAM, STATE, PARAMS, {"haed": True}),
            ValueError,
            "the mask is no prefix of the parameter tree",
        ),
        (
            lambda: reset_state(ADAM, STATE, PARAMS, {"body": 1, "top": False}),
            TypeError,
            "the mask holds 1 at 'body/bias'. Use True or False",
        ),
        (
            lambda: reset_state(ADAM, STATE, PARAMS, TOP, shared="drop"),
            ValueError,
            "shared must be one of",
        ),
        (
            lambda: reset_state(ADAM, STATE, PARAMS, {"body": False, "top": jnp.ones(3, bool)}),
            ValueError,
            r"the mask of leaf 'top/kernel' has shape \(3,\), the leaf \(6, 3\)",
        ),
        (
            lambda: reset_state(
                TREES["factored"],
                TREES["factored"].init(PARAMS),
                PARAMS,
                {"body": False, "top": jnp.ones((6, 3), bool)},
            ),
            ValueError,
            r"v_row.*single entries cannot be reset. Give one bool",
        ),
    ],
)
def test_wrong_calls_name_the_fix(call, kind, says):
    with pytest.raises(kind, match=f"^reset_state: .*{says}"):
        call()
