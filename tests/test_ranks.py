"""Ranks by one threshold on singular values, and factors of that rank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import ranks as reference

from optlab import layout
from optlab.compress import rank_by_energy, shared_basis
from optlab.linalg.ranks import factorize, normalized_spectrum


def spectral(values, shape, seed=0):
    """Return a matrix with these singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(size, len(values))))[0] for size in shape)
    return (u * np.asarray(values) @ v.T).astype(np.float32)


# A long tail, a straight line, and values all near the largest.
TREE = {
    "conv": {"kernel": spectral(np.geomspace(1, 1e-3, 12), (12, 16)).reshape(2, 2, 3, 16)},
    "dense": {"kernel": spectral(np.linspace(1, 0.1, 10), (16, 10), 1), "bias": np.ones(10, "f4")},
    "flat": {"kernel": spectral(1 - np.linspace(0, 1, 8) ** 4, (8, 8), 2)},
    "embed": {"embedding": np.ones((9, 4), "f4")},
    "head": {"kernel": np.ones((4, 9), "f4")},
}
MATRICES = [
    np.float64(TREE[name]["kernel"]).reshape(shape)
    for name, shape in (("conv", (12, 16)), ("dense", (16, 10)), ("flat", (8, 8)))
]


def ints(found):
    return [found.ranks[name]["kernel"] for name in ("conv", "dense", "flat")]


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.9, 1.0])
def test_ranks_agree_with_the_reference(threshold):
    found = rank_by_energy(TREE, threshold=threshold, min_ratio=0)
    pruned = [reference.pruned(w, threshold) for w in MATRICES]
    assert ints(found) == [min(w.shape) - n for w, n in zip(MATRICES, pruned, strict=True)]
    assert found.reduction == pytest.approx(reference.reduction(MATRICES, threshold))
    assert all(type(rank) is int for rank in ints(found))
    # The largest value is always kept; the smallest goes at any threshold above zero.
    assert min(ints(found)) >= 1
    assert threshold == 0 or max(ints(found)) < 12


def test_only_what_drops_enough_is_low_rank():
    found = rank_by_energy(TREE, threshold=0.3)
    pruned = [reference.pruned(w, 0.3) / min(w.shape) for w in MATRICES]
    low = [found.labels[name]["kernel"] for name in ("conv", "dense", "flat")]
    assert low == ["lrc" if share > 0.4999 else "nlrc" for share in pruned]
    assert set(low) == {"lrc", "nlrc"}
    assert ints(found)[1:] == [10, 8]
    assert found.labels["embed"]["embedding"] == found.labels["dense"]["bias"] == "other"
    assert found.labels["head"]["kernel"] == "other"
    assert found.ranks["head"]["kernel"] is found.ranks["dense"]["bias"] is None


@pytest.mark.parametrize("wanted", [0.1, 0.3, 0.5, 0.7])
def test_the_least_threshold_of_a_reduction_is_found(wanted):
    found = rank_by_energy(TREE, reduction=wanted, min_ratio=0)
    dropped = 30 - sum(ints(found))
    assert found.reduction == pytest.approx(dropped / 30)
    assert dropped == int(np.ceil(wanted * 30 - 1e-9))  # the values are all apart
    assert found.threshold == pytest.approx(reference.search(MATRICES, wanted), abs=0.06)
    again = rank_by_energy(TREE, threshold=found.threshold, min_ratio=0)
    assert ints(again) == ints(found)


def test_a_constant_spectrum_keeps_its_rank_and_so_does_zero():
    orthogonal = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0].astype("f4")
    tree = {"a": orthogonal, "b": 3 * orthogonal[:, :5], "c": np.zeros((4, 6), "f4")}
    found = rank_by_energy(tree, threshold=0.9, min_ratio=0)
    assert found.ranks == {"a": 32, "b": 5, "c": 4}
    assert set(found.labels.values()) == {"nlrc"}
    np.testing.assert_array_equal(normalized_spectrum(jnp.zeros((2, 3, 3))), np.ones((2, 3)))


def test_stacked_layers_share_the_largest_rank_and_count_as_such():
    layers = [spectral(np.geomspace(1, low, 6), (6, 8), i) for i, low in enumerate((1e-3, 0.2))]
    own = [rank_by_energy({"w": w}, threshold=0.3, min_ratio=0).ranks["w"] for w in layers]
    assert own[0] < own[1]
    found = rank_by_energy(
        {"layers/w": np.stack(layers)}, threshold=0.3, min_ratio=0, layout=layout.stacked("^layers")
    )
    assert found.ranks["layers/w"] == own[1]
    assert found.reduction == pytest.approx(1 - own[1] / 6)
    beside = {"layers/w": np.stack(layers), "w": TREE["dense"]["kernel"]}
    found = rank_by_energy(beside, threshold=0.3, min_ratio=0, layout=layout.stacked("^layers"))
    kept = 2 * found.ranks["layers/w"] + found.ranks["w"]
    assert found.reduction == pytest.approx(1 - kept / (2 * 6 + 10))


