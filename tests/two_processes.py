"""One of the processes that `test_two_processes.py` starts, and what all of them compute.

Usage: python two_processes.py ADDRESS PROCESS OUT
"""

import sys
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from mesh_problem import mesh_of, recipe, shardings_on, train, trees

import optlab

PROCESSES, DEVICES, STEPS = 2, 4, 5
# 'fsdp' of 4 goes through both processes, 'model' of 2 stays in one.
SHAPE = (1, 4, 2)
LEAVES = {
    "down/kernel": ((16, 8), P(None, "fsdp")),
    "free/kernel": ((8, 16), P()),
    "layers/kernel": ((3, 8, 16), P(None, "fsdp", None)),
    "out/kernel": ((8, 16), P("fsdp", "model")),
    "up/bias": ((16,), P("fsdp")),
    "up/kernel": ((8, 16), P("fsdp", None)),
    "wide/kernel": ((8, 16), P(("fsdp", "model"), None)),
}
RECIPES = {"muon": AxisType.Auto, "normuon": AxisType.Explicit}


def trained(name: str) -> tuple[Any, Any]:
    """Return parameters and state after all steps of a recipe, sharded over all devices."""
    mesh = mesh_of(RECIPES[name], SHAPE)
    with jax.set_mesh(mesh):
        problem = trees(shardings_on(mesh, LEAVES), LEAVES)
        known = optlab.shardings_of(problem.params) if RECIPES[name] == AxisType.Auto else None
        return train(recipe(name, known), problem, STEPS).at[STEPS]


def main(address: str, process: int, out: str) -> None:
    """Join the others, train, and write whole arrays: one file for each recipe."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, PROCESSES, process, initialization_timeout=60)
    assert (jax.device_count(), jax.local_device_count()) == (PROCESSES * DEVICES, DEVICES)
    for name in RECIPES:
        params, state = trained(name)
        assert not params["up/kernel"].is_fully_addressable
        whole = multihost_utils.process_allgather((params, state), tiled=True)
        np.savez(f"{out}/{name}_{process}.npz", *jax.tree.leaves(whole))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
