"""`eval_params` finds what to evaluate with; `average_params` keeps it."""

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
from optlab.state.evaluation import eval_params
from optlab.testing.sharding import mesh_of
from optlab.transforms.averages import average_params

PARAMS = {
    "a": {"bias": jnp.linspace(-1.0, 1.0, 3), "scale": jnp.linspace(1.0, 2.0, 4)},
    "b": {"kernel": jnp.linspace(-1.0, 2.0, 12).reshape(3, 4)},
}
LABELS = {"a": "one", "b": "two"}


def trained(tx, params=PARAMS, steps=3):
    """Return parameters and state after steps on gradients that are the parameters."""
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def close(got, want, rtol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, 1e-7), got, want)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, want)


def free(**given):
    return contrib.schedule_free(optax.sgd(0.1), 0.1, **given)


PLACES = {
    "alone": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(10.0), tx),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1),
    "inject": lambda tx: optax.inject_hyperparams(lambda size: optax.chain(optax.scale(size), tx))(
        1.0
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "all_in_one_part": lambda tx: optax.partition({"x": tx}, "x"),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_schedule_free_is_found_anywhere(place):
    params, state = trained(free(b1=0.8))
    want = contrib.schedule_free_eval_params(state, params)
    assert not np.allclose(want["b"]["kernel"], params["b"]["kernel"])
    params, state = trained(place(free(b1=0.8)))
    close(eval_params(state, params), want)
    close(jax.jit(eval_params)(state, params), want)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_averages_are_found_anywhere(place):
    params, state = trained(place(optax.chain(optax.sgd(0.1), average_params(None))))
    # p_t = 0.9^t p_0.
    want = jax.tree.map(lambda p: p * np.float32((0.9 + 0.81 + 0.729) / 3), PARAMS)
    close(eval_params(state, params), want)


def test_an_injected_b1_is_the_one_that_counts():
    tx = optax.inject_hyperparams(contrib.schedule_free_sgd)(0.1, b1=0.9)
    state = tx.init(PARAMS)
    state.hyperparams["b1"] = jnp.asarray(0.5)
    updates, state = tx.update(PARAMS, state, PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    # After one step x = z, whatever b1.
    assert float(state.inner_state.b1) == pytest.approx(0.9)
    close(eval_params(state, params), state.inner_state.z)


def test_half_precision_is_extrapolated_in_float32_and_returned_in_its_dtype():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    params, state = trained(free(b1=0.5, state_dtype=jnp.float32), half)
    got = eval_params(state, params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    want = jax.tree.map(lambda y, z: ((y - 0.5 * z) / 0.5).astype(jnp.bfloat16), wide, state.z)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(got))


def test_where_nothing_is_kept_the_parameters_are_themselves():
    for tx in (optax.adam(0.1), optlab.muon(0.1), optax.MultiSteps(optlab.galore(0.1), 2)):
        assert eval_params(tx.init(PARAMS), PARAMS)["a"]["bias"] is PARAMS["a"]["bias"]


def test_each_part_of_a_partition_has_its_own():
    tx = optax.partition(
        {"one": free(b1=0.8), "two": optax.chain(optax.sgd(0.1), average_params(None))}, LABELS
    )
    params, state = trained(tx)
    alone = trained(free(b1=0.8), {"a": PARAMS["a"]})
    want = contrib.schedule_free_eval_params(alone[1], alone[0])
    got = eval_params(state, params)
    close(got["a"], want["a"])
    close(got["b"], jax.tree.map(lambda p: p * np.float32((0.9 + 0.81 + 0.729) / 3), PARAMS["b"]))


def test_leaves_outside_a_mask_are_themselves():
    mask = {"a": False, "b": True}
    tx = optax.chain(optax.sgd(0.1), optax.masked(average_params(None), mask))
    params, state = trained(tx)
    got = eval_params(state, params)
    assert got["a"]["bias"] is params["a"]["bias"]
    assert not np.allclose(got["b"]["kernel"], params["b"]["kernel"])


def test_two_for_one_leaf_are_refused_by_place():
    tx = optax.chain(free(), average_params())
    params, state = trained(tx)
    says = r"leaf 'a/bias', ScheduleFreeState at '0' and AverageParamsState at '1'\. Pass the part"
    with pytest.raises(ValueError, match=says):
        eval_params(state, params)
    close(eval_params(state[0], params), contrib.schedule_free_eval_params(state[0], params))


def test_lookahead_evaluates_its_slow_weights():
    tx = optax.lookahead(optax.sgd(0.1), 2, 0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(params.fast, state, params)
        params = optax.apply_updates(params, updates)
    close(eval_params(state, params), params.slow)
    assert not np.allclose(params.slow["a"]["bias"], params.fast["a"]["bias"])
    with pytest.raises(ValueError, match=r"slow weights are in params, got dict\. Pass the Look"):
        eval_params(state, params.fast)
    both = (state, trained(average_params(), params=PARAMS)[1])
    with pytest.raises(
        ValueError, match=r"AverageParamsState\.average and params are different trees"
    ):
        eval_params(both, params)
    both = (state, average_params().init(params))
    with pytest.raises(ValueError, match=r"AverageParamsState at '1' and LookaheadState at '0'"):
        eval_params(both, params)


def test_averages_of_coordinates_are_refused_by_leaf():
    inner = optax.chain(optax.scale_by_adam(), average_params())
    params = {"kernel": PARAMS["b"]["kernel"]}
    state = optlab.in_low_rank(inner, rank=1).init(params)
    with pytest.raises(ValueError, match=r"leaf 'kernel' has shape \(3, 4\), in Average.*\(1, 4\)"):
        eval_params(state, params)


def test_an_nnx_model_is_evaluated_with_its_average():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(optax.sgd(1.0), average_params(None))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    start = np.asarray(model.kernel[...])
    for _ in range(3):
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    params = nnx.state(model, nnx.Param)
    got = eval_params(optimizer.opt_state, params)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    nnx.update(model, got)
    np.testing.assert_allclose(model.kernel[...], start - 2, rtol=1e-6)


def test_before_the_first_update_the_average_is_the_parameters():
    state = average_params().init(PARAMS)
    close(eval_params(state, PARAMS), PARAMS)


def averaged(decay, steps, **given):
    """Return the average of 1, 2, ..., and the state."""
    tx = average_params(decay, **given)
    p, state = jnp.zeros(1), None
    state = tx.init(p)
    for _ in range(steps):
        u, state = tx.update(jnp.ones(1), state, p)
        p = p + u
    return float(eval_params(state, p)[0]), state


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_the_exponential_average_is_the_bias_corrected_one(decay):
    mean = 0.0
    for t in range(1, 8):
        mean = decay * mean + (1 - decay) * t
        got, state = averaged(decay, t)
        assert got == pytest.approx(mean / (1 - decay**t), rel=1e-5)
        assert int(state.count) == t


def test_the_mean_is_that_of_all_steps_from_the_start_on():
    assert averaged(None, 7)[0] == pytest.approx(4.0)
    assert averaged(None, 7, start=3)[0] == pytest.approx((4 + 5 + 6 + 7) / 4)
    # Until then the average is where training is.
    assert averaged(None, 3, start=3)[0] == 3
    assert averaged(0.9, 3, start=9)[0] == 3


def test_small_steps_are_not_lost_in_half_precision():
    tx, p = average_params(0.999), jnp.full(1, 256.0, jnp.bfloat16)
    state = tx.init(p)
    assert state.average.dtype == jnp.float32
    for size in (0.0, 2.0):
        u, state = tx.update(jnp.full(1, size, jnp.bfloat16), state, p)
        p = optax.apply_updates(p, u)
    # Half of the way: the corrected weight of the second step is 1/1.999.
    assert float(state.average[0]) == pytest.approx(257.0, abs=1e-2)
    assert average_params(average_dtype="bfloat16").init(p).average.dtype == jnp.bfloat16


def test_the_average_is_of_what_is_stored():
    tx, p = average_params(None), jnp.ones(1, jnp.bfloat16)
    _, state = tx.update(jnp.full(1, 1e-4, jnp.bfloat16), tx.init(p), p)
    assert float(state.average[0]) == 1.0


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_averages_lie_where_their_parameters_do(kind):
    mesh = mesh_of(kind)
    where = {"a": {"bias": P("model"), "scale": P()}, "b": {"kernel": P(None, "data")}}
    params = PARAMS | {"a": {"bias": jnp.ones(4), "scale": jnp.ones(3)}}
    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        params = jax.tree.map(put, params, where)
        params, state = trained(optax.chain(optax.sgd(0.1), average_params(None)), params)
        got = jax.jit(eval_params)(state, params)
    for x, p in zip(*map(jax.tree.leaves, (got, params)), strict=True):
        assert x.sharding.is_equivalent_to(p.sharding, p.ndim)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: average_params(1.0), r"decay must be a number in \[0, 1\)"),
        (lambda: average_params(start=-1), "start must be a whole number >= 0"),
        (lambda: average_params(average_dtype="int8"), "average_dtype must be a floating dtype"),
        (lambda: average_params().update(PARAMS, average_params().init(PARAMS)), "params=None"),
    ],
)
def test_wrong_calls_are_refused(call, says):
    with pytest.raises(ValueError, match=f"^average_params: .*{says}"):
        call()
