"""Rates per leaf, groups that unfreeze, factors by importance, rates by batch size."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from optlab.schedules.layerwise import layerwise_rates, scale_by_rates, unit_rates
from optlab.schedules.rates import (
    heavy_ball_optimal,
    max_rate_from_spectrum,
    scale_rate_to_batch,
)
from optlab.schedules.unfreeze import progressive_unfreeze

GROUPS = ("embed", "block", "head")


def tree(*values):
    return {
        group: {"kernel": jnp.full((2,), v)} for group, v in zip(GROUPS, values, strict=True)
    } | {"temperature": jnp.ones(())}


PARAMS = tree(1.0, 1.0, 1.0)


def kernels(found):
    return [np.asarray(found[group]["kernel"]).max() for group in GROUPS]


# Factors.


def test_the_first_expression_found_in_a_path_decides():
    rates = layerwise_rates(PARAMS, {"head": 1.0, "kernel": 0.25, "embed": 9.0})
    assert kernels(rates) == [0.25, 0.25, 1]
    assert rates["temperature"] == 1


def test_a_function_sees_path_and_leaf():
    rates = layerwise_rates(PARAMS, lambda path, leaf: (path, leaf.shape))
    assert rates["head"]["kernel"] == ("head/kernel", (2,))


def test_a_list_decays_from_the_top():
    rates = layerwise_rates(PARAMS, GROUPS, decay=0.5)
    assert kernels(rates) == [0.25, 0.5, 1]
    assert rates["temperature"] == 1
    assert kernels(layerwise_rates(PARAMS, GROUPS)) == [1 / 2.6**2, 1 / 2.6, 1]


def test_shapes_do_as_well_as_arrays():
    abstract = jax.eval_shape(lambda: PARAMS)
    rule = {"head": 0.5}
    assert layerwise_rates(abstract, rule) == layerwise_rates(PARAMS, rule)


def _stepped(rates, rate=1.0):
    tx = optax.chain(optax.sgd(rate), scale_by_rates(rates))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    return [-k for k in kernels(updates)]


def test_slca_and_dept_are_calls():
    slca = layerwise_rates(PARAMS, {"head": 1.0, "": 0.01})
    np.testing.assert_allclose(_stepped(slca, 0.01), [1e-4, 1e-4, 1e-2], rtol=1e-6)
    dept = layerwise_rates(PARAMS, {"embed": 0.3, "block": 5e-4, "": 0.0})
    np.testing.assert_allclose(_stepped(dept), [0.3, 5e-4, 0], rtol=1e-6)


# The link.


def test_decay_is_scaled_after_it_and_not_before():
    half = scale_by_rates(jax.tree.map(lambda _: 0.5, PARAMS))
    decay, zeros = optax.add_decayed_weights(0.1), tree(0.0, 0.0, 0.0)
    for links, wanted in (((decay, half), 0.05), ((half, decay), 0.1)):
        tx = optax.chain(*links)
        updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
        np.testing.assert_allclose(kernels(updates), wanted, rtol=1e-6)


def test_a_factor_may_be_an_array_of_a_stack():
    stack = {"layers": jnp.ones((3, 2))}
    rates = {"layers": np.array([[1.0], [0.5], [0.0]])}
    updates, _ = scale_by_rates(rates).update(stack, optax.EmptyState())
    np.testing.assert_array_equal(updates["layers"], [[1, 1], [0.5, 0.5], [0, 0]])


@pytest.mark.parametrize("factor", [0, 0.0, np.float64(0.5), np.float32(2)])
def test_dtypes_are_kept(factor):
    half = {"kernel": jnp.ones(2, jnp.bfloat16)}
    updates, _ = scale_by_rates({"kernel": factor}).update(half, optax.EmptyState())
    assert updates["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(updates["kernel"]), [factor] * 2)


def test_factors_change_without_compiling():
    tx, traces = scale_by_rates(), []

    @jax.jit
    def step(updates, rates):
        traces.append(1)
        return tx.update(updates, tx.init(updates), multipliers=rates)[0]

    for factor in (0.5, 2.0):
        assert kernels(step(PARAMS, jax.tree.map(lambda _, f=factor: f, PARAMS))) == [factor] * 3
    assert len(traces) == 1


def test_one_chain_holds_factors_of_both_kinds():
    constant = scale_by_rates(layerwise_rates(PARAMS, {"head": 0.5}))
    tx = optax.chain(constant, scale_by_rates())
    fed = jax.tree.map(lambda _: 3.0, PARAMS)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), multipliers=fed)
    assert kernels(updates) == [3, 3, 1.5]


def test_leaves_that_a_mask_takes_out_need_not_be_there():
    rates = layerwise_rates(PARAMS, {"head": 0.5})
    mask = jax.tree.map(lambda _: True, PARAMS) | {"embed": False}
    tx = optax.masked(scale_by_rates(rates), mask)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    assert kernels(updates) == [1, 1, 0.5]


def test_factors_of_an_nnx_model_fit_its_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    rates = layerwise_rates(nnx.state(model, nnx.Param), {"bias": 0.0, "kernel": 0.5})
    tx = optax.chain(optax.sgd(1.0), scale_by_rates(rates))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = np.array(model.kernel[...])
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    np.testing.assert_allclose(model.kernel[...], before - 0.5, rtol=1e-6)
    np.testing.assert_array_equal(model.bias[...], [0, 0])


# Unfreezing.


def _trained(tx, steps, sizes=None, grads=PARAMS):
    """Return the kernels of the updates of each step, and the states."""
    state, found, states = tx.init(PARAMS), [], []
    for size in [1.0] * steps if sizes is None else sizes:
        updates, state = tx.update(jax.tree.map(lambda g, s=size: s * g, grads), state, PARAMS)
        found.append(kernels(updates))
        states.append(state)
    return np.array(found), states


@pytest.mark.parametrize("freeze_state", [True, False])
def test_one_group_more_trains_at_every_stage(freeze_state):
    tx = progressive_unfreeze(optax.identity(), GROUPS, [1, 2], freeze_state=freeze_state)
    found, states = _trained(tx, 5)
    np.testing.assert_array_equal(found, [[0, 0, 1], *[[0, 1, 1]] * 2, *[[1, 1, 1]] * 2])
    assert [int(s.metrics()["groups_training"]) for s in states] == [1, 2, 2, 3, 3]


def test_reversed_it_freezes_from_the_bottom():
    found, _ = _trained(progressive_unfreeze(optax.identity(), GROUPS, 1, reverse=True), 4)
    np.testing.assert_array_equal(found, [[1, 1, 1], [0, 1, 1], *[[0, 0, 1]] * 2])


def test_leaves_of_no_group_always_train():
    tx = progressive_unfreeze(optax.identity(), GROUPS, 1)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    assert updates["temperature"] == 1


SIZES = (1.0, 3.0, 0.5, -2.0, 4.0, 1.0)


def test_a_group_that_joins_trains_as_if_from_the_start():
    adam = optax.adam(0.1)
    found, _ = _trained(progressive_unfreeze(adam, GROUPS, 2), 6, SIZES)
    for index, joins in enumerate((4, 2, 0)):
        alone, _ = _trained(adam, 6 - joins, SIZES[joins:])
        np.testing.assert_array_equal(found[:joins, index], 0)
        np.testing.assert_allclose(found[joins:, index], alone[:, index], rtol=1e-5)


def test_without_states_of_its_own_a_group_joins_with_warm_moments():
    adam = optax.adam(0.1)
    found, _ = _trained(progressive_unfreeze(adam, GROUPS, 2, freeze_state=False), 6, SIZES)
    alone, _ = _trained(adam, 6, SIZES)
    np.testing.assert_allclose(found[4:], alone[4:], rtol=1e-5)
    np.testing.assert_array_equal(found[:4, 0], 0)


def test_the_state_of_frozen_leaves_stands_still_whatever_their_gradients():
    tx = progressive_unfreeze(optax.adam(0.1), GROUPS, 5)
    bad = PARAMS | {"embed": {"kernel": jnp.full((2,), jnp.nan)}}
    found, states = _trained(tx, 2, grads=bad)
    fresh = tx.init(PARAMS)
    for old, new in zip(*(jax.tree.leaves(s.inner[:2]) for s in (fresh, states[-1])), strict=True):
        np.testing.assert_array_equal(old, new)
    assert np.isfinite(found).all()


def test_every_group_gets_its_part_of_a_tree_beside_the_updates():
    def update(updates, state, params=None, *, by, value, **extra_args):
        return jax.tree.map(lambda u, b: u * b * value, updates, by), state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = progressive_unfreeze(inner, GROUPS, 1, reverse=True)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), by=tree(2.0, 3.0, 4.0), value=0.5)
    assert kernels(updates) == [1, 1.5, 2]


def test_groups_of_an_nnx_model_unfreeze_in_its_optimizer():
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = progressive_unfreeze(optax.adam(0.5), ["kernel", "bias"], 1, strict=True)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    start = np.array(model.kernel[...])
    for moved in (0, 0.5):
        optimizer.update(model, ones)
        np.testing.assert_allclose(model.kernel[...], start - moved, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.bias[...], [-1, -1], rtol=1e-5)


def test_one_program_serves_all_stages():
    tx, traces = progressive_unfreeze(optax.sgd(0.1, momentum=0.9), GROUPS, 1), []

    @jax.jit
    def step(state):
        traces.append(1)
        return tx.update(PARAMS, state, PARAMS)[1]

    state = tx.init(PARAMS)
    for _ in range(4):
        state = step(state)
    assert len(traces) == 1
    assert state.training == 3


# Importance.


def test_norms_are_measured_against_all_and_others_among_themselves():
    found = unit_rates({"mlp": 1.0, "attn": 3.0, "ln_1": 5.0, "norm": 2.0})
    found = {name: float(rate) for name, rate in found.items()}
    assert found == {"mlp": 2, "attn": 0, "ln_1": 0, "norm": 1.5}


def test_domain_turns_the_rule_around_and_equal_importance_is_one():
    importance = {"a": 1.0, "b": 2.0, "c": 5.0}
    there, back = unit_rates(importance), unit_rates(importance, domain=True)
    assert [float(there[k] + back[k]) for k in importance] == [2, 2, 2]
    assert {float(x) for x in unit_rates(dict.fromkeys("ab", 0.1), domain=True).values()} == {1}
    assert unit_rates({}) == {}


def test_only_norms_and_traced_importance():
    found = jax.jit(unit_rates)({"norm_0": 0.0, "norm_1": 4.0, "norm_2": 1.0})
    np.testing.assert_array_equal([found[k] for k in sorted(found)], [2, 0, 1.5])


# Batch sizes and spectra.


def test_a_schedule_is_scaled_whole_and_held_below_the_bound():
    base = optax.linear_schedule(0.0, 1.0, 10)
    scaled = scale_rate_to_batch(base, 8, 32, "sqrt", max_rate=1.5)
    np.testing.assert_allclose([scaled(t) for t in (0, 5, 10)], [0, 1, 1.5])
    assert scale_rate_to_batch(1.0, 8, 32, max_rate=1.5) == 1.5


def test_a_rule_may_be_a_function():
    assert scale_rate_to_batch(0.5, 8, 32, lambda base, batch: math.log2(batch / base)) == 1.0


def test_the_random_matrix_rule_is_linear_then_constant():
    spectrum = {"top_eigenvalue": 10.0, "noise_mass": 1e4}
    scaled = lambda a, b: scale_rate_to_batch(1.0, a, b, "random_matrix", **spectrum)  # noqa: E731
    # Below noise_mass/top_eigenvalue^2 = 100 examples the edge of the bulk leads: a root.
    assert scaled(4, 16) == pytest.approx(2)
    assert scaled(10**6, 10**8) == pytest.approx(1, rel=1e-3)
    assert max_rate_from_spectrum(10.0, 0.0, 1) == 0.2
    joint = [max_rate_from_spectrum(10.0, 1e4, b) for b in (99, 100, 101)]
    assert joint == pytest.approx([0.1] * 3, rel=0.01)


def test_heavy_ball_converges_at_its_rate_on_a_quadratic():
    rate, momentum = heavy_ball_optimal(9.0, 1.0)
    assert (rate, momentum) == pytest.approx((0.25, 0.25))
    curvature, x, previous = np.array([1.0, 4.0, 9.0]), np.ones(3), np.ones(3)
    for _ in range(60):
        x, previous = x - rate * curvature * x + momentum * (x - previous), x
    assert np.abs(x).max() < 200 * math.sqrt(momentum) ** 60
    assert heavy_ball_optimal(2.0, 2.0) == pytest.approx((0.5, 0))


@pytest.mark.parametrize("least", [-3.0, 0.0, 1e-9])
def test_an_eigenvalue_that_is_not_positive_counts_as_the_floor(least):
    assert heavy_ball_optimal(4.0, least) == heavy_ball_optimal(4.0, 4e-6)


# Wrong calls.

SPECTRUM = {"top_eigenvalue": 1.0, "noise_mass": 1.0}
WRONG = {
    "one_expression": (
        lambda: layerwise_rates(PARAMS, "head"), "layerwise_rates", 'Write for example ["embed"',
    ),
    "expression_twice": (
        lambda: layerwise_rates(PARAMS, ["a", "a"]), "layerwise_rates", "each once",
    ),
    "expression_open": (
        lambda: layerwise_rates(PARAMS, {"(": 1.0}), "layerwise_rates", "Escape",
    ),
    "decay_of_a_mapping": (
        lambda: layerwise_rates(PARAMS, {"a": 1.0}, decay=0.5), "layerwise_rates", "None where",
    ),
    "decay_negative": (
        lambda: layerwise_rates(PARAMS, GROUPS, decay=-1.0), "layerwise_rates", "a number > 0",
    ),
    "leaf_alone": (
        lambda: layerwise_rates(PARAMS, GROUPS, strict=True), "layerwise_rates", "'temperature'",
    ),
    "expression_idle": (
        lambda: layerwise_rates(PARAMS, ["", "head"], strict=True), "layerwise_rates", "'head'",
    ),
    "factor_negative": (
        lambda: scale_by_rates({"a": -1.0}).init({"a": jnp.ones(1)}), "scale_by_rates", "leaf 'a'",
    ),
    "factor_missing": (
        lambda: scale_by_rates({}).init({"a": jnp.ones(1)}), "scale_by_rates", "leaf 'a'",
    ),
    "factor_too_long": (
        lambda: scale_by_rates({"a": np.ones(3)}).init({"a": jnp.ones(2)}), "scale_by_rates",
        "leaf 'a' has shape (3,)",
    ),
    "factors_not_passed": (
        lambda: scale_by_rates().update(PARAMS, optax.EmptyState()), "scale_by_rates",
        "multipliers=...",
    ),
    "factors_of_two": (
        lambda: scale_by_rates(lambda path, leaf: 1.0), "scale_by_rates", "lambda params:",
    ),
    "inner": (
        lambda: progressive_unfreeze(optax.sgd, GROUPS, 1), "progressive_unfreeze", "Build it",
    ),
    "stages_too_few": (
        lambda: progressive_unfreeze(optax.identity(), GROUPS, [1]), "progressive_unfreeze",
        "2 of them",
    ),
    "stage_empty": (
        lambda: progressive_unfreeze(optax.identity(), GROUPS, 0), "progressive_unfreeze",
        "a whole number >= 1",
    ),
    "group_alone": (
        lambda: progressive_unfreeze(optax.identity(), GROUPS, 1, strict=True).init(PARAMS),
        "progressive_unfreeze", "'temperature'",
    ),
    "importance_of_entries": (
        lambda: unit_rates({"a": jnp.ones(2)}), "unit_rates", "leaf 'a' has shape (2,)",
    ),
    "rule": (
        lambda: scale_rate_to_batch(0.1, 1, 2, "liner"), "scale_rate_to_batch", "'linear'?",
    ),
    "batch": (
        lambda: scale_rate_to_batch(0.1, 1, 0), "scale_rate_to_batch", "a whole number >= 1",
    ),
    "spectrum_of_linear": (
        lambda: scale_rate_to_batch(0.1, 1, 2, **SPECTRUM), "scale_rate_to_batch", "None unless",
    ),
    "spectrum_missing": (
        lambda: scale_rate_to_batch(0.1, 1, 2, "random_matrix"), "scale_rate_to_batch",
        "top_eigenvalue must be",
    ),
    "noise_negative": (
        lambda: max_rate_from_spectrum(1.0, -1.0, 1), "max_rate_from_spectrum", "a number >= 0",
    ),
    "eigenvalues_exchanged": (
        lambda: heavy_ball_optimal(1.0, 2.0), "heavy_ball_optimal", "<= l_max (1.0)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", WRONG)
def test_a_wrong_call_says_who_and_the_fix(label):
    call, who, fix = WRONG[label]
    with pytest.raises((ValueError, TypeError)) as refused:
        call()
    assert str(refused.value).startswith(who + ":")
    assert fix in str(refused.value)
