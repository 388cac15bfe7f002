"""Is this batch large enough, and the batch that grows until it is."""

import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from optlab.controllers.batch_growth import BatchGrowth, NormTest, norm_test

RNG = np.random.default_rng(0)
SHAPES = {"a": (3, 2), "b": (4,)}


def examples(count, mean=1.0, noise=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return {k: mean + noise * rng.normal(size=(count, *s)) for k, s in SHAPES.items()}


def as_jax(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def by_definition(grads, eta=0.1, theta=0.9, nu=5.84):
    """Return the batch each test asks for, from every example's own numbers."""
    x = np.concatenate([g.reshape(len(g), -1) for g in grads.values()], 1)
    mean = x.mean(0)
    squared = mean @ mean
    products = x @ mean
    rest = x - np.outer(products, mean) / squared
    inner = products.var(ddof=1) / (theta**2 * squared**2)
    return {
        "norm": x.var(0, ddof=1).sum() / (eta**2 * squared),
        "inner": inner,
        "augmented": max(inner, rest.var(0, ddof=1).sum() / (nu**2 * squared)),
    }


@pytest.mark.parametrize("test", ["norm", "inner", "augmented"])
@pytest.mark.parametrize("seed", range(3))
def test_it_asks_for_the_batch_of_the_definition(test, seed):
    grads = examples(8, mean=0.3, noise=2.0, seed=seed)
    thresholds = {"eta": 0.3, "theta": 0.15, "nu": 0.4}
    want = by_definition(grads, **thresholds)[test]
    found = norm_test(as_jax(grads), test=test, **thresholds)
    assert want > 8, "the case passes: it proves nothing"
    assert int(found.next_batch) == np.ceil(want)
    assert not found.passes


def test_the_orthogonal_part_decides_where_it_is_the_noisier():
    along, across = np.ones((8, 4)), np.zeros((8, 4))
    across[::2, 0], across[1::2, 0] = 9, -9
    across[::2, 1], across[1::2, 1] = -9, 9
    grads = {"w": jnp.asarray(along + across, jnp.float32)}
    assert norm_test(grads, test="inner").passes
    assert not norm_test(grads, test="augmented", nu=1.0).passes


def test_a_batch_that_is_large_enough_stays():
    found = norm_test(as_jax(examples(64, mean=5.0)), eta=0.5)
    assert found.passes
    assert int(found.next_batch) == 64
    assert found.next_batch.dtype == jnp.int32


def test_jit_agrees_with_eager_and_gradients_in_bfloat16_are_widened():
    grads = as_jax(examples(8, noise=3.0))
    eager, jitted = norm_test(grads, 0.3), jax.jit(norm_test)(grads, 0.3)
    for a, b in zip(eager, jitted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert norm_test(as_jax(grads, jnp.bfloat16)).variance.dtype == jnp.float32


def test_means_of_groups_estimate_the_variance_of_examples():
    singles = examples(512, noise=2.0)
    groups = {k: x.reshape(64, 8, *x.shape[1:]).mean(1) for k, x in singles.items()}
    one, eight = norm_test(as_jax(singles)), norm_test(as_jax(groups), group_size=8)
    np.testing.assert_allclose(eight.squared_norm, one.squared_norm, rtol=1e-5)
    # 63 degrees of freedom on 10 coordinates: 6 %.
    np.testing.assert_allclose(eight.variance, one.variance, rtol=0.2)
    np.testing.assert_allclose(eight.next_batch, one.next_batch, rtol=0.2)


def test_the_batch_it_asks_for_has_the_relative_noise_it_wants():
    asked = int(norm_test(as_jax(examples(256, mean=0.5, noise=2.0)), eta=0.25).next_batch)
    means = [
        np.concatenate([x.mean(0).ravel() for x in examples(asked, 0.5, 2.0, s).values()])
        for s in range(1, 40)
    ]
    relative = np.mean([((m - 0.5) ** 2).sum() for m in means]) / (0.5**2 * len(means[0]))
    assert relative**0.5 == pytest.approx(0.25, rel=0.2)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_gradients_may_be_huge_or_tiny(scale):
    grads = as_jax(examples(8, noise=3.0))
    scaled = jax.tree.map(lambda x: x * scale, grads)
    for test in ("norm", "augmented"):
        plain, found = norm_test(grads, test=test), norm_test(scaled, test=test)
        np.testing.assert_allclose(found.next_batch, plain.next_batch, atol=1)


def test_a_mean_of_zero_asks_for_the_largest_batch_and_a_broken_gradient_for_none():
    split = {"w": jnp.array([[1.0], [-1.0]])}
    assert int(norm_test(split, max_batch=1024).next_batch) == 1024
    broken = norm_test({"w": jnp.array([[1.0], [jnp.nan]])}, max_batch=1024)
    assert int(broken.next_batch) == 2
    assert broken.passes


@pytest.mark.parametrize(
    ("grads", "lengths"),
    [
        ({"w": jnp.ones((1, 3))}, r"\[1\]"),
        ({"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, r"\[3, 4\]"),
        ({"w": jnp.ones(())}, r"\[0\]"),
        ({}, r"\[\]"),
    ],
)
def test_leaves_without_examples_are_refused(grads, lengths):
    with pytest.raises(ValueError, match=rf"norm_test: .*{lengths}.*jax\.vmap\(jax\.grad"):
        norm_test(grads)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"test": "norms"}, "test must be one of"),
        ({"eta": 0.0}, "eta must be a number > 0"),
        ({"group_size": 0}, "group_size must be a whole number >= 1"),
    ],
)
def test_wrong_thresholds_are_refused(given, says):
    with pytest.raises(ValueError, match=f"norm_test: {says}"):
        norm_test(as_jax(examples(2)), **given)


def asks(batch):
    return NormTest(np.int32(batch), np.bool_(False), np.float32(1), np.float32(1))


@hypothesis.given(st.lists(st.integers(1, 2000), min_size=1, max_size=8), st.booleans())
@hypothesis.settings(max_examples=50)
def test_batches_grow_in_multiples_up_to_the_cap_and_never_shrink(wanted, doubling):
    growth = BatchGrowth(16, 1024, multiple=8, doubling=doubling)
    for batch in wanted:
        before = growth.batch_size
        grew = growth.observe(asks(batch))
        assert grew == (growth.batch_size > before)
        assert before <= growth.batch_size <= 1024
        assert growth.batch_size >= min(batch, 1024)
        assert growth.batch_size % 8 == 0
        if doubling:
            assert growth.batch_size in {16 * 2**k for k in range(7)}


def test_the_smallest_size_that_is_enough_is_taken():
    assert [grown(n) for n in (17, 24, 25)] == [24, 24, 32]
    assert [grown(n, doubling=True) for n in (17, 32, 33, 128)] == [32, 32, 64, 128]


def grown(wanted, **given):
    growth = BatchGrowth(16, 1024, multiple=8, **given)
    growth.observe(asks(wanted))
    return growth.batch_size


def test_it_is_due_every_so_often_until_there_is_nothing_to_grow():
    growth = BatchGrowth(2, 4, every=5)
    assert [step for step in range(11) if growth.due(step)] == [0, 5, 10]
    growth.observe(asks(100))
    assert growth.batch_size == 4
    assert not growth.due(10)


def test_it_resumes_from_json():
    growth = BatchGrowth(2, 64)
    growth.observe(asks(np.int32(11)))
    again = BatchGrowth(2, 64)
    again.load_state_dict(json.loads(json.dumps(growth.state_dict())))
    assert again.batch_size == 11
    with pytest.raises(ValueError, match=r"BatchGrowth: .*\['batch_size'\], got \['size'\]"):
        again.load_state_dict({"size": 3})


def test_the_step_compiles_once_for_every_size():
    sizes, growth = [], BatchGrowth(4, 32, doubling=True)

    @jax.jit
    def step(x):
        sizes.append(len(x))
        return norm_test(x, 0.5)

    for seed in range(8):
        noisy = np.random.default_rng(seed).normal(1.0, 2.0, (growth.batch_size, 3))
        growth.observe(step(jnp.asarray(noisy, jnp.float32)))
    assert len(sizes) == len(set(sizes)) <= 4
    assert growth.batch_size == 32


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"init_batch": 0}, "init_batch must be a whole number >= 1"),
        ({"max_batch": 2}, "max_batch must be .* not below init_batch"),
        ({"multiple": 3}, "init_batch must be a multiple of 3"),
        ({"every": 0}, "every must be a whole number >= 1"),
    ],
)
def test_wrong_sizes_are_refused(given, says):
    with pytest.raises(ValueError, match=f"BatchGrowth: {says}"):
        BatchGrowth(**{"init_batch": 4, "max_batch": 64, **given})
