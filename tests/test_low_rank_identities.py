"""Identities of `in_low_rank`: shapes of coordinates, full rank, projected gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import low_rank as reference
from stepping import steps
from test_low_rank import GRADS, MATRICES, PARAMS, RANK, SHAPES

import optlab


def coordinates(**given):
    """Return the shapes of what inner sees, without running anything."""
    tx = optlab.in_low_rank(optax.trace(0.9), **given)
    state = jax.eval_shape(tx.init, {key: jnp.asarray(x, "f4") for key, x in PARAMS.items()})
    return [state.inner.trace[key].shape for key in MATRICES]


BY_TREE = {"bias": 1, "square/kernel": 2, "tall/kernel": None, "wide/kernel": "full"}


@pytest.mark.parametrize(
    ("given", "square", "tall", "wide"),
    [
        ({"rank": 2}, (2, 7), (9, 2), (2, 9)),
        ({"rank": 6}, (6, 7), (9, 6), (6, 9)),
        ({"rank": 0.5}, (4, 7), (9, 3), (3, 9)),  # halves to even
        ({"rank": 0.01}, (1, 7), (9, 1), (1, 9)),
        ({"rank": "full"}, (7, 7), (9, 6), (6, 9)),
        ({"rank": None}, (7, 7), (9, 6), (6, 9)),
        ({"rank": lambda path, leaf: len(path) % 3 + leaf.ndim}, (3, 7), (9, 4), (4, 9)),
        ({"rank": BY_TREE}, (2, 7), (9, 6), (6, 9)),
        ({"rank": 2, "side": "long"}, (7, 2), (2, 6), (6, 2)),
        ({"rank": 0.5, "side": "long"}, (7, 4), (4, 6), (6, 4)),
        ({"rank": 6, "side": "long"}, (7, 6), (9, 6), (6, 9)),
        ({"rank": 2, "side": "rows"}, (2, 7), (2, 6), (2, 9)),
        ({"rank": 2, "side": "cols"}, (7, 2), (9, 2), (6, 2)),
        ({"rank": 2, "side": "both"}, (2, 2), (2, 2), (2, 2)),
        ({"rank": 0.4, "side": "both"}, (3, 3), (4, 2), (2, 4)),
        ({"rank": 2, "side": lambda m, n: "rows" if m > n else "cols"}, (7, 2), (2, 6), (6, 2)),
    ],
)
def test_rank_and_side_say_what_shape_coordinates_have(given, square, tall, wide):
    assert coordinates(**given) == [square, tall, wide]


def test_a_rank_as_large_as_the_matrix_leaves_inner_as_it_is():
    inner = optlab.heavy_ball(0.9)
    params, grads = ({k: jnp.asarray(x, "f4") for k, x in t.items()} for t in (PARAMS, GRADS[0]))
    compiled = lambda tx: optax.GradientTransformation(tx.init, jax.jit(tx.update))  # noqa: E731
    alone = steps(compiled(inner), [grads, params], params)
    for rank, equal in ((6, {"bias", "tall/kernel", "wide/kernel"}), (7, set(SHAPES))):
        low = compiled(optlab.in_low_rank(inner, rank=rank, every=1))
        found = steps(low, [grads, params], params)
        for got, want in zip(found, alone, strict=True):
            same = {key for key in SHAPES if np.array_equal(got[key], want[key])}
            assert same == equal
    assert optlab.in_low_rank(inner, rank=7).init(params).kept == ()


@pytest.mark.parametrize("side", ["short", "long", "both"])
@pytest.mark.parametrize("name", MATRICES)
def test_descent_on_coordinates_is_the_gradient_projected(name, side):
    tx = optlab.in_low_rank(
        optax.identity(), optlab.svd_projector(), rank=2, side=side, scale=0.5, every=9
    )
    params = {name: jnp.asarray(PARAMS[name], "f4")}
    state = tx.init(params)
    (m, n), first = SHAPES[name], GRADS[0][name]
    u, _, vt = np.linalg.svd(first)
    left, right = u[:, :2] @ u[:, :2].T, vt[:2].T @ vt[:2]
    rows = side == "both" or (m <= n) == (side == "short")
    cols = side == "both" or not rows
    # The second gradient is projected on the subspace of the first.
    for g in (first, GRADS[1][name]):
        updates, state = tx.update({name: jnp.asarray(g, "f4")}, state)
        want = 0.5 * (left if rows else np.eye(m)) @ g @ (right if cols else np.eye(n))
        np.testing.assert_allclose(updates[name], want, rtol=0, atol=1e-5)


def test_updates_lie_in_the_subspace_whatever_inner_makes_of_coordinates():
    params, grads = ({k: jnp.asarray(x, "f4") for k, x in t.items()} for t in (PARAMS, GRADS[0]))
    tx = optlab.in_low_rank(optlab.apply_kappa(), rank=2)
    updates, state = tx.update(grads, tx.init(params), params)
    for (side, other), places in {(7, 7): {"square": 0}, (6, 9): {"tall": 0, "wide": 1}}.items():
        (kept,) = (k for k in state.kept if k.basis.shape[1] == side)
        for name, place in places.items():
            basis, u = kept.basis[place], updates[f"{name}/kernel"]
            u = u.T if name == "tall" else u
            assert u.shape == (side, other)
            assert np.linalg.matrix_rank(u, tol=1e-5) == 2
            np.testing.assert_allclose(basis @ (basis.T @ u), u, rtol=0, atol=1e-5)
            np.testing.assert_allclose(np.abs(basis.T @ u), 1, rtol=0, atol=1e-5)


def test_inner_sees_parameters_and_named_arguments_in_coordinates():
    key, svd = "wide/kernel", optlab.svd_projector()
    params, grads = ({key: jnp.asarray(t[key], "f4")} for t in (PARAMS, GRADS[0]))
    basis = reference.singular(2)(GRADS[0][key], 0)
    project = basis @ basis.T
    tx = optlab.in_low_rank(optax.add_decayed_weights(0.5), svd, rank=2)
    updates, _ = tx.update(grads, tx.init(params), params)
    want = project @ (GRADS[0][key] + 0.5 * PARAMS[key])
    np.testing.assert_allclose(updates[key], want, rtol=0, atol=1e-5)

    inner = optlab.scale_by_raw_gradient(0.75, eps=0.0)
    tx = optlab.in_low_rank(inner, svd, rank=2, project=("raw_gradient",))
    updates, _ = tx.update(grads, tx.init(params), params, raw_gradient=grads)
    # r/(|r|/2) = 2 sign(r)
    want = 2 * basis @ np.sign(basis.T @ GRADS[0][key])
    np.testing.assert_allclose(updates[key], want, rtol=0, atol=1e-5)


def test_one_subspace_of_the_long_side_is_optax_galore():
    ours = optlab.in_low_rank(
        optax.scale_by_adam(), optlab.svd_projector(), rank=RANK, side="long", scale=0.25, every=99
    )
    theirs = optax.contrib.scale_by_galore(
        RANK, update_proj_gap=99, scale=0.25, base_optimizer=optax.scale_by_adam()
    )
    grads = [{key: jnp.asarray(g[key], "f4") for key in ("tall/kernel",)} for g in GRADS[:4]]
    for got, want in zip(steps(ours, grads, grads[0]), steps(theirs, grads, grads[0]), strict=True):
        np.testing.assert_allclose(got["tall/kernel"], want["tall/kernel"], rtol=0, atol=1e-5)
