"""What projectors keep, and how near it is to what they look for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import low_rank as reference
from stepping import steps

import optlab
from optlab.linalg import blocks

KEY = jax.random.key(0)
# 0.5^i: every vector is told from its neighbours, the last ones are 1/30 of the first.
SPECTRUM = 0.5 ** np.arange(6)


def matrix(seed, shape=(6, 9), spectrum=SPECTRUM):
    u, _, vt = np.linalg.svd(np.random.default_rng(seed).normal(size=shape), full_matrices=False)
    return ((u * spectrum) @ vt).astype("f4")


def find(projector, x, rank, *, key=KEY, old=None):
    """Return the basis that a projector finds in a matrix, the first time or after `old`."""
    kept = projector.init((), len(x), rank, x.dtype) if old is None else old
    first = jnp.asarray(old is None)
    stored = jax.jit(projector.find, static_argnums=2)(x, kept, rank, key, first)
    return np.asarray(projector.basis(stored, len(x), rank)), stored


def overlap(a, b):
    return np.sum((a.T @ b) ** 2) / a.shape[1]


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_svd_finds_the_first_vectors_with_their_largest_entry_positive(rank):
    x = matrix(0)
    basis, _ = find(optlab.svd_projector(), x, rank)
    np.testing.assert_allclose(basis, reference.singular(rank)(x, 0), rtol=0, atol=1e-5)
    assert np.all(np.max(basis, axis=0) == np.max(np.abs(basis), axis=0))
    turned, _ = find(optlab.svd_projector(), -x, rank)
    np.testing.assert_allclose(turned, basis, rtol=0, atol=1e-5)


@pytest.mark.parametrize("oversample", [None, 0, 9])
def test_power_iteration_finds_the_subspace_of_svd(oversample):
    x = matrix(1)
    basis, _ = find(optlab.power_projector(1, oversample=oversample), x, 2)
    assert overlap(basis, reference.singular(2)(x, 0)) > 0.99
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), rtol=0, atol=1e-5)


def test_power_iteration_is_the_better_for_a_warm_start():
    first, second = matrix(1), matrix(1) + 0.01 * matrix(2)
    want, missing = reference.singular(2)(second, 0), {}
    for warm in (True, False):
        projector = optlab.power_projector(1, oversample=0, warm_start=warm)
        _, stored = find(projector, first, 2)
        # Two iterations more where it starts anew, and still further off.
        basis, _ = find(projector, second, 2, old=stored, key=jax.random.key(7))
        missing[warm] = 1 - overlap(basis, want)
    assert 0 <= missing[True] < 1e-5 < missing[False]


def test_an_exact_start_is_that_of_svd():
    x = matrix(3)
    exact, _ = find(optlab.power_projector(1, start="svd"), x, 3)
    np.testing.assert_allclose(exact, find(optlab.svd_projector(), x, 3)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "make", [optlab.svd_projector, optlab.power_projector], ids=["svd", "power"]
)
def test_a_matrix_short_of_rank_still_has_an_orthonormal_basis(make):
    x = matrix(4, spectrum=np.array([1.0, 0, 0, 0, 0, 0]))
    basis, _ = find(make(), x, 3)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), rtol=0, atol=1e-5)
    u = np.linalg.svd(x)[0][:, 0]
    np.testing.assert_allclose(np.linalg.norm(basis.T @ u), 1, rtol=0, atol=1e-5)


def test_sampling_draws_vectors_by_their_singular_values():
    x, draws = matrix(5, spectrum=np.array([4.0, 3.0, 2.0, 1.0, 0, 0])), 2000
    projector = optlab.svd_projector(sample=True)
    u = np.linalg.svd(x)[0]

    def chosen(rank):
        keys = jax.random.split(KEY, draws)
        old = projector.init((), 6, rank, x.dtype)
        one = lambda key: projector.find(x, old, rank, key, jnp.asarray(True))  # noqa: E731
        return np.abs(np.einsum("kar,ab->krb", jax.jit(jax.vmap(one))(keys), u)).argmax(-1)

    share = np.bincount(chosen(1)[:, 0], minlength=6) / draws
    want = np.array([0.4, 0.3, 0.2, 0.1, 0, 0])
    assert np.all(np.abs(share - want) <= 4 * np.sqrt(want * (1 - want) / draws))
    both = chosen(2)
    # In the order of their values; of two, both first ones with 0.4 3/6 + 0.3 4/7.
    assert np.all(both[:, 0] < both[:, 1])
    pair = np.mean(np.all(both == [0, 1], axis=1))
    assert abs(pair - (0.2 + 0.3 * 4 / 7)) < 4 * 0.5 / np.sqrt(draws)


def seen(projector, every, count, rank=2, **given):
    """Return the bases of two leaves of one shape, step after step, and the last state."""
    tx = optlab.in_low_rank(optax.identity(), projector, rank=rank, every=every, **given)
    params = {"a/kernel": matrix(6), "b/kernel": matrix(7)}
    state, update, out = tx.init(params), jax.jit(tx.update), []
    for t in range(count):
        _, state = update({"a/kernel": matrix(10 + t), "b/kernel": matrix(20 + t)}, state)
        out.append(np.asarray(projector.basis(state.kept[0].basis, 6, rank)))
    return out, state


@pytest.mark.parametrize("orthonormal", [False, True])
def test_a_random_basis_stays_between_refreshes_and_differs_from_all_others(orthonormal):
    projector = optlab.random_projector(orthonormal=orthonormal)
    bases, state = seen(projector, 2, 4)
    np.testing.assert_array_equal(bases[0], bases[1])
    np.testing.assert_array_equal(bases[2], bases[3])
    other, _ = seen(projector, 2, 1, seed=1)
    different = [*bases[0], *bases[2], *other[0]]
    for i, x in enumerate(different):
        assert all(np.max(np.abs(x - y)) > 0.1 for y in different[:i])
    kept = 2 * 6 * 2 * 4 if orthonormal else 2 * 8
    assert state.kept[0].basis.nbytes == kept
    if orthonormal:
        np.testing.assert_allclose(bases[0][0].T @ bases[0][0], np.eye(2), rtol=0, atol=1e-6)


def test_a_random_matrix_keeps_lengths_in_the_mean():
    projector, x = optlab.random_projector(), np.ones((50, 1), "f4")
    stored = jax.random.bits(KEY, (400, 2), jnp.uint32)
    low = projector.down(stored, jnp.broadcast_to(x, (400, 50, 1)), 8)
    ratio = np.sum(np.asarray(low) ** 2, axis=(1, 2)) / 50
    # A chi square of 8 degrees over 8: variance 2/8.
    assert abs(ratio.mean() - 1) < 4 * np.sqrt(2 / 8 / 400)
    assert 0.15 < ratio.var() < 0.35


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("side", ["rows", "cols"])
def test_coordinates_are_some_slices_and_the_residual_is_exactly_the_others(largest, side):
    tx = optlab.in_low_rank(
        optax.scale(3.0),
        optlab.coordinate_projector(largest=largest),
        rank=2,
        side=side,
        residual=optlab.sign_residual(0.5),
    )
    g = matrix(8)
    grads = {"kernel": jnp.asarray(g)}
    updates, state = tx.update(grads, tx.init(grads))
    axis = 0 if side == "rows" else 1
    chosen = np.asarray(state.kept[0].basis[0])
    assert state.kept[0].basis.dtype == jnp.int32
    assert len(set(chosen)) == 2
    inside = np.zeros(g.shape, bool)
    inside[(chosen,) if axis == 0 else (slice(None), chosen)] = True
    np.testing.assert_array_equal(updates["kernel"], np.where(inside, 3 * g, 0.5 * np.sign(g)))
    if largest:
        norms = np.linalg.norm(g, axis=1 - axis)
        assert set(chosen) == set(np.argsort(norms)[-2:])


@pytest.mark.parametrize("by", ["vector", "entry"])
@pytest.mark.parametrize(("bits", "block"), [(4, 8), (4, 256), (8, 8), (8, 10)])
def test_a_quantized_basis_is_off_by_half_a_step_at_most(bits, block, by):
    plain, x = optlab.svd_projector(), matrix(9)
    exact, _ = find(plain, x, 3)
    basis, stored = find(optlab.quantized(plain, bits, block=block, by=by), x, 3)
    flat = np.ravel(exact.T if by == "vector" else exact)
    rows = np.pad(flat, (0, -flat.size % block)).reshape(-1, block)
    step = (np.maximum(rows.max(1), 0) - np.minimum(rows.min(1), 0)) / (2**bits - 1)
    off = np.ravel((basis - exact).T if by == "vector" else basis - exact)
    off = np.pad(off, (0, -off.size % block)).reshape(-1, block)
    assert np.all(np.abs(off) <= 0.5001 * step[:, None])
    assert np.max(np.abs(off)) > 0.1 * step.max()
    assert stored.codes.nbytes == rows.size * bits // 8
    assert stored.scale.nbytes + stored.zero.nbytes == 8 * len(rows)
    if by == "vector":
        np.testing.assert_allclose(
            basis, reference.rounded(exact.astype("f8"), bits, block), rtol=0, atol=1e-6
        )


def test_a_quantized_basis_of_a_real_layer_takes_half_a_byte_per_number():
    projector = optlab.quantized(optlab.power_projector())
    tx = optlab.in_low_rank(optax.identity(), projector, rank=128)
    params = {"kernel": jax.ShapeDtypeStruct((1024, 4096), jnp.bfloat16)}
    kept = jax.eval_shape(tx.init, params).kept[0].basis
    assert kept.codes.size * kept.codes.dtype.itemsize == 1024 * 128 // 2
    assert kept.scale.size == 1024 * 128 // 256


@pytest.mark.parametrize("value", [-0.25, 0.0, 0.25])
def test_a_block_of_one_value_keeps_it(value):
    rows = jnp.full((1, 8), value, jnp.float32)
    np.testing.assert_allclose(blocks.decode(blocks.encode(rows, 4), 4), value, rtol=0, atol=1e-6)


def test_a_basis_is_kept_in_the_dtype_of_its_leaf_or_of_its_projector():
    params = {"kernel": jnp.asarray(matrix(0), jnp.bfloat16)}
    for dtype in (None, jnp.float32):
        projector = optlab.svd_projector(dtype=dtype)
        tx = optlab.in_low_rank(optax.scale_by_adam(), projector, rank=2)
        state = tx.init(params)
        updates, after = tx.update(params, state, params)
        assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, after)
        assert after.kept[0].basis.dtype == (dtype or jnp.bfloat16)
        assert updates["kernel"].dtype == jnp.bfloat16


LIMIT = {"a": (3,), "b": (2, 2)}


def test_a_norm_grows_by_at_most_the_factor_per_step_and_recovers_after_zero():
    sizes = [1.0, 9.0, 0.5, 9.0, 0.0, 9.0, np.nan, np.inf, 9.0]
    grads = [{k: np.full(s, x, "f4") for k, s in LIMIT.items()} for x in sizes]
    out = steps(optlab.norm_growth_limiter(1.5), grads, grads[0])
    want = [1.0, 1.5, 0.5, 0.75, 0.0, 1.125, None, None, 1.6875]
    for updates, value in zip(out, want, strict=True):
        for name, shape in LIMIT.items():
            if value is not None:
                np.testing.assert_allclose(updates[name], np.full(shape, value), rtol=1e-6)


def test_a_stack_has_one_norm_per_matrix_under_a_layout():
    tx = optlab.norm_growth_limiter(1.1, layout=optlab.layout.stacked("^layers"))
    rng = np.random.default_rng(0)
    scale = np.array([1.0, 5.0, 0.1])[:, None, None]
    stacks = [(rng.normal(size=(3, 4, 2)) * scale**t).astype("f4") for t in range(4)]
    together = steps(tx, [{"layers/kernel": x} for x in stacks], {"layers/kernel": stacks[0]})
    alone = [dict(enumerate(x)) for x in stacks]
    apart = steps(optlab.norm_growth_limiter(1.1), alone, alone[0])
    for got, want in zip(together, apart, strict=True):
        np.testing.assert_allclose(got["layers/kernel"], np.stack(list(want.values())), rtol=1e-6)
