"""Compile a step for a TPU or a GPU that is only described: no such machine is needed.

Import this only after `ENVIRONMENT[target]` of `benchmarks.aot` is in `os.environ`: the compilers
read it while jax is imported.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optlab
from benchmarks import hlo, methods, trees

_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""
_DESCRIPTIONS: dict[str, dict[str, str]] = {
    "tpu": {"platform": "tpu", "topology_name": "v5e:2x2"},
    "gpu": {
        "platform": "cuda", "topology_name": "", "topology": "1x1x8", "target_config": _H200,
    },
}  # fmt: skip
# Copies into on-chip memory, ahead of use, count at both ends although what they read is not
# read again: without them the count is what the kernels themselves access.
_NO_PREFETCH = {"xla_vf_vmem_max_outstanding_prefetches": 0}


def sharding(target: str) -> NamedSharding:
    """Return the sharding of everything: whole, on the first device of the topology."""
    description = topologies.get_topology_desc(**_DESCRIPTIONS[target])
    return NamedSharding(Mesh(np.array(description.devices[:1]), ("x",)), PartitionSpec())


def mesh(target: str, topology: str, axes: dict[str, int], kind: AxisType) -> Mesh:
    """Return a mesh of all devices of a topology, as "v5e:2x4" for a TPU and "1x1x8" for GPUs."""
    name = "topology_name" if target == "tpu" else "topology"
    description = topologies.get_topology_desc(**_DESCRIPTIONS[target] | {name: topology})
    devices = np.array(description.devices).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(kind,) * len(axes))


class Job(NamedTuple):
    """A function to compile, its arguments as shapes, and which of them are donated."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = (0, 1)
    out_shardings: Any = None


def _placed(tree: Any, where: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def optimizer_step(tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
    """Return `step(params, state, grads) -> params, state`; no refresh of curvature is in it."""
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params, curvature=None)
        return optax.apply_updates(params, updates), state

    return step


def update_job(tx: optax.GradientTransformation, tree: Any, where: NamedSharding) -> Job:
    """Return one optimizer step on a tree of shapes."""
    params = trees.shapes(tree, where)
    state = _placed(jax.eval_shape(tx.init, params), where)
    return Job(optimizer_step(tx), (params, state, params))


def sharded_job(tx: optax.GradientTransformation, params: Any) -> Job:
    """Return one optimizer step on shapes that have shardings; the state gets the parameters'."""
    known = optlab.shardings_of(params)
    where = optlab.state_sharding(tx, params, known)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    state = jax.tree.map(place, jax.eval_shape(tx.init, params), where)
    return Job(optimizer_step(tx), (params, state, params), out_shardings=(known, where))


def race_job(name: str, where: NamedSharding) -> Job:
    """Return the train step of `optlab race` at its quick preset: ten steps of the scanned loop."""
    from optlab.lab import config as configs
    from optlab.lab import model, optimizers, train

    config = configs.Config(
        **configs.preset("quick"),
        preset="quick",
        workload="gpt",
        optimizers=(name,),
        learning_rates={name: methods.RATE},
        schedule="wsd",
        text=None,
        text_sha256="",
        seed=0,
    )
    structure, params = model.abstract(config)
    tx = optimizers.build(name, config)
    chunk = train.make_chunk(structure, tx, config, length=10)
    text = jax.ShapeDtypeStruct((1_000_000,), jnp.uint8)
    start = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = (params, jax.eval_shape(tx.init, params), text, start)
    return Job(chunk, _placed(arguments, where))


class Compiled(NamedTuple):
    """A program, what it was compiled from, and the seconds that took."""

    lowered: Any
    program: Any
    wall: float
    cpu: float  # of all threads: on a busy machine it says more

    @property
    def text(self) -> str:
        """The program as the compiler prints it."""
        return self.program.as_text()

    def costs(self, size: float) -> dict[str, Any]:
        """Return what every row ends with; temporary memory in percent of `size` bytes."""
        temp = self.program.memory_analysis().temp_size_in_bytes
        return {
            "temp %": round(100 * temp / size, 2),
            "instructions": hlo.instructions(self.text),
            "compile s": round(self.wall, 1),
            "cpu s": round(self.cpu, 1),
        }


def compile_job(job: Job) -> Compiled:
    """Compile a job, and take the time."""
    jitted = jax.jit(job.function, donate_argnums=job.donated, out_shardings=job.out_shardings)
    lowered = jitted.lower(*job.arguments)
    wall, cpu = time.perf_counter(), time.process_time()
    program = lowered.compile()
    return Compiled(lowered, program, time.perf_counter() - wall, time.process_time() - cpu)


def measure(target: str, job: Job, *, bytes_count: bool) -> dict[str, Any]:
    """Return the counts of one step on one device; bytes and temp in relation to the parameters.

    Without `bytes_count` no bytes accessed: on trees of many leaves they say little.
    """
    size = trees.size(job.arguments[0])
    done = compile_job(job)
    row: dict[str, Any] = {}
    if target == "tpu":
        plain = done.lowered.compile(compiler_options=_NO_PREFETCH) if bytes_count else None
        for head, program in {"bytes/param": done.program, "without prefetch": plain}.items():
            row[head] = round(_bytes(program) / size, 2) if bytes_count else None
    else:
        row["kernels"] = hlo.kernels(done.text)
    return row | {"collectives": hlo.collectives(done.text)} | done.costs(4 * size)


def _bytes(program: Any) -> float:
    return program.cost_analysis()["bytes accessed"]


def state_arrays(tx: optax.GradientTransformation, tree: Any) -> float:
    """Return the size of the state in parameters."""
    params = trees.shapes(tree)
    return round(trees.size(jax.eval_shape(tx.init, params)) / trees.size(params), 1)
