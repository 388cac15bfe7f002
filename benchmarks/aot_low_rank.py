"""The low-rank family compiled for one described device, and for eight with sharded leaves.

Import this only after `ENVIRONMENT[target]` of `benchmarks.aot` is in `os.environ`.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optlab
from benchmarks import described, hlo, methods, trees

MiB = 2**20
TOPOLOGIES = {"tpu": "v5e:2x4", "gpu": "1x1x8"}
AXES = {"fsdp": 8}
MESHES = {"fsdp 8": AxisType.Explicit, "fsdp 8 Auto": AxisType.Auto}
ONE = "one device"
RANK = 128  # of matrices whose short side is 1024; an eighth of others
TITLE = "The low-rank family compiled for {}s ahead of time"
DEVICES = {
    "tpu": "Described: v5e:2x2, one chip; v5e:2x4",
    "gpu": "Described H200: one; eight",
}
NOTES = dict.fromkeys(
    TOPOLOGIES,
    "float32, params and state donated. Projectors are the recipes' own, which refresh by power "
    "iteration; rank 128 for matrices of width 1024, 32 of width 256; FRUGAL's is a quarter of the "
    "side, Conda's all of it. GPTs of 34 leaves of width 1024, and of 10 of width 256. On meshes "
    "every leaf is sharded on its first axis. `temp %` is in relation to one device's share of the "
    "parameters. `whole %` is the largest array that a collective leaves on every device, in "
    "relation to the matrix that it can be part of: 100 is a gathered matrix, 12.5 a panel of an "
    "eighth; stacks of bases, which the state keeps on every device, do not count. Conda's "
    "coordinates are as large as the matrix. A loop whose length the program does not know counts "
    "once: `MiB` are those of a step that refreshes one side of every shape. "
    "`optax.contrib.galore` did not compile for a TPU in 8 minutes, so it stands beside the others "
    "on a GPU only.",
)
TREES = ("gpt34", "gpt10")


def rows(target: str, *, peers: bool, small: bool) -> Iterator[dict[str, Any]]:
    """Yield a row per recipe, tree and placement."""
    for tree_name in TREES[small:]:
        if peers and target == "gpu":
            tx = optax.contrib.galore(methods.RATE, rank=_rank(tree_name))
            yield _row("optax.contrib.galore", tree_name, ONE, tx, _params(target, tree_name, ONE))
        for name in methods.LOW_RANK:
            for where in (ONE, *MESHES):
                params = _params(target, tree_name, where)
                known = optlab.shardings_of(params) if where.endswith("Auto") else None
                tx = methods.low_rank(name, _rank(tree_name), known)
                yield _row(name, tree_name, where, tx, params)


def _rank(tree_name: str) -> int:
    return RANK * getattr(trees, tree_name)()["norm"]["scale"][0] // 1024


def _params(target: str, tree_name: str, where: str) -> Any:
    tree = getattr(trees, tree_name)()
    if where == ONE:
        return trees.shapes(tree, described.sharding(target))
    mesh = described.mesh(target, TOPOLOGIES[target], AXES, MESHES[where])

    def place(x: Any) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec("fsdp", *(None,) * (len(x.shape) - 1)))
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=sharding)

    return jax.tree.map(place, trees.shapes(tree))


def _row(name: str, tree_name: str, where: str, tx: Any, params: Any) -> dict[str, Any]:
    done = described.compile_job(described.sharded_job(tx, params))
    devices = 1 if where == ONE else math.prod(AXES.values())
    return {
        "method": name,
        "tree": tree_name,
        "on": where,
        "kernels": hlo.kernels(done.text),
        "collectives": hlo.named(hlo.collective_counts(done.text)),
        "MiB": round(hlo.collective_bytes(done.text).total() / MiB, 4),
        "whole %": round(100 * _largest(done.text, tx, params), 1),
    } | done.costs(4 * trees.size(params) / devices)


def _largest(text: str, tx: Any, params: Any) -> float:
    """Return the largest share of a matrix that one collective leaves on every device.

    An array belongs to the smallest matrix whose long side is not shorter than its own. An
    all-to-all leaves no more than there was.
    """
    matrices = [leaf.shape for leaf in jax.tree.leaves(params) if len(leaf.shape) == 2]
    known = sorted((max(shape), math.prod(shape)) for shape in matrices)
    stacks = {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params))}
    stacks = {shape for shape in stacks if len(shape) > 2}
    shares = [0.0]
    for kind, shape in hlo.collective_arrays(text):
        if kind != "all-to-all" and shape not in stacks:
            side = max(shape, default=1)
            sizes = (size for longest, size in known if longest >= side)
            shares.append(math.prod(shape) / next(sizes, known[-1][1]))
    return max(shares)
