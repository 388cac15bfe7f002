"""Importance of single weights: sums of gradients, scores, and what masks keep of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import importance as reference

from optlab import layout
from optlab.compress import gblm_scores, importance_mask
from optlab.testing import random_like
from optlab.transforms.constrain import keep_sparsity
from optlab.transforms.importance import accumulate_importance

SAMPLES = 4
SHAPES = {
    "attn": {"out": {"kernel": (2, 4, 6)}},
    "conv": {"kernel": (2, 2, 3, 4)},
    "dense": {"bias": (5,), "kernel": (8, 5)},
    "embed": {"embedding": (7, 4)},
    "head": {"kernel": (5, 7)},
    "layers": {"kernel": (3, 8, 4)},
}
LAYOUT = layout.stacked("^layers")
# Of each leaf that is scored: layers, inputs, outputs.
READ = {"attn/out": (1, 8, 6), "conv": (1, 12, 4), "dense": (1, 8, 5), "layers": (3, 8, 4)}
PARAMS = random_like(SHAPES, seed=0)
GRADS = [random_like(SHAPES, seed=t + 1) for t in range(SAMPLES)]


def pick(tree, name):
    """Return a kernel as (layers, inputs, outputs)."""
    for key in name.split("/"):
        tree = tree[key]
    return np.asarray(tree["kernel"]).reshape(READ[name])


def norms():
    """Return norms of activations: (*batch, inputs) of every leaf that is scored."""
    rng = np.random.default_rng(5)
    drawn = {name: rng.random((layers, m)) for name, (layers, m, _) in READ.items()}
    one = {name: x if name == "layers" else x[0] for name, x in drawn.items()}
    return {
        "attn": {"out": {"kernel": one["attn/out"]}},
        "conv": {"kernel": one["conv"]},
        "dense": {"bias": None, "kernel": one["dense"]},
        "embed": None,
        "head": None,
        "layers": {"kernel": one["layers"]},
    }, drawn


def sums(p):
    """Run the samples through the transformation."""
    tx = accumulate_importance(p)
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    for g in GRADS:
        updates, state = step(g, state)
        jax.tree.map(np.testing.assert_array_equal, updates, g)
    return state.sums


@pytest.mark.parametrize("p", [1, 2])
def test_sums_are_those_of_absolute_values_and_of_squares(p):
    for found, *grads in zip(*map(jax.tree.leaves, (sums(p), *GRADS)), strict=True):
        want = sum(np.abs(np.float64(g)) ** p for g in grads)
        np.testing.assert_allclose(found, want, rtol=1e-6)


def test_sums_of_half_precision_are_taken_in_float32():
    """Four samples of 20000 each pass the largest float16, 65504."""
    tx, g = accumulate_importance(), jnp.full((2, 2), 20000, jnp.float16)
    state = tx.init(g)
    for _ in range(4):
        updates, state = tx.update(g, state)
    assert updates.dtype == jnp.float16
    np.testing.assert_array_equal(state.sums, np.full((2, 2), 80000.0))


@pytest.mark.parametrize("p", [1, 2])
def test_scores_agree_with_the_reference(p):
    tree, drawn = norms()
    found = gblm_scores(PARAMS, sums(p), tree, alpha=3.0, p=p, layout=LAYOUT)
    for name, x_norms in drawn.items():
        grads = np.stack([np.float64(pick(g, name)) for g in GRADS])
        for layer, (w, x) in enumerate(zip(pick(PARAMS, name), x_norms, strict=True)):
            want = reference.scores(np.float64(w), grads[:, layer], x, alpha=3.0, p=p)
            got = pick(found, name)[layer]
            np.testing.assert_allclose(got, want, rtol=2e-6, err_msg=name)
    # What is not pruned: tables, the head, vectors.
    assert found["embed"]["embedding"] is found["head"]["kernel"] is found["dense"]["bias"] is None


def test_without_gradients_it_is_wanda_and_without_activations_gradients_alone():
    tree, drawn = norms()
    wanda = gblm_scores(PARAMS, x_norms=tree, layout=LAYOUT)
    want = np.abs(pick(PARAMS, "dense")) * drawn["dense"][..., None]
    np.testing.assert_allclose(pick(wanda, "dense"), want, rtol=2e-6)
    total = sums(1)
    alone = gblm_scores(PARAMS, total, layout=LAYOUT)
    want = 100 * np.abs(pick(PARAMS, "conv")) * pick(total, "conv")
    np.testing.assert_allclose(pick(alone, "conv"), want, rtol=2e-6)


def test_norms_of_activations_meet_their_inputs_where_layers_come_after_them():
    """Heads are layers here, on the axis between inputs and outputs."""
    policy = layout.rules({"": layout.MatrixView(rows=(0,), cols=(2,))})
    w, x_norms = np.ones((4, 2, 3), "f4"), np.arange(8.0).reshape(2, 4)
    scores = gblm_scores({"w": w}, x_norms={"w": x_norms}, layout=policy)["w"]
    np.testing.assert_array_equal(scores, np.broadcast_to(x_norms.T[..., None], w.shape))


@pytest.mark.parametrize("how", [{"ratio": 0.5}, {"ratio": 0.3}, {"pattern": (1, 4)}])
def test_masks_agree_with_the_reference(how):
    scores = gblm_scores(PARAMS, sums(1), layout=LAYOUT)
    found = importance_mask(scores, **how, layout=LAYOUT)
    for name in READ:
        for got, score in zip(pick(found, name), pick(scores, name), strict=True):
            np.testing.assert_array_equal(got, reference.mask(score, **how), err_msg=name)
    assert found["head"]["kernel"] is None


def test_of_equal_scores_the_first_go():
    for how, want in (({"ratio": 0.5}, [0, 0, 1, 1]), ({"pattern": (1, 2)}, [0, 1, 0, 1])):
        mask = importance_mask({"kernel": jnp.ones((4, 1))}, **how)
        np.testing.assert_array_equal(mask["kernel"][:, 0], want)


def test_what_is_masked_stays_zero_and_holds_the_pattern():
    scores = gblm_scores(PARAMS, sums(1), layout=LAYOUT)
    mask = importance_mask(scores, pattern=(2, 4), layout=LAYOUT)
    keep = keep_sparsity(mask, pattern=(2, 4), layout=LAYOUT)
    tx, params = optax.chain(optax.adam(0.1), keep), PARAMS
    state, step = tx.init(params), jax.jit(tx.update)
    for g in GRADS:
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
    for name in READ:
        np.testing.assert_array_equal(pick(params, name) != 0, pick(mask, name), err_msg=name)
    keep_sparsity(pattern=(2, 4), layout=LAYOUT).init(params)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("how", [{"ratio": 0.5}, {"pattern": (2, 4)}])
def test_sharded_leaves_are_scored_and_masked_where_they_lie(kind, how):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    where = NamedSharding(mesh, P("data", "model"))
    w = {"kernel": GRADS[0]["layers"]["kernel"][0], "wide": jnp.ones((16, 4))}
    placed, x_norms = jax.device_put(w, where), {"kernel": np.arange(8.0), "wide": None}

    def masks(w):
        return importance_mask(gblm_scores(w, w, x_norms), **how)

    found = masks(placed)
    for name, want in masks(w).items():
        np.testing.assert_array_equal(found[name], want)
        if kind == AxisType.Explicit:
            assert found[name].sharding == placed[name].sharding


W = {"kernel": np.ones((4, 2), "f4")}
WRONG = {
    "p": (lambda: accumulate_importance(3), "accumulate_importance: p must be 1 or 2, got 3"),
    "norm": (lambda: gblm_scores(W, W, p=0.5), "gblm_scores: p must be 1 or 2, got 0.5"),
    "alpha": (lambda: gblm_scores(W, W, alpha=-1.0), "alpha must be a number >= 0"),
    "nothing": (lambda: gblm_scores(W), "sums or x_norms is needed"),
    "x_norms": (
        lambda: gblm_scores(W, x_norms={"kernel": np.ones(2)}),
        "x_norms of leaf 'kernel' of shape (4, 2) must have shape (4,)",
    ),
    "tree": (lambda: gblm_scores(W, {"w": 1}), "sums is no prefix of the parameter tree"),
    "neither": (lambda: importance_mask(W), "give either ratio or pattern"),
    "both": (lambda: importance_mask(W, 0.5, pattern=(2, 4)), "give either ratio or pattern"),
    "ratio": (lambda: importance_mask(W, 1.0), "ratio must be a number in [0, 1), got 1.0"),
    "pattern": (lambda: importance_mask(W, pattern=(4, 4)), "pattern must be (n, m)"),
    "rest": (
        lambda: importance_mask(W, pattern=(1, 3)),
        "leaf 'kernel' of shape (4, 2) has 4 inputs, which 3 does not divide",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_call_is_refused(wrong):
    call, fix = WRONG[wrong]
    with pytest.raises(
        ValueError, match=r"^(accumulate_importance|gblm_scores|importance_mask): "
    ) as error:
        call()
    assert fix in str(error.value)
