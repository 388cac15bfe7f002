"""Count what Muon sends between 8 devices, beside optax's: python -m benchmarks.collectives.

One step of `optlab.muon` and of `optax.contrib.muon` on leaves sharded in many ways, in Auto and in
Explicit meshes: collectives and the bytes they give to one device from the compiled program, FLOPs
of one device, and what `optlab.plan` said before. Then `optlab.orthogonalize` with every scheme by
name. Nothing is run, counts repeat exactly. Writes benchmarks/results/collectives.{json,md}.
"""

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Before jax is imported, which reads them.
os.environ["JAX_PLATFORMS"] = "cpu"
# Emitting better code changes nothing that is counted.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optlab
from benchmarks import described, hlo, methods, table
from optlab import layout

RESULTS = Path(__file__).parent / "results"
DEVICES, SHAPE = 8, (256, 1024)
LINE, GRID = {"fsdp": 8}, {"data": 4, "model": 2}
LAYOUT = layout.stacked("^(experts|layers)/")
MiB = 2**20

Leaves = dict[str, tuple[tuple[int, ...], P]]


class Case(NamedTuple):
    """Leaves and the mesh that they lie on."""

    mesh: dict[str, int]
    leaves: Leaves


def _equal(count: int, spec: P) -> Leaves:
    return {f"{i}/kernel": (SHAPE, spec) for i in range(count)}


MIXED: Leaves = {
    "conv/kernel": ((3, 3, 64, 128), P(None, None, "data", "model")),
    "down/kernel": ((1024, 256), P("model", "data")),
    "experts/kernel": ((4, 256, 1024), P("data", None, "model")),
    "layers/kernel": ((6, 256, 1024), P(None, "data", "model")),
    "up/bias": ((1024,), P("model")),
    "up/kernel": ((256, 1024), P("data", "model")),
}
CASES = {
    "8, short side": Case(LINE, _equal(8, P("fsdp", None))),
    "8, long side": Case(LINE, _equal(8, P(None, "fsdp"))),
    "3, short side": Case(LINE, _equal(3, P("fsdp", None))),
    "9, short side": Case(LINE, _equal(9, P("fsdp", None))),
    "20, short side": Case(LINE, _equal(20, P("fsdp", None))),
    "8, both sides": Case(GRID, _equal(8, P("data", "model"))),
    "8, two axes on one side": Case(GRID, _equal(8, P(("data", "model"), None))),
    "8, replicated twice": Case(GRID, _equal(8, P("data", None))),
    "8, replicated": Case(LINE, _equal(8, P())),
    "8 experts": Case(LINE, {"experts/kernel": ((8, *SHAPE), P("fsdp", None, None))}),
    "mixed": Case(GRID, MIXED),
}
BY_NAME = {
    "8, short side": ("all_to_all", "gram", "hybrid"),
    "8, long side": ("all_to_all", "gram", "hybrid"),
    "3, short side": ("all_to_all", "gram", "hybrid"),
    "9, short side": ("all_to_all", "gram", "hybrid"),
    "20, short side": ("all_to_all", "gram", "hybrid"),
    "8, replicated": ("local", "split"),
}


def _placed(case: Case, kind: AxisType) -> dict[str, jax.ShapeDtypeStruct]:
    names = tuple(case.mesh)
    mesh = jax.make_mesh(tuple(case.mesh.values()), names, axis_types=(kind,) * len(names))
    return {
        path: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for path, (shape, spec) in case.leaves.items()
    }


def _dimensions(params: Any) -> Any:
    """Return for optax which axes of a leaf it reduces, and which are the outputs."""

    def of(path: Any, leaf: Any) -> Any:
        if not hasattr(leaf, "ndim"):  # a placeholder, by which optax finds its state's leaves
            return None
        view = layout.view_of(layout.path_str(path), leaf, LAYOUT)
        return view and optax.contrib.MuonDimensionNumbers(view.rows, view.cols)

    return jax.tree_util.tree_map_with_path(of, params)


def _forms(plan: Any) -> str:
    """Return the schemes of a plan, and how many matrices each takes."""
    found: Counter[str] = Counter()
    for planned in plan.groups:
        for step in planned.steps:
            found[step.scheme] += step.stop - step.start
    return ", ".join(f"{n} {scheme}" for scheme, n in found.items())


