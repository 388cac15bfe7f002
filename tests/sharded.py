"""Trees placed on meshes of 8 devices, and what a compiled `orthogonalize` of them costs and gives.

Used by `test_distributed.py` and `test_distributed_use.py`.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optlab
from benchmarks import hlo
from optlab import layout
from optlab.distributed import plan
from optlab.linalg import polar

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# Three steps in two phases: all that a scheme does, for half of what five steps take to compile.
SHORT = polar.keller(3, form="gram", restarts=(2,))
LAYOUT = layout.rules(
    {"heads": layout.per_head, "experts|layers": layout.stacked(".")}, default=layout.flax
)
# The rest of the compiler is left on: the program, its collectives and FLOPs are those of users.
# Emitting better code for it takes twice as long as all else.
QUICK = {"xla_backend_optimization_level": 0}
Leaves = tuple[tuple[str, tuple[int, ...], PartitionSpec], ...]


def mesh_of(sizes: dict[str, int], *kinds: AxisType) -> jax.sharding.Mesh:
    """Return a mesh; one kind is that of every axis."""
    kinds = kinds * len(sizes) if len(kinds) == 1 else kinds
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


def draw(shapes: dict[str, tuple[int, ...]], dtype: Any = "float32") -> dict[str, np.ndarray]:
    """Return normal leaves on the host, always the same."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def equal(count: int, shape: tuple[int, ...], spec: PartitionSpec) -> Leaves:
    """Return leaves that are all alike."""
    return tuple((f"{i}/kernel", shape, spec) for i in range(count))


def place(leaves: Leaves, mesh: jax.sharding.Mesh, dtype: Any = "float32") -> dict[str, jax.Array]:
    """Draw the leaves and put them on the mesh."""
    tree = draw({name: shape for name, shape, _ in leaves}, dtype)
    specs = {name: spec for name, _, spec in leaves}
    return {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}


@functools.cache
def unsharded(leaves: Leaves, iteration: Any, dtype: Any = "float32") -> dict[str, np.ndarray]:
    """Return what one device makes of the leaves."""
    tree = draw({name: shape for name, shape, _ in leaves}, dtype)
    tx = optlab.orthogonalize(iteration, layout=LAYOUT)
    return jax.device_get(compiled(lambda tree: tx.update(tree, ())[0], tree)(tree))


def compiled(fn: Any, tree: Any) -> Any:
    """Compile `fn` for the tree."""
    return jax.jit(fn).lower(tree).compile(QUICK)


def known(tree: Any) -> Any:
    """Return the shardings to be passed: none where types carry them."""
    explicit = EXPLICIT in jax.typeof(jax.tree.leaves(tree)[0]).sharding.mesh.axis_types
    return None if explicit else optlab.shardings_of(tree)


class Run(NamedTuple):
    """A compiled update, what it gave, and what was planned."""

    lowered: str
    update: Any
    out: Any
    plan: plan.Plan

    @property
    def text(self) -> str:
        """The program of one device."""
        return self.update.as_text()


def run(tree: Any, iteration: Any = "keller", **given: Any) -> Run:
    """Compile `orthogonalize` for a tree that is placed; trace it once."""
    given = {"layout": LAYOUT, "shardings": known(tree)} | given
    tx = optlab.orthogonalize(iteration, **given)
    lowered = jax.jit(lambda tree: tx.update(tree, ())[0]).lower(tree)
    update = lowered.compile(QUICK)
    planned = optlab.plan(tree, polar=iteration, **given)
    return Run(lowered.as_text(), update, jax.block_until_ready(update(tree)), planned)


def check_numbers(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Compare all leaves, largest absolute difference, and their dtypes."""
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_allclose(
            np.asarray(got[name], "float64"),
            np.asarray(want[name], "float64"),
            rtol=0,
            atol=tolerance,
            err_msg=name,
        )


def check_costs(done: Run) -> None:
    """Hold the compiled program to the plan: counts and bytes exactly."""
    assert hlo.collective_counts(done.text) == done.plan.collectives
    assert hlo.collective_bytes(done.text) == done.plan.nbytes


def flops_ratio(done: Run) -> float:
    """Return the compiler's FLOPs on one device by those of the plan."""
    return done.update.cost_analysis()["flops"] / done.plan.flops


def check_places(out: Any, tree: Any) -> None:
    """Every leaf lies where it lay, in its type too."""
    for name, leaf in tree.items():
        assert out[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), name
        assert jax.typeof(out[name]) == jax.typeof(leaf), name


def forms(done: Run) -> set[tuple[str, int, int, bool]]:
    """Return scheme, parts, replicas and scatter of every step of the plan."""
    steps = [step for planned in done.plan.groups for step in planned.steps]
    return {(s.scheme, s.parts, s.replicas, s.scatter) for s in steps}
