"""Shardings of parameters and of state, and what does not fit is refused by name."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharded
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from sharded import AUTO, EXPLICIT

import optlab

GRID, BOTH = {"x": 4, "y": 2}, P("x", "y")
each_kind = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)

STATEFUL = {
    "chain": lambda: optax.chain(optax.trace(0.9), optlab.orthogonalize()),
    "mask": lambda: optax.masked(optlab.lion(0.1), {"a/kernel": True, "b/kernel": False}),
    "MultiSteps": lambda: optax.MultiSteps(optlab.lion(0.1), 2),
    "partition": lambda: optax.partition(
        {"a": optlab.lion(0.1), "b": optax.adam(0.1)}, {"a/kernel": "a", "b/kernel": "b"}
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optlab.lion)(0.1),
}
SAME_SHAPES = (("a/kernel", (16, 32), BOTH), ("b/kernel", (16, 32), P(None, "y")))


@each_kind
@pytest.mark.parametrize("name", STATEFUL)
def test_state_lies_where_its_parameter_lies_and_all_else_everywhere(name, kind):
    tree = sharded.place(SAME_SHAPES, sharded.mesh_of(GRID, kind))
    tx = STATEFUL[name]()
    wanted = optlab.state_sharding(tx, tree)
    state = jax.jit(tx.init, out_shardings=wanted)(tree)
    found = collections.Counter()
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        (owner,) = [p for p in tree if leaf.shape == (16, 32) and p in str(path)] or [None]
        found[owner] += 1
        if owner is None:
            assert leaf.sharding.is_fully_replicated, path
        else:
            assert leaf.sharding.is_equivalent_to(tree[owner].sharding, leaf.ndim), path
    assert found["a/kernel"] > 0
    assert (found["b/kernel"] > 0) == (name != "mask")


def test_shardings_are_read_off_arrays_shapes_and_models():
    mesh = sharded.mesh_of(GRID, AUTO)
    where, one = NamedSharding(mesh, BOTH), SingleDeviceSharding(jax.devices()[0])
    tree = {
        "blocks": [{"kernel": jax.device_put(np.ones((4, 4)), where)}, None],
        "shape": jax.ShapeDtypeStruct((4, 4), "float32", sharding=where),
        "bare": jax.ShapeDtypeStruct((4, 4), "float32"),
        "host": np.ones(3),
    }
    assert optlab.shardings_of(tree) == {
        "blocks": [{"kernel": where}, None], "shape": where, "bare": one, "host": one
    }  # fmt: skip
    state = nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Param)
    state = jax.tree.map(
        lambda x: jax.device_put(x, where if x.ndim == 2 else NamedSharding(mesh, P())), state
    )
    shardings = optlab.shardings_of(state)
    for params in (state, nnx.to_pure_dict(state)):
        (planned,) = optlab.plan(params, shardings).groups
        assert planned.group.sides == (8, 4, ("x",), ("y",))


def test_shardings_of_what_is_traced_are_in_its_type_or_nowhere():
    for kind in (EXPLICIT, AUTO):
        tree = sharded.place(SAME_SHAPES, sharded.mesh_of(GRID, kind))
        seen = {}
        trace = lambda tree, seen=seen: seen.update(optlab.shardings_of(tree))  # noqa: E731
        if kind == EXPLICIT:
            jax.eval_shape(trace, tree)
            assert [s.spec for s in seen.values()] == [BOTH, P(None, "y")]
            assert optlab.plan(tree, seen).collectives == optlab.plan(tree).collectives
        else:
            with pytest.raises(ValueError, match=r"^shardings_of: leaf 'a/kernel' is traced, and "):
                jax.eval_shape(trace, tree)


GRID_SHARDINGS = {"a/kernel": NamedSharding(AbstractMesh((4, 2), ("x", "y")), BOTH)}
REFUSED = {
    "a missing leaf": (
        {"b/kernel": (4, 2)}, {"shardings": GRID_SHARDINGS}, ValueError,
        r"shardings has no leaf 'b/kernel', it has \['a/kernel'\]\. Call optlab.shardings_of on",
    ),
    "parts that do not come out even": (
        {"a/kernel": (8, 3)}, {"shardings": GRID_SHARDINGS}, ValueError,
        r"shardings cut axis 1 of leaf 'a/kernel' of shape \(8, 3\) into 2 parts, which do not",
    ),
    "a spec of too many axes": (
        {"layers/kernel": (8, 4)},
        {"shardings": {"layers/kernel": GRID_SHARDINGS["a/kernel"].update(spec=P("x", None, "y"))}},
        ValueError,
        r"shardings have 3 axes for leaf 'layers/kernel' of shape \(8, 4\)\. Call optlab",
    ),
    "a spec in place of a sharding": (
        {"a/kernel": (8, 4)}, {"shardings": {"a/kernel": BOTH}}, TypeError,
        r"shardings must hold a jax.sharding.Sharding for every leaf, got P.* at 'a/kernel'\. W",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_shardings_that_do_not_fit_are_refused_by_leaf(name):
    shapes, given, error, message = REFUSED[name]
    tree = {key: jax.ShapeDtypeStruct(shape, "float32") for key, shape in shapes.items()}
    with pytest.raises(error, match=f"^plan: {message}"):
        optlab.plan(tree, **given)
    tree = {key: jnp.ones(shape) for key, shape in shapes.items()}
    with pytest.raises(error, match=f"^orthogonalize: {message}"):
        optlab.orthogonalize(**given).update(tree, ())


WRONG = {
    "scheme": ("alltoall", ValueError, "one of 'auto', .*'alltoall'. Did you mean 'all_to_all'"),
    "chunk_bytes": (0, ValueError, "a whole number >= 1, got 0"),
    "comm_dtype": ("int8", ValueError, "a floating dtype or None, got 'int8'"),
    "polar": ("keler", ValueError, "one of 'keller', .*got 'keler'. Build your own with"),
    "layout": ("flax", TypeError, "a function or None, got 'flax'"),
}


@pytest.mark.parametrize("argument", WRONG)
def test_a_wrong_argument_is_refused_at_construction(argument):
    value, error, message = WRONG[argument]
    with pytest.raises(error, match=f"^orthogonalize: {argument} must be {message}"):
        optlab.orthogonalize(**{argument: value})
    with pytest.raises(error, match=f"^plan: {argument} must be {message}"):
        optlab.plan({}, **{argument: value})