def test_holes_and_empty_leaves_are_passed_over():
    tree = {"w": TREE["dense"]["kernel"], "none": None, "empty": np.ones((0, 4), "f4"), "x": 1.0}
    found = rank_by_energy(tree, reduction=0.5)
    assert found.ranks | {"w": 0} == {"w": 0, "none": None, "empty": None, "x": None}
    assert rank_by_energy({}, reduction=0.5) == ({}, {}, 0.0, 0.0)


def test_bfloat16_leaves_have_ranks():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), TREE)
    found = rank_by_energy(half, threshold=0.3, min_ratio=0)
    assert (
        np.abs(
            np.subtract(ints(found), ints(rank_by_energy(TREE, threshold=0.3, min_ratio=0)))
        ).max()
        <= 1
    )


def test_labels_freeze_what_is_not_low_rank():
    found = rank_by_energy(TREE, threshold=0.3)
    freeze = optax.set_to_zero()
    tx = optax.partition({"lrc": optax.sgd(1.0), "nlrc": freeze, "other": freeze}, found.labels)
    updates, _ = tx.update(TREE, tx.init(TREE), TREE)
    moved = jax.tree.map(lambda u: bool(np.any(u)), updates)
    assert moved == jax.tree.map(lambda label: label == "lrc", found.labels)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_factors_are_the_best_of_their_rank_and_share_the_values(k):
    values = np.geomspace(1, 0.01, 6)
    stack = np.stack([spectral(values, (8, 6), seed) for seed in (0, 1)])
    left, right = factorize(stack, k)
    assert (left.shape, right.shape) == ((2, 8, k), (2, k, 6))
    error = np.linalg.norm(np.float64(stack) - np.float64(left) @ np.float64(right), axis=(1, 2))
    np.testing.assert_allclose(error, np.linalg.norm(values[k:]), rtol=1e-4, atol=1e-6)
    for gram in (left.mT @ left, right @ right.mT):
        want = np.broadcast_to(np.diag(values[:k]), gram.shape)
        np.testing.assert_allclose(gram, want, rtol=0, atol=2e-6)
    half = factorize(jnp.asarray(stack, jnp.bfloat16), k)
    assert {x.dtype for x in half} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_matrices_have_the_same_ranks_and_subspace(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    w = TREE["dense"]["kernel"]
    placed = jax.device_put(w, NamedSharding(mesh, P("data", "model")))
    got, want = (rank_by_energy({"w": x}, threshold=0.3) for x in (placed, w))
    assert got == want
    got, want = (np.asarray(shared_basis([x, x], 3)) for x in (placed, w))
    np.testing.assert_allclose(got @ got.T, want @ want.T, rtol=0, atol=1e-5)


NAN = {"block": {"w": np.full((3, 3), np.nan, "f4")}}
WRONG = {
    "neither": (lambda: rank_by_energy(TREE), "give either threshold or reduction"),
    "both": (lambda: rank_by_energy(TREE, threshold=0.1, reduction=0.1), "give either threshold"),
    "threshold": (lambda: rank_by_energy(TREE, threshold=1.5), "threshold must be a number in [0,"),
    "reduction": (lambda: rank_by_energy(TREE, reduction=1.0), "reduction must be a number in [0,"),
    "min_ratio": (lambda: rank_by_energy(TREE, threshold=0.1, min_ratio=1.0), "min_ratio must be"),
    "too_much": (lambda: rank_by_energy(TREE, reduction=0.95), "at most 0.9 here"),
    "nan": (lambda: rank_by_energy(NAN, threshold=0.1), "leaf 'block/w' has no singular values"),
    "rank": (lambda: factorize(np.ones((3, 4)), 4), "from 1 to min(m, n), got k=4"),
    "vector": (lambda: factorize(np.ones(3), 1), "for a matrix of shape (3,)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_call_is_refused(wrong):
    call, fix = WRONG[wrong]
    with pytest.raises(ValueError, match=r"^(rank_by_energy|factorize): ") as error:
        call()
    assert fix in str(error.value)


@pytest.mark.parametrize("trace", [jax.jit, jax.eval_shape])
def test_ranks_are_refused_inside_a_compiled_step(trace):
    call = lambda tree: rank_by_energy(tree, threshold=0.1).ranks  # noqa: E731
    traced = (lambda: jax.jit(call)(TREE)) if trace is jax.jit else lambda: trace(call, TREE)
    with pytest.raises(TypeError, match=r"rank_by_energy: .*'conv/kernel'.*outside jax.jit"):
        traced()


def test_shapes_have_no_ranks():
    shapes = jax.eval_shape(lambda tree: tree, TREE)
    with pytest.raises(TypeError, match=r"rank_by_energy: .*as a shape"):
        rank_by_energy(shapes, threshold=0.1)
