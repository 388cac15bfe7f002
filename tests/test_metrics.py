"""`metrics` finds the scalars of every state, under names that tell them apart."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

import optlab
from optlab.state.metrics import metrics

PARAMS = {
    "dense": {"bias": jnp.zeros(6), "kernel": jnp.linspace(-1.0, 1.0, 24).reshape(4, 6)},
    "norm": {"scale": jnp.ones(4)},
}
GRADS = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), PARAMS)
LABELS = {"dense": "a", "norm": "b"}


class Marked(NamedTuple):
    """State of a link that has something to say."""

    mark: jax.Array

    def metrics(self):
        """Return ten times the mark."""
        return {"tenfold": 10 * self.mark}


class Said(NamedTuple):
    """State that says what its class is told to."""

    count: jax.Array


def marked():
    """Return a link with a number in its state."""
    init = lambda params: Marked(jnp.asarray(0.5))  # noqa: E731
    return optax.GradientTransformation(init, lambda u, s, p=None: (u, Marked(s.mark + 1)))


def stepped(tx, steps=1, params=PARAMS, grads=GRADS):
    """Return the state after some steps."""
    state = tx.init(params)
    for _ in range(steps):
        _, state = tx.update(grads, state, params)
    return state


def values(state):
    return {name: float(value) for name, value in metrics(state).items()}


def marked_learning_rate(learning_rate):
    return optax.chain(marked(), optax.scale(learning_rate))


WRAPPED = {
    "alone": marked(),
    "chain": optax.chain(optax.scale_by_adam(), marked()),
    "chain_of_chains": optax.chain(optax.chain(optax.chain(marked())), optax.scale(1.0)),
    "named_chain": optax.named_chain(("first", optax.identity()), ("second", marked())),
    "multi_steps": optax.MultiSteps(marked(), 1).gradient_transformation(),
    "partition": optax.partition({"a": marked(), "b": optax.sgd(0.1)}, LABELS),
    "masked": optax.masked(marked(), {"dense": True, "norm": False}),
    "inject": optax.inject_hyperparams(marked_learning_rate)(0.1),
    "apply_if_finite": optax.apply_if_finite(marked(), 3),
    "conditionally": optax.conditionally_transform(marked(), lambda step: step >= 0),
    "sam": contrib.sam(marked(), optax.sgd(0.1), sync_period=1, opaque_mode=False),
    "schedule_free": contrib.schedule_free(marked(), 0.1),
    "in_low_rank": optlab.in_low_rank(marked(), rank=2),
    "select_blocks": optlab.select_blocks(marked(), "ascending", inner_state="follow"),
    "project_radial": optlab.project_radial(marked()),
    "previous_updates": optlab.with_previous_updates(marked()),
    "deep": optax.MultiSteps(
        optax.apply_if_finite(
            optax.partition({"a": optax.chain(marked()), "b": optax.sgd(0.1)}, LABELS), 3
        ),
        1,
    ).gradient_transformation(),
}


@pytest.mark.parametrize("tx", WRAPPED.values(), ids=WRAPPED)
def test_a_state_is_found_in_every_wrapper(tx):
    state = stepped(tx)
    assert values(state)["tenfold"] == 15.0


def test_a_state_is_found_in_lookahead():
    tx = optax.lookahead(marked(), 2, 0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    found = values(stepped(tx, params=params))
    assert found == {"tenfold": 15.0, "steps_since_sync": 1.0}


@pytest.mark.parametrize("name", optlab.recipes.__all__)
def test_every_recipe_gives_scalars_also_under_jit(name):
    tx = getattr(optlab, name)(optax.constant_schedule(0.1))
    state = jax.eval_shape(tx.init, PARAMS)
    found = jax.eval_shape(metrics, state)
    assert all(x.shape == () for x in found.values())
    # A schedule counts, whatever the method does.
    assert any(name.split("/")[-1] == "count" for name in found)


def test_under_jit_the_values_are_the_same():
    tx = optax.chain(optlab.sgd_sai(0.1), marked())
    state = stepped(tx, 2)
    assert {k: float(v) for k, v in jax.jit(metrics)(state).items()} == values(state)


def test_namesakes_get_what_tells_them_apart_and_no_more():
    tx = optax.chain(
        optax.partition(
            {
                "a": optax.chain(optax.scale(1.0), optax.scale_by_adam()),
                "b": optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda step: 1.0)),
            },
            LABELS,
        ),
        marked(),
    )
    assert sorted(metrics(tx.init(PARAMS))) == ["a/count", "b/0/count", "b/1/count", "tenfold"]


def test_the_outer_of_two_namesakes_keeps_the_bare_name():
    tx = optlab.in_low_rank(optax.scale_by_adam(), rank=2)
    assert {"count", "inner/count"} <= metrics(tx.init(PARAMS)).keys()


def test_a_label_with_a_slash_hides_nothing():
    one, two, three = (Marked(jnp.asarray(float(i))) for i in (1, 2, 3))
    found = values({"a": {"b": one, "c": two}, "a/b": three})
    assert found == {"a/b/tenfold": 10, "a/c/tenfold": 20, "a/b/tenfold#2": 30}


OPTAX = {
    "adam": optax.adam(optax.constant_schedule(0.1)),
    "adan": optax.adan(0.1),
    "adafactor": optax.adafactor(0.1),
    "noisy_sgd": optax.noisy_sgd(0.1, key=0),
    "lbfgs": optax.lbfgs(),
    "apply_if_finite": optax.apply_if_finite(optax.sgd(0.1), 2),
    "multi_steps": optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "prodigy": contrib.prodigy(),
    "dadapt_adamw": contrib.dadapt_adamw(),
    "dog": contrib.dog(1.0),
    "momo": contrib.momo(),
    "mechanize": contrib.mechanize(optax.sgd(0.1)),
    "ademamix": contrib.ademamix(0.1),
    "reduce_on_plateau": contrib.reduce_on_plateau(),
    "schedule_free": contrib.schedule_free_sgd(0.1),
    "muon": contrib.muon(0.1),
    "injected": optax.inject_hyperparams(optax.adamw)(0.1),
}


@pytest.mark.parametrize("tx", OPTAX.values(), ids=OPTAX)
def test_every_scalar_of_optax_is_reported(tx):
    state = jax.eval_shape(tx.init, PARAMS)
    numeric = lambda x: not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    scalars = [x for x in jax.tree.leaves(state) if x.shape == () and numeric(x)]
    assert scalars
    assert len(jax.eval_shape(metrics, state)) == len(scalars)


def test_injected_learning_rates_follow_their_schedule():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    state = stepped(optax.inject_hyperparams(optax.adamw)(schedule, b1=0.8), 3)
    found = values(state)
    assert found["learning_rate"] == pytest.approx(0.8)
    assert found["b1"] == pytest.approx(0.8)
    assert found["count"] == found["inner_state/count"] == 3
    # The count that optax keeps for the schedule alone is not repeated.
    assert sum(name.endswith("count") for name in found) == 2


def test_a_hyperparameter_set_by_hand_is_read_as_it_is():
    state = optax.inject_hyperparams(optax.sgd)(0.5).init(PARAMS)
    state.hyperparams["learning_rate"] = 0.25
    assert values(state)["learning_rate"] == 0.25


def test_counters_of_faults_and_of_accumulation():
    tx = optax.MultiSteps(optax.apply_if_finite(optax.sgd(0.1), 5), 2).gradient_transformation()
    state = tx.init(PARAMS)
    for size in (1.0, jnp.nan, 1.0):
        _, state = tx.update(jax.tree.map(lambda g, size=size: size * g, GRADS), state, PARAMS)
    found = values(state)
    assert (found["mini_step"], found["gradient_step"]) == (1, 1)
    assert (found["total_notfinite"], found["last_finite"]) == (1, 0)


def test_snapshots_and_monitors_of_optax_are_metrics():
    tx = optax.chain(
        optax.snapshot("before", optax.tree.norm),
        optax.snapshot("whole", lambda tree: tree),
        optax.scale(0.5),
        optax.monitor({"after": optax.tree.norm}),
    )
    found = values(stepped(tx))
    assert found["after"] == pytest.approx(found["before"] / 2)
    assert set(found) == {"before", "after"}


def test_random_keys_and_arrays_are_no_metrics():
    state = (Said(jnp.zeros(3)), optax.AddNoiseState(jnp.zeros([], jnp.int32), jax.random.key(0)))
    assert list(metrics(state)) == ["count"]


def test_the_state_of_an_nnx_optimizer_is_read():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    tx = optax.chain(marked(), optlab.galore(0.1, rank=2, every=1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(2):
        grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        optimizer.update(model, grads)
    found = values(optimizer.opt_state)
    assert found["tenfold"] == 25.0
    assert found["subspaces_found"] == 2
    assert found["subspace_overlap"] == pytest.approx(1.0, abs=1e-3)


def says(what):
    """Return a state with a method that returns `what`."""
    return type("Talk", (Said,), {"metrics": lambda self: what})(jnp.zeros([]))


def test_what_is_no_scalar_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Talk\.metrics\(\) .* got shape \(2,\) for 'x'\. Return"):
        metrics((says({"x": jnp.ones(2)}),))
    with pytest.raises(TypeError, match=r"Talk\.metrics\(\) must return a dict .* got list\. Ret"):
        metrics((says([1.0]),))


def test_overlap_is_one_where_the_gradient_stays_and_zero_before_a_second_look():
    tx = optlab.in_low_rank(optax.identity(), optlab.svd_projector(), rank=1, every=1)
    first, second = values(stepped(tx, 1)), values(stepped(tx, 2))
    assert (first["subspace_overlap"], first["subspaces_found"]) == (0, 1)
    assert (second["subspace_overlap"], second["subspaces_found"]) == (pytest.approx(1.0), 2)


def test_overlap_is_zero_where_the_subspace_is_another():
    tx = optlab.in_low_rank(optax.identity(), optlab.svd_projector(), rank=1, every=1)
    params, state = {"kernel": jnp.zeros((4, 6))}, None
    state = tx.init(params)
    for i in range(2):
        grads = {"kernel": jnp.zeros((4, 6)).at[i, i].set(1.0)}
        _, state = tx.update(grads, state, params)
    assert values(state)["subspace_overlap"] == pytest.approx(0.0, abs=1e-6)


def test_a_tree_without_matrices_has_no_overlap():
    tx = optlab.in_low_rank(optax.identity(), rank=1)
    assert list(metrics(tx.init({"scale": jnp.ones(3)}))) == ["count"]


def test_lazy_refreshes_tell_how_often_they_waited():
    rule = optlab.lazy_refresh(1, queue=1, threshold=0.1)
    tx = optlab.in_low_rank(optax.identity(), optlab.svd_projector(), rank=1, every=rule)
    # Found at 0, again at 1: one interval of 2.
    assert values(stepped(tx, 2))["interval_growths"] == 1.0


def test_numbers_of_links_are_those_of_their_fields():
    snr = values(stepped(optlab.scale_by_initial_snr(normalize=False)))
    flat = {k: np.asarray(g) for k, g in zip("bks", jax.tree.leaves(GRADS), strict=True)}
    want = [np.linalg.norm(g) / (g.std(ddof=1) + 1e-8) for g in flat.values()]
    assert (snr["gsnr_min"], snr["gsnr_max"]) == (
        pytest.approx(min(want), rel=1e-5),
        pytest.approx(max(want), rel=1e-5),
    )
    size = float(optax.tree.norm(GRADS))
    adagrad = values(stepped(optlab.scale_by_adagrad_norm(b0=0.0), 4))
    assert adagrad["adagrad_norm"] == pytest.approx(2 * size, rel=1e-5)
    limiter = optlab.norm_growth_limiter(1.5)
    assert values(limiter.init(PARAMS))["limited_norm"] == 0
    assert values(stepped(limiter))["limited_norm"] == pytest.approx(size, rel=1e-5)


def test_shares_of_moving_blocks():
    assert values(stepped(optlab.select_blocks(optax.identity(), "gs", 2)))[
        "moving_share"
    ] == pytest.approx(2 / 3)
    state = stepped(optlab.select_blocks(optax.identity(), "top_k", 17))
    assert values(state)["moving_share"] == pytest.approx(17 / 34)


def test_noise_of_gradients_that_do_not_change_is_none():
    tx = optlab.lanton(0.1)
    state = stepped(tx, 1)
    assert values(state)["noise_max"] == 0
    _, state = tx.update(jax.tree.map(jnp.square, GRADS), state, PARAMS)
    found = values(state)
    assert 0 < found["noise_min"] <= found["noise_max"]
