"""Muon on meshes of chips that are only described, beside optax's and beside its plan.

Import this only after `ENVIRONMENT[target]` of `benchmarks.aot` is in `os.environ`.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optlab
from benchmarks import described, hlo, methods, trees
from optlab.distributed.plan import Plan

MiB = 2**20
LONG, SHORT = (1024, 4096), (256, 1024)
Axes = dict[str, int]
# Topology, its devices along one axis, and along two.
TOPOLOGIES: dict[str, dict[str, tuple[Axes, Axes]]] = {
    "tpu": {
        "v5e:2x4": ({"fsdp": 8}, {"data": 4, "model": 2}),
        "v5e:16x16": ({"fsdp": 256}, {"data": 16, "model": 16}),
    },
    "gpu": {"1x1x8": ({"fsdp": 8}, {"data": 4, "model": 2})},
}
# 400 of the smaller shape: as many leaves as make a long program.
LEAVES = {"8": (8, LONG), "64": (64, LONG), "400": (400, SHORT), "gpt34": None}
# On Auto meshes beside optax, which compiles these in half a minute.
PEERS = {"v5e:2x4": "8", "v5e:16x16": "64", "1x1x8": "8"}
TITLE = "Muon compiled for meshes of {}s ahead of time"
DEVICES = {target: f"Described: {', '.join(found)}" for target, found in TOPOLOGIES.items()}
_COMMON = (
    "`temp %` is in relation to one device's share of the parameters. Matrices of (1024, 4096), "
    "400 of (256, 1024), or all of a GPT of 34 leaves; sharded on the first side over one axis, "
    "on both over two. The meshes are Explicit, except where `Auto` is said. `as planned`: counts "
    "and bytes of every kind are the plan's; or the compiler combined calls; or it sent as many "
    "numbers, but in bfloat16."
)
NOTES = {
    "tpu": (
        "float32; `MiB` are given to one chip in collectives, `plan MiB` is what `optlab.plan` "
        "says for them. In products of default precision matrices are rounded to bfloat16, and "
        "where nothing else reads them the compiler rounds before they travel: a bucket then costs "
        "three quarters of its plan; with precision `highest` all of it. "
    )
    + _COMMON,
    "gpu": "float32; `MiB` are given to one device in collectives. " + _COMMON,
}


class Case(NamedTuple):
    """Leaves on a mesh."""

    topology: str
    axes: Axes
    leaves: str
    precision: str | None = None
    auto: bool = False


def cases(target: str) -> Iterator[Case]:
    """Yield every case of a target."""
    for topology, (line, grid) in TOPOLOGIES[target].items():
        yield from (Case(topology, axes, leaves) for axes in (line, grid) for leaves in LEAVES)
        yield Case(topology, line, PEERS[topology], auto=True)
        if math.prod(line.values()) == 8:
            yield Case(topology, line, "8", precision="highest")


def _spec(shape: tuple[int, ...], axes: Axes) -> Any:
    """Shard a matrix on its first side over one axis, on both over two; a vector on its own."""
    names = tuple(axes)
    return PartitionSpec(names if len(shape) == 1 else names[0], *names[1:][: len(shape) - 1])


def _params(target: str, case: Case) -> Any:
    kind = AxisType.Auto if case.auto else AxisType.Explicit
    mesh = described.mesh(target, case.topology, case.axes, kind)
    equal = LEAVES[case.leaves]
    if equal is None:
        tree = getattr(trees, case.leaves)()
    else:
        tree = {f"{i}": {"kernel": equal[1]} for i in range(equal[0])}

    def place(x: Any) -> Any:
        where = NamedSharding(mesh, _spec(x.shape, case.axes))
        return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=where)

    return jax.tree.map(place, trees.shapes(tree))


def _measure(tx: Any, params: Any, devices: int) -> tuple[str, dict[str, Any]]:
    """Compile a step; return its text and what it costs."""
    done = described.compile_job(described.sharded_job(tx, params))
    nbytes = hlo.collective_bytes(done.text).total()
    counts = {
        "collectives": hlo.named(hlo.collective_counts(done.text)),
        "MiB": round(nbytes / MiB, 4),
        "kernels": hlo.kernels(done.text),
    }
    return done.text, counts | done.costs(4 * trees.size(params) / devices)


def _verdict(text: str, plan: Plan) -> str:
    """Say whether a program does what was planned, or how the compiler made it cheaper."""
    counts, nbytes = hlo.collective_counts(text), hlo.collective_bytes(text)
    said = []
    if counts != plan.collectives:
        said.append("combined" if counts < plan.collectives else "other calls")
    if nbytes != plan.nbytes:
        same = hlo.collective_bytes(text, itemsize=4) == plan.nbytes
        said.append("narrower" if same else "other bytes")
    return ", ".join(said) or "equal"


def _ours(target: str, case: Case) -> dict[str, Any]:
    params = _params(target, case)
    shardings = optlab.shardings_of(params) if case.auto else None
    polar = optlab.polar.keller(precision=case.precision)
    plan = optlab.plan(params, shardings, polar=polar)
    tx = optlab.muon(methods.RATE, polar=polar, shardings=shardings)
    text, counts = _measure(tx, params, math.prod(case.axes.values()))
    busy = [step.busy for planned in plan.groups for step in planned.steps]
    return {
        "plan": hlo.named(plan.collectives),
        "plan MiB": round(plan.nbytes.total() / MiB, 4),
        "as planned": _verdict(text, plan),
        "busy": f"{min(busy):.0%}",
    } | counts


def _theirs(target: str, case: Case) -> dict[str, Any]:
    params = _params(target, case)
    tx = optax.contrib.muon(methods.RATE)
    _, counts = _measure(tx, params, math.prod(case.axes.values()))
    return dict.fromkeys(("plan", "plan MiB", "as planned", "busy")) | counts


def rows(target: str, *, peers: bool, small: bool) -> Iterator[dict[str, Any]]:
    """Yield a row per case, and optax's beside some of them."""
    del small
    for case in cases(target):
        head = {
            "topology": case.topology,
            "mesh": " x ".join(f"{k} {n}" for k, n in case.axes.items()) + " Auto" * case.auto,
            "matrices": case.leaves,
            "precision": case.precision or "default",
        }
        yield {"muon of": "optlab", **head} | _ours(target, case)
        if peers and case.auto:
            yield {"muon of": "optax", **head} | _theirs(target, case)
