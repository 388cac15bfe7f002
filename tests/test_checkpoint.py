"""Checkpoints: what goes in comes out bit for bit, where `like` says, or is refused by name."""

import json
import sys
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_trees import assert_same, patterns, raw
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_problem import mesh_of

import optlab
from optlab import checkpoint

STORED = (
    "bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "int4", "int2",
    "float32", "float16", "bfloat16", "complex64", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e3m4", "float8_e8m0fnu",
    "float4_e2m1fn",
)  # fmt: skip
NOT_STORED = ("uint4", "uint2", "float8_e4m3")


def trip(path, tree, like=None):
    checkpoint.save(path, tree, step=1)
    return checkpoint.restore(path, tree if like is None else like)


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    tree = {name: patterns(name) for name in STORED}
    tree["host"] = np.linspace(0.0, 1.0, 7)
    assert tree["host"].dtype == np.float64, "more than jax holds"
    assert_same(trip(tmp_path, tree), tree)


@pytest.mark.parametrize("dtype", NOT_STORED)
def test_a_dtype_that_orbax_cannot_store_is_refused_by_name(dtype, tmp_path):
    with pytest.raises(
        checkpoint.CheckpointError, match=f"leaf 'a/b' .* dtype {dtype}. Save array.astype"
    ):
        checkpoint.save(tmp_path, {"a": {"b": jnp.zeros(3, dtype)}}, step=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_keys_come_back_as_keys(impl, tmp_path):
    key = jax.random.key(3, impl=impl)
    tree = {"one": key, "many": jax.random.split(key, 4)}
    got = trip(tmp_path, tree, jax.eval_shape(lambda: tree))
    assert_same(got, tree)
    assert jax.random.key_impl(got["one"]) == jax.random.key_impl(key)


class Pair(NamedTuple):
    left: object
    right: object


TREES = {
    "nothing": {},
    "no arrays": (None, optax.MaskedNode(), optax.EmptyState(), [], {"a": ()}),
    "no elements": {"a": jnp.zeros((0, 3), jnp.bfloat16), "b": np.zeros((2, 0), np.int64)},
    "some elements": [jnp.zeros((0,)), jnp.arange(3)],
    "holes": {"a": None, "b": jnp.ones(2), "c": optax.MaskedNode(), "d": {"e": None}},
    "named tuples": Pair(Pair(jnp.ones(2), ()), [jnp.zeros(3)]),
    "a leaf alone": jnp.float32(3),
}


@pytest.mark.parametrize("name", TREES)
def test_every_structure_comes_back(name, tmp_path):
    assert_same(trip(tmp_path, TREES[name]), TREES[name])


class Net(nnx.Module):
    """A layer, dropout with its keys, and the statistics of a norm."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def test_flax_nnx_model_and_optimizer_come_back(tmp_path):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optlab.muon(0.1), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    state = nnx.state((model, optimizer))
    got = trip(tmp_path, state, nnx.state((Net(nnx.Rngs(1)), optimizer)))
    assert_same(got, state)
    other = Net(nnx.Rngs(1))
    nnx.update((other, optimizer), got)
    np.testing.assert_array_equal(other.dense.kernel, model.dense.kernel)


def test_flax_linen_params_with_metadata_come_back(tmp_path):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    layer = nn.Dense(4, kernel_init=init)
    variables = layer.init(jax.random.key(0), jnp.ones((1, 3)))
    like = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 3)))
    got = trip(tmp_path, variables, like)
    assert_same(got, variables)
    assert got["params"]["kernel"].names == ("in", "out")
    described = {leaf.path for leaf in checkpoint.read(tmp_path).leaves}
    assert described == {"params/kernel", "params/bias"}


UNSAVABLE = {
    "a number": ({"a": {"lr": 0.1}}, "leaf 'a/lr' must be an array, got a float"),
    "a name": ({"a": "adam"}, "leaf 'a' must be an array, got a str"),
    "a scalar of numpy": ([np.float32(1)], "leaf '0' must be an array, got a float32"),
    "objects": ({"a": np.array([None])}, "leaf 'a' .* dtype object"),
    "strings": ({"a": np.array(["x"])}, "leaf 'a' .* dtype <U1"),
    "shapes": ({"a": jax.ShapeDtypeStruct((3,), "f4")}, "leaf 'a' .* has no values"),
    "no keys": ({"a": jax.random.split(jax.random.key(0), 2)[:0]}, "leaf 'a' .* no keys"),
    "one path twice": ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, "got 'a/b' twice"),
}


@pytest.mark.parametrize("kind", UNSAVABLE)
def test_what_would_not_come_back_is_refused(kind, tmp_path):
    tree, says = UNSAVABLE[kind]
    with pytest.raises(checkpoint.CheckpointError, match=says):
        checkpoint.save(tmp_path, tree, step=1)
    assert not list(tmp_path.iterdir())


def test_what_has_no_values_any_more_or_yet_is_refused(tmp_path):
    donated = jnp.ones(3)
    donated.delete()
    with pytest.raises(
        checkpoint.CheckpointError, match=r"leaf 'a' .* was donated. Save what the step"
    ):
        checkpoint.save(tmp_path, {"a": donated}, step=1)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"leaf 'a' .* has no values. .* outside of jax.jit"
    ):
        jax.jit(lambda x: checkpoint.save(tmp_path, {"a": x}, step=1))(jnp.ones(3))


BAD_ARGUMENTS = {
    "step": ({"step": -1}, "step must be an integer >= 0, got -1"),
    "float step": ({"step": 1.0}, r"step must be an integer >= 0, got 1.0. Pass step=int"),
    "keep": ({"step": 1, "keep": 0}, "keep must be an integer >= 1, got 0"),
    "function": ({"step": 1, "config": {"lr": len}}, "config must be what JSON can hold"),
    "array": ({"step": 1, "values": [jnp.ones(1)]}, "values must be what JSON can hold"),
    "nan": ({"step": 1, "config": {"lr": float("nan")}}, "config must be .* nan as None"),
}


@pytest.mark.parametrize("kind", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_anything_is_written(kind, tmp_path):
    arguments, says = BAD_ARGUMENTS[kind]
    with pytest.raises(checkpoint.CheckpointError, match=says):
        checkpoint.save(tmp_path, {"a": jnp.ones(1)}, **arguments)
    assert not list(tmp_path.iterdir())


def test_an_object_store_is_refused():
    with pytest.raises(checkpoint.CheckpointError, match="got 'gs://bucket/run'"):
        checkpoint.save("gs://bucket/run", {}, step=1)


def test_config_and_values_are_what_was_given(tmp_path):
    config = {"method": "muon", "betas": (0.9, 0.99), "inner": {"lr": 1e-3}}
    checkpoint.save(tmp_path, {}, step=jnp.int32(7), config=config, values=[1, None, "ü"])
    found = checkpoint.read(tmp_path)
    assert found.config == {**config, "betas": [0.9, 0.99]}
    assert (found.step, found.version, found.values) == (7, 1, [1, None, "ü"])
    assert found.packages["optlab"] == optlab.__version__
    checkpoint.restore(tmp_path, {}, config=config)
    checkpoint.restore(tmp_path, {})  # nothing to compare with


def value_of(step):
    return {"a": jnp.full(3, step, jnp.int32)}


def test_the_last_step_is_restored_unless_another_is_asked_for(tmp_path):
    assert checkpoint.steps(tmp_path / "nothing") == []
    for step in (2, 10, 300):
        path = checkpoint.save(tmp_path, value_of(step), step=step)
        assert path == tmp_path / str(step)
    assert checkpoint.steps(tmp_path) == [2, 10, 300]
    assert_same(checkpoint.restore(tmp_path, value_of(0)), value_of(300))
    assert_same(checkpoint.restore(tmp_path, value_of(0), step=10), value_of(10))
    with pytest.raises(
        checkpoint.CheckpointError, match=r"step 3 is not in .*, got steps \[2, 10, 300\]"
    ):
        checkpoint.restore(tmp_path, value_of(0), step=3)


def test_only_the_last_steps_are_kept(tmp_path):
    foreign = tmp_path / "1"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("not sealed: not ours to delete")
    for step in range(2, 7):
        checkpoint.save(tmp_path, value_of(step), step=step, keep=2)
    assert checkpoint.steps(tmp_path) == [1, 5, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "5", "6"]


def test_an_earlier_step_is_refused_and_the_last_is_replaced_if_asked(tmp_path):
    checkpoint.save(tmp_path, value_of(4), step=4)
    checkpoint.save(tmp_path, value_of(5), step=5)
    for step, overwrite in ((5, False), (4, True), (3, False)):
        with pytest.raises(
            checkpoint.CheckpointError, match=f"above the last one saved, 5, got {step}"
        ):
            checkpoint.save(tmp_path, value_of(9), step=step, overwrite=overwrite)
    checkpoint.save(tmp_path, value_of(9), step=5, overwrite=True)
    assert checkpoint.steps(tmp_path) == [4, 5]
    assert_same(checkpoint.restore(tmp_path, value_of(0)), value_of(9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]


def test_a_step_that_was_moved_aside_when_the_process_died_is_still_there(tmp_path):
    checkpoint.save(tmp_path, value_of(5), step=5).rename(tmp_path / "5.before")
    assert checkpoint.steps(tmp_path) == [5]
    assert_same(checkpoint.restore(tmp_path, value_of(0)), value_of(5))
    checkpoint.save(tmp_path, value_of(6), step=6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "6"]
    (tmp_path / "5").rename(tmp_path / "6.before")
    assert_same(checkpoint.restore(tmp_path, value_of(0)), value_of(6))
    checkpoint.save(tmp_path, value_of(7), step=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "7"]


# Eight devices, four, one: what is saved on one mesh is restored on another.
SPECS = {"rows": P("fsdp", "model"), "both": P(("data", "fsdp")), "keys": P("model"), "all": P()}


def sharded(shape, kind=AxisType.Auto):
    mesh = mesh_of(kind, shape)
    tree = {
        "rows": jnp.arange(32.0).reshape(4, 8).astype(jnp.bfloat16),
        "both": jnp.arange(16, dtype=jnp.int8).astype(jnp.int4),
        "keys": jax.random.split(jax.random.key(1), 4),
        "all": jnp.float32(2),
    }
    return {key: jax.device_put(x, NamedSharding(mesh, SPECS[key])) for key, x in tree.items()}


@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "shapes"])
def test_each_array_gets_the_sharding_of_its_like(abstract, tmp_path):
    whole = sharded((2, 2, 2))
    checkpoint.save(tmp_path, whole, step=1)
    on_host = jax.tree.map(raw, whole)
    for shape, kind in (((1, 2, 2), AxisType.Explicit), ((1, 1, 1), AxisType.Auto)):
        like = sharded(shape, kind)
        wanted = jax.tree.map(lambda x: x.sharding, like)
        if abstract:
            like = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
            )
        got = checkpoint.restore(tmp_path, like)
        assert jax.tree.map(raw, got) == on_host
        for key, sharding in wanted.items():
            assert got[key].sharding.is_equivalent_to(sharding, got[key].ndim)
    assert "'fsdp', 'model'" in checkpoint.read(tmp_path).leaves[-1].sharding


def test_what_jax_may_move_may_be_moved_after_a_restore(tmp_path):
    mesh = mesh_of(AxisType.Auto)
    fresh = {"count": jnp.int32(3), "key": jax.random.key(0)}
    assert not fresh["count"].committed
    on_mesh = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("model")))
    for like in (fresh, jax.eval_shape(lambda: fresh)):
        got = trip(tmp_path / str(id(like)), fresh, like)
        assert not got["count"].committed
        # A count that is tied to one device could not meet an array on eight.
        moved = jax.jit(lambda x, s: x * s["count"] + jax.random.uniform(s["key"]))(on_mesh, got)
        assert moved.sharding.num_devices == 8


def test_the_manifest_can_be_read_without_this_library(tmp_path):
    checkpoint.save(tmp_path, {"a": jnp.ones((2, 3))}, step=1)
    record = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert record["format"] == 1
    assert record["leaves"] == [["a", "float32", [2, 3], "SingleDeviceSharding"]]
    assert set(record["packages"]) == {"optlab", "jax", "optax", "orbax-checkpoint"}
    assert len(record["config_sha256"]) == 64


def test_without_orbax_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'optlab\[checkpoint\]'"):
        checkpoint.save(tmp_path, {}, step=1)
