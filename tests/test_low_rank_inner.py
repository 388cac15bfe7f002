"""`in_low_rank` around every primitive of the catalogue, and on leaves of every kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalog import LINKS
from sharded import QUICK
from test_low_rank import FirstColumns

import optlab
from optlab import layout
from optlab.testing import compare
from optlab.testing.case import random_like

RANK = 4


def ranks(tree, policy):
    """Return the rank of every matrix of a tree."""
    found = []

    def one(view, path, leaf):
        if view is not None:
            batch = view.batch(leaf.ndim)
            x = np.transpose(np.asarray(leaf, "f8"), (*batch, *view.rows, *view.cols))
            x = x.reshape(*x.shape[: len(batch)], *view.dims(leaf.shape))
            found.extend(np.ravel(np.linalg.matrix_rank(x, rtol=1e-5)))
        return leaf

    layout.map_with_view(one, tree, policy=policy)
    return found


@pytest.mark.parametrize("case", LINKS, ids=lambda case: case.name)
def test_every_primitive_runs_on_coordinates(case):
    policy = getattr(case.make, "keywords", {}).get("layout", layout.flax)
    projector = optlab.random_projector(orthonormal=True)  # compiled fastest
    tx = optlab.in_low_rank(case.make(), projector, rank=RANK, every=2, layout=policy)
    params, traces, bases = case.tree, 0, []

    def step(grads, state, params):
        nonlocal traces
        traces += 1
        return tx.update(grads, state, params)

    state, step = jax.jit(tx.init)(params), jax.jit(step, compiler_options=QUICK)
    for t in range(3):
        updates, new = step(case.grads(t), state, params)
        compare.same_types(updates, params, "updates")
        compare.same_types(new, state, "state")
        compare.finite((updates, new), "updates and state")
        assert max(ranks(updates, policy)) <= RANK
        state = new
        bases.append([np.asarray(kept.basis) for kept in state.kept])
    assert traces == 1
    for first, second, third in zip(*bases, strict=True):
        assert np.array_equal(first, second)
        assert not np.array_equal(second, third)


# Every leaf, and the matrices in it.
LEAVES = {
    "attn/out/kernel": ((2, 4, 6), lambda x: [x.reshape(8, 6)]),
    "attn/qkv/kernel": ((8, 3, 2, 3), lambda x: [x[:, i].reshape(8, 6) for i in range(3)]),
    "attn/query/kernel": ((6, 2, 4), lambda x: [x.reshape(6, 8)]),
    "conv/kernel": ((2, 2, 2, 6), lambda x: [x.reshape(8, 6)]),
    "layers/attn/key/kernel": ((2, 6, 2, 4), lambda x: [y.reshape(6, 8) for y in x]),
    "layers/up/kernel": ((3, 6, 8), list),
    "moe/experts/kernel": ((2, 6, 8), list),
}
POLICY = layout.rules({"experts": layout.stacked(".")}, default=layout.stacked("^layers/"))
SHAPES = {name: shape for name, (shape, _) in LEAVES.items()}
SVD = {"rank": 2, "every": 2, "projector": optlab.svd_projector()}
RECIPES = {
    "galore": functools.partial(optlab.galore, 0.1, eps=1e-3, **SVD),
    "conda": functools.partial(optlab.conda, 0.1, eps=1e-3, **SVD | {"rank": "full"}),
    "frugal": functools.partial(
        optlab.frugal, 0.1, every=2, projector=optlab.coordinate_projector(largest=True)
    ),
    "q_galore": functools.partial(optlab.q_galore, 0.1, block=8, **SVD),
    "fira": functools.partial(optlab.fira, 0.1, eps=1e-3, **SVD),
    "apollo": functools.partial(
        optlab.apollo, 0.1, rank=2, every=2, per="matrix", projector=FirstColumns()
    ),
    "ldadam": functools.partial(
        optlab.ldadam,
        0.1,
        rank=2,
        projector=optlab.power_projector(1, oversample=0, start="svd"),
    ),
}


def apart(tree):
    """Return every matrix as a leaf of its own."""
    return {
        f"{name}/{i}/dense/kernel": jnp.asarray(x)
        for name, (_, matrices) in LEAVES.items()
        for i, x in enumerate(matrices(np.asarray(tree[name])))
    }


def trained(tx, trees):
    """Return the parameters after three steps, the first tree being their start."""

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, step = trees[0], jax.jit(step, compiler_options=QUICK)
    state = jax.jit(tx.init)(params)
    for grads in trees[1:]:
        params, state = step(grads, state, params)
    return params


@pytest.mark.parametrize("name", RECIPES)
def test_matrices_in_one_leaf_are_trained_as_leaves_of_their_own(name):
    trees = [random_like(SHAPES, seed=t) for t in range(4)]
    together = apart(trained(RECIPES[name](layout=POLICY), trees))
    alone = trained(RECIPES[name](), [apart(tree) for tree in trees])
    assert together.keys() == alone.keys()
    for path, want in alone.items():
        np.testing.assert_allclose(together[path], want, rtol=0, atol=2e-5, err_msg=path)
