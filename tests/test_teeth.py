"""Every check fails on a planted defect and passes on its healthy counterpart.

A defect is a small optax transformation that is wrong in the one way the check is there for.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from planted import (
    branches_on_a_hyperparameter,
    carries_a_constant,
    counts_devices,
    counts_its_builds,
    counts_masked_leaves,
    descends,
    drifting_count,
    drops_extra_args,
    factored_state,
    fills_holes,
    forgets_the_sign_of_schedules,
    forwards,
    global_norm,
    grows_with_each_init,
    hidden_counter,
    hides_params,
    identity,
    ignores_a_hyperparameter,
    mixes_equal_shapes_up,
    momentum,
    norm,
    normalizes_over_the_batch,
    prefers_dicts,
    ramp,
    rank_of,
    reacts_to_unknown_arguments,
    refuses_unknown_arguments,
    scaled,
    scales_arrays_in_place,
    sgd,
    small,
    stateless,
    sums_over_an_axis,
    svd_polar,
    tree_map,
    unit_norm_of_params,
    whole,
    with_state,
    zeros,
)

import optlab
from optlab.testing import CHECKS, Case, check_transform, checks_for, run_check


def case(make, tags=(), hits=("dense/kernel",), params=small, **facts):
    fallback = facts.pop("fallback", identity)
    return Case("planted", make, frozenset(tags), params, hits, facts, fallback)


def both(healthy, *defects, **promises):
    """Return the healthy case and the defective ones, all with the same promises."""
    return case(healthy, **promises), [case(make, **promises) for make in defects]


projected = stateless(lambda u, p: u - p * jnp.sum(u * p) / jnp.sum(p * p))
unit = stateless(lambda u, p: u / (norm(u) + 1e-30))
shrinking = stateless(lambda u, p: u - 0.1 * p)
schedule = {"tags": {"schedule"}, "total": 2000, "joints": (1000,)}

TEETH = {
    "state_type_fixed_point": both(momentum, drifting_count),
    "dtype_preserved": both(
        momentum,
        stateless(lambda u, p: u.astype(jnp.float32)),
        stateless(lambda u, p: u * np.float32(1)),
    ),
    "state_is_arrays": both(
        momentum, with_state(lambda p: jnp.float32(0.1)), with_state(lambda p: {"rate": 0.1})
    ),
    "init_abstract": both(
        momentum,
        with_state(tree_map(lambda p: p * 0)),
        with_state(tree_map(lambda p: jnp.asarray(np.zeros(p.shape, p.dtype)))),
    ),
    "no_aliasing": both(momentum, with_state(lambda p: p), with_state(lambda p: [zeros(p)] * 2)),
    "donate": both(momentum, with_state(lambda p: [zeros(p)] * 2)),
    "checkpoint_round_trip": both(momentum, grows_with_each_init()),
    "map_params": both(momentum, with_state(lambda p: jnp.zeros(jax.tree.leaves(p)[0].shape))),
    "state_bytes": both(momentum, optax.scale_by_adam, identity, state_bytes=4.0),
    "stateless": both(identity, momentum, tags={"stateless"}),
    "path_hit": both(momentum, identity),
    "bfloat16_follows_float32": both(momentum, stateless(lambda u, p: (u + 1024) - 1024)),
    "jit_equals_eager": both(
        momentum, stateless(lambda u, p: 2 * u if isinstance(u, jax.core.Tracer) else u)
    ),
    "scan_equals_loop": both(momentum, hidden_counter),
    "vmap_equals_loop": both(momentum, normalizes_over_the_batch),
    "no_retrace": both(
        momentum,
        drifting_count,
        with_state(lambda p: jax.device_put(jnp.zeros([]), jax.devices()[0])),
    ),
    "pure": both(momentum, hidden_counter, whole(scales_arrays_in_place)),
    "structure_agnostic": both(momentum, whole(prefers_dicts)),
    "none_leaf": both(momentum, fills_holes(lambda x: x is None)),
    "masked_node": both(momentum, fills_holes(lambda x: isinstance(x, optax.MaskedNode))),
    "empty_tree": both(
        momentum,
        whole(lambda u, p: scaled(jnp.stack(jax.tree.leaves(tree_map(jnp.max)(u))).max())(u)),
    ),
    "scalar_leaf": both(momentum, stateless(lambda u, p: u / (jnp.std(u) + 1e-8))),
    "zero_size_leaf": both(momentum, stateless(lambda u, p: u / (u.size // len(u)))),
    "zero_grads_finite": both(momentum, stateless(lambda u, p: u / norm(u))),
    "zero_params_finite": both(momentum, stateless(lambda u, p: u / norm(p))),
    "extreme_grads_finite": both(
        momentum,
        stateless(lambda u, p: u / norm(u)),
        stateless(lambda u, p: u * (norm(u) / jnp.maximum(norm(u), 1e-8))),
    ),
    "chain": both(momentum, counts_its_builds()),
    "masked": both(momentum, whole(counts_masked_leaves)),
    "partition": both(momentum, whole(counts_masked_leaves)),
    "multi_steps": both(momentum, hidden_counter, with_state(lambda p: "fresh")),
    "apply_if_finite": both(momentum, drifting_count),
    "inject_hyperparams": both(momentum, branches_on_a_hyperparameter, ignores_a_hyperparameter),
    "extra_args": both(momentum, reacts_to_unknown_arguments, refuses_unknown_arguments),
    "params_none": both(
        optlab.remove_radial,
        lambda: optax.add_decayed_weights(0.1),
        momentum,
        tags={"needs_params"},
    ),
    "wrapper_forwards": both(forwards, hides_params, drops_extra_args, tags={"wrapper"}),
    "state_sharding": both(momentum, with_state(tree_map(lambda p: jnp.zeros(p.shape)))),
    "state_sharding_under_jit": both(
        momentum,
        partial(optax.trace, 0.9),
        with_state(mixes_equal_shapes_up),
    ),
    "explicit_mesh": both(
        momentum,
        with_state(
            tree_map(lambda p: jnp.zeros(p.shape)), lambda u, s: (u, jax.tree.map(jnp.add, u, s))
        ),
    ),
    "sharded_equals_replicated": both(momentum, counts_devices),
    "shard_map": both(momentum, sums_over_an_axis, carries_a_constant),
    "pmap": both(momentum, sums_over_an_axis),
    "constant_schedule": both(sgd, forgets_the_sign_of_schedules, tags={"recipe"}),
    "convergence": both(sgd, descends(lambda: optax.scale(-1.0)), tags={"recipe"}),
    "nnx_optimizer": both(sgd, descends(factored_state), tags={"recipe"}),
    "linen_train_state": both(sgd, descends(factored_state), tags={"recipe"}),
    "scale_invariant": both(unit, identity, tags={"scale_invariant"}),
    "sign_values": both(optax.scale_by_sign, identity, tags={"sign"}),
    "radial_orthogonal": both(projected, identity, tags={"radial"}),
    "idempotent": both(projected, partial(optax.scale, 2.0), tags={"idempotent"}),
    "fixed_norm": both(
        partial(optlab.normalize_and_project, optax.sgd(0.1)), sgd, tags={"fixed_norm"}
    ),
    "clip": both(
        partial(optax.clip_by_global_norm, 1.0),
        identity,
        partial(optax.clip_by_global_norm, 2.0),
        unit,
        tags={"clip"},
        threshold=1.0,
    ),
    "trust_ratio": both(
        optlab.scale_by_trust_ratio, identity, whole(unit_norm_of_params), tags={"trust_ratio"}
    ),
    "momentum_closed_form": both(
        partial(optax.ema, 0.9, debias=False),
        partial(optax.ema, 0.9),
        partial(optax.trace, 0.9),
        tags={"momentum"},
        constant_gradient=lambda t: 1 - 0.9**t,
    ),
    "momentum_zero_is_identity": both(
        partial(optax.ema, decay=0.9),
        lambda decay=0.9: optax.trace(0.9),
        tags={"momentum"},
        no_momentum={"decay": 0.0},
    ),
    "decay": both(
        shrinking, stateless(lambda u, p: u - 0.2 * p), identity, tags={"decay"}, decay_factor=0.9
    ),
    "elementwise": both(
        optax.scale_by_adam, stateless(lambda u, p: u * norm(p, 0)), tags={"elementwise"}
    ),
    "leaf_local": both(unit, whole(global_norm), tags={"layerwise"}),
    "low_rank": both(rank_of, identity, whole(lambda u, p: zeros(u)), tags={"low_rank"}, rank=2),
    "full_rank_is_inner": both(
        rank_of, lambda rank=2: optax.scale(2.0), tags={"low_rank"}, full_rank={"rank": 8}
    ),
    "orthogonal_band": both(
        stateless(svd_polar), identity, unit, tags={"orthogonalize"}, band=(0.99, 1.01)
    ),
    "orthogonal_equivariance": both(
        stateless(svd_polar), optax.scale_by_sign, tags={"orthogonalize"}, band=(0.99, 1.01)
    ),
    "orthogonal_batch": both(
        stateless(svd_polar), whole(global_norm), tags={"orthogonalize"}, band=(0.99, 1.01)
    ),
    "schedule_types": both(
        lambda: ramp, lambda: lambda t: 1.0 if t > 5 else 0.5, lambda: lambda t: t, **schedule
    ),
    "schedule_finite": both(
        lambda: ramp, lambda: lambda t: 1 / t, lambda: lambda t: 1.0 - t / 1500, **schedule
    ),
    "schedule_continuous": both(
        lambda: ramp, lambda: lambda t: jnp.where(t < 1000, 0.9, 1.0), **schedule
    ),
}

DEFECTS = [
    pytest.param(name, defect, id=f"{name}-{i}")
    for name, (_, defects) in TEETH.items()
    for i, defect in enumerate(defects)
]


def test_every_check_has_teeth():
    assert sorted(TEETH) == sorted(CHECKS)
    assert all(defects for _, defects in TEETH.values())


@pytest.mark.parametrize("name", TEETH)
def test_check_applies_to_what_promises_it(name):
    assert name in checks_for(TEETH[name][0].selectors)


@pytest.mark.parametrize("name", TEETH)
def test_check_passes_on_the_healthy_counterpart(name):
    run_check(TEETH[name][0], name)


@pytest.mark.parametrize(("name", "defect"), DEFECTS)
def test_check_catches_the_planted_defect(name, defect):
    with pytest.raises(AssertionError, match=f"^planted: {name}: "):
        run_check(defect, name)


def test_check_transform_names_transform_check_and_leaf():
    make = functools.wraps(optax.scale_by_sign)(stateless(lambda u, p: u.astype(jnp.float32)))
    with pytest.raises(AssertionError, match=r"scale_by_sign: dtype_preserved: .*dense/bias"):
        check_transform(make, tree=small)


def test_xfail_is_strict():
    known = {"dtype_preserved": "on purpose"}
    broken = Case("b", stateless(lambda u, p: u.astype(jnp.float32)), params=small, xfail=known)
    run_check(broken, "dtype_preserved")
    healthy = Case("h", optax.identity, params=small, xfail=known)
    with pytest.raises(AssertionError, match=r"h: dtype_preserved: .*on purpose.* passes"):
        run_check(healthy, "dtype_preserved")


def test_a_law_without_its_number_says_which_to_state():
    row = Case("r", optax.identity, frozenset({"decay"}), small)
    with pytest.raises(AssertionError, match=r"facts\['decay_factor'\]"):
        run_check(row, "decay")


def test_contract_finds_what_is_known_of_optax():
    """optax.contrib.muon fails on sharded matrices; optax's own tests use leaves it skips."""
    row = Case("muon", partial(optax.contrib.muon, 0.1), params=small, hits=("dense/kernel",))
    run_check(row, "path_hit")
    with pytest.raises(AssertionError, match="explicit_mesh: ShardingTypeError"):
        run_check(row, "explicit_mesh")
