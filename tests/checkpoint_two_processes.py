"""One of the processes that `test_checkpoint_processes.py` starts: they save and restore together.

Usage: python checkpoint_two_processes.py ADDRESS PROCESS OUT
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_problem import mesh_of

from optlab import checkpoint

PROCESSES, DEVICES = 2, 4
SPECS = {"kernel": P("data", "model"), "bias": P(("data", "fsdp")), "count": P(), "key": P()}


def on_host():
    """The tree as every process computes it."""
    return {
        "kernel": np.arange(64.0, dtype=np.float32).reshape(8, 8),
        "bias": np.arange(8).astype(jnp.bfloat16),
        "count": np.full((), 3, np.int32),
        "key": np.array([7, 9], np.uint32),
    }


def placed(shape):
    """The tree on a mesh of all devices, through both processes where there are two."""
    mesh = mesh_of(AxisType.Auto, shape)
    arrays = {
        name: jax.make_array_from_callback(x.shape, NamedSharding(mesh, SPECS[name]), x.__getitem__)
        for name, x in on_host().items()
    }
    replicated = NamedSharding(mesh, P())
    wrap = jax.jit(jax.random.wrap_key_data, out_shardings=replicated)
    return arrays | {"key": wrap(arrays["key"])}


def refusal(act):
    """Return what an action is refused with."""
    try:
        act()
    except checkpoint.CheckpointError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def main(address, process, out):
    """Save on one mesh, restore on another, and look at what is refused."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, PROCESSES, process, initialization_timeout=60)
    assert (jax.device_count(), jax.local_device_count()) == (PROCESSES * DEVICES, DEVICES)
    root, tree = out / "run", placed((2, 2, 2))
    assert not tree["kernel"].is_fully_addressable
    for step in (1, 2, 3):
        checkpoint.save(root, tree, step=step, config={"lr": 0.1}, keep=2)
    like = placed((4, 1, 2))
    got = checkpoint.restore(root, like, config={"lr": 0.1})
    for name, x in got.items():
        assert x.sharding.is_equivalent_to(like[name].sharding, x.ndim), name
        want = like[name]
        if name == "key":
            x, want = (jax.random.key_data(leaf) for leaf in (x, want))
        for a, b in zip(x.addressable_shards, want.addressable_shards, strict=True):
            assert (a.data == b.data).all(), name
    # Both are told, and none waits for the other for ever.
    says = refusal(lambda: checkpoint.save(root, tree, step=2))
    assert ("got an error in process 0", "above the last one saved, 3")[process == 0] in says
    local = {"count": jnp.int32(1)}
    says = refusal(lambda: checkpoint.save(root, local, step=4))
    assert "leaf 'count' must be an array that can be stored, got one that only this" in says
    same = {1: lambda leaves, config: (leaves, config)}
    says = refusal(lambda: checkpoint.restore(root, like, version=2, migrations=same))
    assert "migrations need one process, got 2" in says
    (out / f"done_{process}").touch()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))