def _row(tx: optax.GradientTransformation, params: Any, whole: float, plan: Any) -> dict[str, Any]:
    """Compile, count, and compare with the plan, which optax has none of."""
    foreseen = {
        "plan": hlo.named(plan.collectives) if plan else None,
        "plan MiB": round(plan.nbytes.total() / MiB, 4) if plan else None,
        "schemes": _forms(plan) if plan else None,
    }
    try:
        compiled = described.compile_job(described.sharded_job(tx, params)).program
    except Exception as error:
        if type(error).__name__ != "ShardingTypeError":  # which jax does not export
            raise
        nothing = {"collectives": type(error).__name__, "MiB": None, "FLOPs": None}
        return {**nothing, **foreseen, "as planned": None}
    text = compiled.as_text()
    counts, sizes = hlo.collective_counts(text), hlo.collective_bytes(text)
    return {
        "collectives": hlo.named(counts),
        "MiB": round(sizes.total() / MiB, 4),
        "FLOPs": round(compiled.cost_analysis()["flops"] * DEVICES / whole, 3),
        **foreseen,
        "as planned": (counts, sizes) == (plan.collectives, plan.nbytes) if plan else None,
    }


def muon_rows() -> Iterator[dict[str, Any]]:
    """Yield a row per case, mesh and library."""
    for name, case in CASES.items():
        # The products of all matrices, were they on one device.
        alone = {k: jax.ShapeDtypeStruct(shape, "float32") for k, (shape, _) in case.leaves.items()}
        whole = optlab.plan(alone, layout=LAYOUT).flops
        for kind in (AxisType.Auto, AxisType.Explicit):
            params = _placed(case, kind)
            known = optlab.shardings_of(params) if kind == AxisType.Auto else None
            ours = optlab.muon(methods.RATE, layout=LAYOUT, shardings=known)
            theirs = optax.contrib.muon(methods.RATE, muon_weight_dimension_numbers=_dimensions)
            plan = optlab.plan(params, known, layout=LAYOUT)
            for library, tx, said in (("optax", theirs, None), ("optlab", ours, plan)):
                head = {"matrices": name, "mesh": kind.name, "muon of": library}
                yield head | _row(tx, params, whole, said)


def scheme_rows() -> Iterator[dict[str, Any]]:
    """Yield a row per scheme by name, number of matrices and side that is sharded."""
    for name, schemes in BY_NAME.items():
        params = _placed(CASES[name], AxisType.Explicit)
        alone = {k: jax.ShapeDtypeStruct(x.shape, "float32") for k, x in params.items()}
        for scheme in schemes:
            tx = optlab.orthogonalize(scheme=scheme)
            plan = optlab.plan(params, scheme=scheme)
            head = {"matrices": name, "mesh": "Explicit", "muon of": f"optlab, {scheme}"}
            yield head | _row(tx, params, optlab.plan(alone).flops, plan)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.collectives", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "collectives")
    asked = parser.parse_args()
    rows = []
    for make in (muon_rows, scheme_rows):
        for row in make():
            print(", ".join(f"{head} {value}" for head, value in row.items()), flush=True)
            rows.append(row)
    notes = (
        f"Matrices of {SHAPE} in float32. `collectives`, `MiB`: of one step and one device, from "
        "the compiled program, or the error that optax raises. `FLOPs`: by the compiler's count on "
        "one device, in units of an eighth of the products that optlab would take on one. `plan`, "
        "`plan MiB`, `schemes`: what `optlab.plan` foresees; `as planned`: whether the program has "
        "the same kinds, counts and bytes. The last rows are `optlab.orthogonalize` alone, with "
        "the scheme by name. Mixed: a convolution, 4 experts and 6 layers stacked in one leaf "
        "each, two dense leaves, transposes of each other, and a bias."
    )
    facts = table.about(f"{DEVICES} host devices")
    table.write(asked.out, "Collectives of Muon on 8 devices", facts, rows, notes)
    off = [row for row in rows if row["as planned"] is False]
    print(f"{len(off)} of {sum(row['plan'] is not None for row in rows)} differ from the plan.")


if __name__ == "__main__":
    main()
