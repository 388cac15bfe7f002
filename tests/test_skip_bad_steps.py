"""`skip_bad_steps`: what is a bad step, what a skip leaves untouched, on one device and on many."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optlab.testing import compare
from optlab.testing.case import default_params, random_like
from optlab.testing.sharding import mesh_of
from optlab.transforms.faults import SkipBadStepsState, skip_bad_steps

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
QUIET = {"warmup": 3, "patience": 4}


def gradient(norm, seed=0):
    """Return a gradient of this norm."""
    grads = random_like(PARAMS, seed)
    return jax.tree.map(lambda g: norm / optax.tree.norm(grads) * g, grads)


def fed(tx, norms, state=None, params=PARAMS):
    """Feed gradients of these norms; return which were skipped, and the last state."""
    step, skipped = jax.jit(tx.update), []
    state = tx.init(params) if state is None else state
    for seed, norm in enumerate(norms):
        before = state
        updates, state = step(gradient(norm, seed), state, params)
        moved = any(np.any(np.asarray(u) != 0) for u in jax.tree.leaves(updates))
        skipped.append(int(state.skipped) > int(before.skipped))
        assert moved != skipped[-1] or norm == 0
    return skipped, state


def adam(**arguments):
    return skip_bad_steps(optax.adam(0.1), **QUIET | arguments)


def descent(**arguments):
    return skip_bad_steps(optax.sgd(0.1), **QUIET | arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("leaf", PARAMS)
def test_one_bad_entry_skips_the_step_and_leaves_all_but_the_counters(leaf, bad):
    tx = adam()
    _, state = fed(tx, [1.0])
    grads = gradient(1.0)
    grads[leaf] = grads[leaf].at[-1].set(bad)
    updates, new = tx.update(grads, state, PARAMS)
    compare.equal(updates, jax.tree.map(jnp.zeros_like, PARAMS), "updates of a bad step")
    compare.equal(new.inner, state.inner, "Adam's state after a bad step")
    changed = {k for k in new._fields[1:] if getattr(new, k) != getattr(state, k)}
    assert changed == {"skipped", "in_a_row", "ratio"}
    assert np.isfinite(new.ratio)


def test_good_steps_are_those_of_the_inner_transformation():
    tx, inner = adam(), optax.adam(0.1)
    state, plain, step = tx.init(PARAMS), inner.init(PARAMS), jax.jit(tx.update)
    for seed in range(5):
        grads = gradient(1.0 + seed, seed)
        updates, state = step(grads, state, PARAMS)
        wanted, plain = jax.jit(inner.update)(grads, plain, PARAMS)
        compare.close((updates, state.inner), (wanted, plain), f"step {seed}", 1e-6)
    assert int(state.skipped) == 0


def test_spikes_are_told_from_the_warmup_on_by_the_ratio_of_squares():
    assert fed(adam(), [1, 1, 30, 1, 9.5, 10.5, 1])[0] == [False] * 7
    # The third norm was clipped to ten times the usual: level^2 = 1 + 99/3 = 34 about.
    assert fed(adam(), [1, 1, 1, 9.5, 1])[0] == [False] * 5
    assert fed(adam(), [1, 1, 1, 10.5, 1])[0] == [False, False, False, True, False]
    assert fed(adam(warmup=0), [1, 10.5, 1])[0] == [False, True, False]
    assert fed(adam(threshold=4.0), [1, 1, 1, 2.1])[0][-1]
    assert not any(fed(adam(threshold=np.inf), [1, 1, 1, 1e12, 1])[0])


def test_a_norm_that_overflows_is_a_spike_even_while_the_level_is_learned():
    assert fed(adam(), [1, 1e30, 1, 1e30])[0] == [False, True, False, True]
    assert fed(adam(), [1e30, 1, 1])[0] == [True, False, False]
    assert fed(adam(threshold=np.inf), [1, 1e30, 1])[0] == [False, True, False]


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_what_is_a_spike_does_not_depend_on_the_size_of_all_gradients(size):
    skipped, state = fed(descent(), [size, size, size, size, 9 * size])
    assert not any(skipped)
    np.testing.assert_allclose(float(state.level) / size, 17**0.5, rtol=2e-2)
    assert fed(descent(), [45 * size], state)[0] == [True]
    assert fed(descent(), [35 * size], state)[0] == [False]


def test_the_level_is_the_mean_of_squares_corrected_for_its_start():
    norms, decay = [1.0, 2.0, 0.5, 3.0, 1.5], 0.9
    _, state = fed(adam(decay=decay), norms)
    weights = decay ** np.arange(len(norms))[::-1]
    wanted = np.sqrt(np.sum(weights * np.square(norms)) / np.sum(weights))
    np.testing.assert_allclose(state.level, wanted, rtol=1e-5)
    np.testing.assert_allclose(fed(adam(decay=0.0), norms)[1].level, norms[-1], rtol=1e-6)


def test_zero_gradients_are_steps_and_say_nothing_of_the_level():
    skipped, state = fed(adam(), [1, 1, 1, *[0] * 300, 1])
    assert not any(skipped)
    np.testing.assert_allclose(state.level, 1, rtol=1e-5)
    assert int(state.count) == 4
    assert not any(fed(adam(), [0, 0, 1, 0, 1])[0])


def test_a_new_level_is_accepted_after_patience_and_learned_anew():
    skipped, state = fed(adam(), [1, 1, 1, *[50] * 5])
    assert skipped == [False] * 3 + [True] * 4 + [False]
    np.testing.assert_allclose(state.level, 50, rtol=1e-5)
    assert [int(x) for x in (state.count, state.skipped, state.in_a_row)] == [1, 4, 0]
    # Even where the square overflows in terms of the level before, in a few rounds.
    assert not fed(descent(), [1, 1, 1, *[1e30] * 15])[0][-1]


def test_non_finite_gradients_are_skipped_for_ever_and_count_as_no_spikes():
    skipped, state = fed(adam(), [1, 1, 1, *[np.nan] * 20])
    assert skipped == [False] * 3 + [True] * 20
    assert int(state.spikes) == 0
    assert int(state.in_a_row) == 20
    # Spikes between them do count, so that the two together end.
    skipped, _ = fed(adam(), [50, np.nan] * 4 + [50, 1], state)
    assert skipped == [True] * 8 + [False, False]


def test_metrics_are_scalars_of_the_state():
    _, state = fed(adam(), [2, 2, 2, 50, np.nan])
    found = state.metrics()
    assert {k: float(v) for k, v in found.items() if k != "gradient_norm_ratio"} == {
        "steps_skipped": 2,
        "steps_skipped_in_a_row": 2,
    }
    _, state = fed(adam(), [3], state)
    np.testing.assert_allclose(state.metrics()["gradient_norm_ratio"], 1.5, rtol=1e-5)
    assert int(state.in_a_row) == 0


def test_an_inner_update_never_sees_a_bad_gradient_and_cannot_poison():
    seen = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda g: seen.append(np.asarray(g)), updates["w"])
        return jax.tree.map(lambda u: u / 0.0, updates), jax.tree.map(jnp.log, state)

    inner = optax.GradientTransformation(lambda p: {"sum": -jnp.ones(3)}, update)
    tx = skip_bad_steps(inner)
    state = tx.init(PARAMS)
    updates, new = jax.jit(tx.update)(gradient(np.nan), state, PARAMS)
    jax.effects_barrier()
    assert [np.any(g) for g in seen] == [False]
    compare.equal(updates, jax.tree.map(jnp.zeros_like, PARAMS), "updates of a bad step")
    compare.equal(new.inner, state.inner, "inner state after a bad step")


def test_random_keys_in_the_inner_state_are_kept_too():
    tx = skip_bad_steps(optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(0)), optax.sgd(1)))
    state = tx.init(PARAMS)
    _, skipped = tx.update(gradient(np.nan), state, PARAMS)
    _, taken = tx.update(gradient(1.0), state, PARAMS)
    key = lambda s: jax.random.key_data(s.inner[0].rng_key).tolist()  # noqa: E731
    assert key(skipped) == key(state) != key(taken)


def test_a_schedule_waits():
    tx = skip_bad_steps(optax.sgd(optax.linear_schedule(1.0, 0.0, 10)))
    _, state = fed(tx, [1.0, np.nan, np.nan, 1.0])
    assert int(optax.tree.get(state.inner, "count")) == 2


def test_micro_batches_are_judged_one_by_one_inside_multi_steps():
    multi = optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    tx = skip_bad_steps(multi)
    state = tx.init(PARAMS)
    for norm in (1.0, np.nan, 1.0):
        updates, state = tx.update(gradient(norm), state, PARAMS)
    compare.close(updates, jax.tree.map(jnp.negative, gradient(1.0)), "mean of two good batches")


def test_groups_of_a_partition_skip_by_themselves():
    tx = optax.partition(
        {"watched": adam(), "plain": optax.sgd(1.0)}, {"w": "watched", "b": "plain"}
    )
    grads = gradient(1.0)
    bad = grads | {"w": jnp.full((3, 2), jnp.nan)}
    updates, state = tx.update(bad, tx.init(PARAMS), PARAMS)
    compare.equal(updates, {"w": jnp.zeros((3, 2)), "b": -grads["b"]}, "updates")
    assert int(optax.tree.get(state, "skipped")) == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_gradients_are_judged_as_wholes(kind):
    params = default_params()
    names = {"dense": P("data", "model")}
    where = lambda path, x: names.get(path[0].key, P()) if x.ndim == 2 else P()  # noqa: E731
    mesh, tx = mesh_of(kind), skip_bad_steps(optax.adam(0.1))
    with jax.set_mesh(mesh):
        place = lambda tree: jax.tree_util.tree_map_with_path(  # noqa: E731
            lambda k, x: jax.device_put(x, NamedSharding(mesh, where(k, x))), tree
        )
        grads = random_like(params, 1)
        bad = jax.tree.map(jnp.copy, grads)
        bad["dense"]["kernel"] = bad["dense"]["kernel"].at[-1, -1].set(jnp.nan)
        state, step = jax.jit(tx.init)(place(params)), jax.jit(tx.update)
        _, state = step(place(grads), state, place(params))
        updates, new = step(place(bad), state, place(params))
        assert int(new.skipped) == 1
        compare.equal(new.inner, state.inner, "inner state after a bad step")
        assert not any(np.any(u) for u in jax.tree.leaves(updates))
        kernel = new.inner[0].mu["dense"]["kernel"]
        assert kernel.sharding.spec == P("data", "model")
        np.testing.assert_allclose(state.level, optax.tree.norm(grads), rtol=1e-5)


def test_devices_whose_gradients_differ_decide_alike():
    mesh = mesh_of(AxisType.Auto, (8,), ("batch",))

    def run(axis_name, grads):
        tx = skip_bad_steps(optax.sgd(1.0), axis_name=axis_name)

        def step(mine, params):
            updates, state = tx.update(jax.tree.map(lambda g: g[0], mine), tx.init(params), params)
            return jax.tree.map(lambda x: x[None], (updates, state.skipped, state.level))

        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=(P("batch"), P()), out_specs=P("batch"), check_vma=False
        )
        return jax.jit(mapped)(grads, PARAMS)

    good = jax.tree.map(lambda g: jnp.stack([g] * 8), gradient(1.0))
    bad = good | {"b": good["b"].at[3, 0].set(jnp.nan)}
    updates, skipped, level = run("batch", good)
    assert not np.any(skipped)
    np.testing.assert_allclose(level, 8**0.5 * np.ones(8), rtol=1e-6)
    updates, skipped, _ = run("batch", bad)
    assert np.all(skipped)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    # Without the name each device decides by itself: the reason for the argument.
    assert run(None, bad)[1].tolist() == [int(i == 3) for i in range(8)]


def test_the_types_of_shard_map_are_kept_where_the_axis_is_named():
    mesh = mesh_of(AxisType.Auto, (8,), ("batch",))
    tx = skip_bad_steps(optax.sgd(1.0), axis_name="batch")

    def step(mine, state):
        mean = jax.lax.pmean(jax.tree.map(lambda g: g[0], mine), "batch")
        return tx.update(mean, state)[1]

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P("batch"), P()), out_specs=P())
    grads = jax.tree.map(lambda g: jnp.stack([g] * 8), gradient(1.0))
    state = tx.init(PARAMS)
    compare.same_types(jax.eval_shape(mapped, grads, state), state, "state")


def test_half_precision_is_judged_in_float32():
    half = jax.tree.map(lambda p: p.astype(jnp.float16), PARAMS)
    tx = skip_bad_steps(optax.sgd(1.0), warmup=0)
    state = tx.init(half)
    # The square of 1000 overflows in float16.
    for norm in (1000.0, 1100.0):
        grads = jax.tree.map(lambda g: g.astype(jnp.float16), gradient(norm))
        _, state = tx.update(grads, state, half)
    assert int(state.skipped) == 0
    assert isinstance(state, SkipBadStepsState)
    np.testing.assert_allclose(state.ratio, 1.1, rtol=1e-2)


WRONG = [
    ({"inner": optax.sgd}, TypeError, "inner must be an optax.GradientTransformation"),
    ({"threshold": 1.0}, ValueError, "threshold must be a number > 1, got 1.0"),
    ({"threshold": "10"}, TypeError, "threshold must be a number > 1"),
    ({"decay": 1.0}, ValueError, r"decay must be a number in \[0, 1\), got 1.0"),
    ({"warmup": -1}, ValueError, "warmup must be a whole number >= 0, got -1"),
    ({"patience": 1.5}, TypeError, "patience must be a whole number >= 0, got 1.5"),
    ({"patiense": 1}, TypeError, "Did you mean patience"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG)
def test_wrong_arguments_are_refused_with_the_fix(arguments, kind, message):
    with pytest.raises(kind, match=f"skip_bad_steps: .*{message}"):
        skip_bad_steps(**{"inner": optax.sgd(0.1)} | arguments)
