"""A checkpoint of an earlier version is brought to this one by the functions that are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_trees import assert_same, patterns
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_problem import mesh_of

from optlab import checkpoint


def rename(leaves, config):
    return {"new": leaves["old"], "key": leaves["key"]}, {"b1": config["beta"]}


def halve(leaves, config):
    return {**leaves, "new": leaves["new"].astype(jnp.bfloat16)}, config


@pytest.fixture
def old(tmp_path):
    """A checkpoint of version 1."""
    tree = {"old": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(5)}
    checkpoint.save(tmp_path, tree, step=1, config={"beta": 0.9})
    return tmp_path


NOW = {"new": jnp.zeros((2, 3), jnp.bfloat16), "key": jax.random.key(0)}


def test_migrations_run_one_after_the_other(old):
    got = checkpoint.restore(
        old, NOW, config={"b1": 0.9}, version=3, migrations={1: rename, 2: halve, 0: None}
    )
    want = {"new": jnp.arange(6.0).reshape(2, 3).astype(jnp.bfloat16), "key": jax.random.key(5)}
    assert_same(got, want)
    assert not got["new"].committed


def test_migrated_arrays_go_where_like_is(old):
    sharding = NamedSharding(mesh_of(AxisType.Auto), P("model"))
    like = {**NOW, "new": jax.device_put(NOW["new"], sharding)}
    got = checkpoint.restore(old, like, version=3, migrations={1: rename, 2: halve})
    assert got["new"].sharding.is_equivalent_to(sharding, 2)


def test_migrations_keep_what_jax_has_no_dtype_for(tmp_path):
    tree = {"a": np.linspace(0, 1, 5), "b": patterns("int4"), "c": patterns("float8_e5m2")}
    checkpoint.save(tmp_path, tree, step=1)
    same = {1: lambda leaves, config: (leaves, config)}
    assert_same(checkpoint.restore(tmp_path, tree, version=2, migrations=same), tree)


BAD_MIGRATIONS = {
    "none": ({"version": 3}, r"version .* asked for, 3, got 1. .* for each of \[1, 2\]"),
    "a gap": ({"version": 3, "migrations": {1: rename}}, r"for each of \[2\]"),
    "backwards": ({"version": 0}, r"asked for, 0, got 1. Pass version=1\.$"),
    "too few": (
        {"version": 2, "migrations": {1: rename}},
        r"(?s)got 1 differences.*new: float32\[2, 3\] in the checkpoint, bfloat16\[2, 3\] here",
    ),
    "config": (
        {"version": 3, "migrations": {1: rename, 2: halve}, "config": {"beta": 0.9}},
        r"(?s)config.b1: 0.9 in the checkpoint, nothing here.*config.beta: nothing in",
    ),
}


@pytest.mark.parametrize("kind", BAD_MIGRATIONS)
def test_a_migration_that_does_not_arrive_is_refused(kind, old):
    arguments, says = BAD_MIGRATIONS[kind]
    with pytest.raises(checkpoint.CheckpointError, match=says):
        checkpoint.restore(old, NOW, **arguments)
