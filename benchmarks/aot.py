"""Compile every recipe for a TPU or GPU without one: python -m benchmarks.aot --target tpu|gpu.

Prints, beside optax's methods of the same names, bytes accessed per parameter (TPU) or kernels
launched per step (GPU), collectives, temporary memory, program size and compile time, and writes
them to benchmarks/results/aot_TARGET.{json,md}. Counts are exact and repeat; compile times do not.
Needs the packages of the extra `tpu-aot` or `gpu-aot`.
"""

import argparse
import os
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "tpu": {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        # Two compilations at a time are two users of a library, not of a chip.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    },
    "gpu": {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"},
}
DEVICES = {"tpu": "Described topology v5e:2x2, one chip", "gpu": "Described H200, one device"}
NOTES = {
    "tpu": (
        "One float32 leaf; params and state donated. `least` is the bytes that the method cannot "
        "go below, `bound` what optlab promises. `bytes/param` is the compiler's count at its "
        "default options; of a leaf of 64 MiB it copies into on-chip memory what the second pass "
        "reads, and counts the copy at both ends, though the memory is read no more often for it. "
        "`without prefetch` counts the same program compiled without such copies, and the leaf of "
        "256 MiB is too large for them."
    ),
    "gpu": (
        "Params and state donated. Kernels are the fusions, custom calls, copies and reductions "
        "of the entry computation and of what it calls, all branches of a conditional included. "
        "`bound` is what optlab promises: optax.adamw's kernels for a method that reads its "
        "arrays once, half of optax.lamb's 1145 for one with norms."
    ),
}
RACE = "adamw"


def _rows(target: str, tree_names: list[str]):
    """Yield the rows of a target: optax, the recipes, the race."""
    from benchmarks import described, methods, trees

    where = described.sharding(target)
    optimizers = {f"optax.{name}": methods.baseline(name) for name in methods.BASELINES}
    optimizers |= methods.optimizers()
    adamw = 0
    for tree_name in tree_names:
        tree = getattr(trees, tree_name)()
        for name, tx in optimizers.items():
            found = described.measure(target, described.update_job(tx, tree, where))
            if name == "optax.adamw":
                adamw = found.get("kernels", 0)
            yield {
                "method": name,
                "tree": tree_name,
                **_promised(target, name, tx, tree, adamw),
            } | found
    found = described.measure(target, described.race_job(RACE, where))
    nothing = dict.fromkeys(("least", "bound") if target == "tpu" else ("bound",))
    yield {"method": f"race ({RACE})", "tree": "quick", **nothing} | found


def _promised(target: str, name: str, tx: Any, tree: Any, adamw: int) -> dict[str, Any]:
    from benchmarks import described, methods

    own = not name.startswith("optax.")
    method = name.removeprefix("optax.").split("[")[0]
    state = described.state_arrays(tx, tree)
    promised = methods.bound(method, state, adamw)
    if target == "gpu":
        return {"bound": promised.kernels if own else None}
    return {
        "least": methods.least_bytes(method, state),
        "bound": promised.bytes_per_parameter if own else None,
    }


def run(target: str, tree_names: list[str], out: Path) -> list[dict[str, Any]]:
    """Measure, print as it goes, and write the table."""
    from benchmarks import table

    rows = []
    for row in _rows(target, tree_names):
        print(", ".join(f"{head} {value}" for head, value in row.items()), flush=True)
        rows.append(row)
    facts = table.about(DEVICES[target])
    table.write(out, f"Compiled for a {target.upper()} ahead of time", facts, rows, NOTES[target])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--target", choices=ENVIRONMENT, required=True)
    parser.add_argument("--tree", action="append", help="a function of benchmarks/trees.py")
    parser.add_argument("--out", type=Path, help="file to write, .json and .md")
    asked = parser.parse_args()
    os.environ.update(ENVIRONMENT[asked.target])
    default_trees = ["one_matrix", "large_matrix"] if asked.target == "tpu" else ["gpt170"]
    out = asked.out or Path(__file__).parent / "results" / f"aot_{asked.target}"
    run(asked.target, asked.tree or default_trees, out)


if __name__ == "__main__":
    main()
