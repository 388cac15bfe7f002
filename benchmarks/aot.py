"""Compile every recipe for a TPU or GPU without one: python -m benchmarks.aot --target tpu|gpu.

Part `device`: beside optax's methods of the same names, bytes accessed per parameter (TPU) or
kernels launched per step (GPU), temporary memory, program size, compile time. Part `mesh`: Muon on
8 chips and on 256, collectives and their bytes beside what `optlab.plan` says. Part `low_rank`: the
low-rank family on one device and on 8, what its collectives gather. Part `state`: AdamW, Muon and
Q-GaLore with their state in 8 and 4 bits, on one device. Prints them and writes
benchmarks/results/aot_TARGET.{json,md}, and aot_mesh_TARGET, aot_low_rank_TARGET and
aot_state_TARGET likewise.
Counts are exact and repeat; compile times do not. Needs the packages of the extra `tpu-aot` or
`gpu-aot`.
"""

import argparse
import importlib
import os
from pathlib import Path

from benchmarks import table

# The compilers read it while jax is imported, so what imports jax is imported later.
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
PARTS = {
    "device": ("benchmarks.aot_device", "aot"),
    "mesh": ("benchmarks.aot_mesh", "aot_mesh"),
    "low_rank": ("benchmarks.aot_low_rank", "aot_low_rank"),
    "state": ("benchmarks.aot_state", "aot_state"),
}


def run(part: str, target: str, folder: Path, **choices: bool) -> None:
    """Measure, print as it goes, and write the table."""
    module, file = PARTS[part]
    rows_of = importlib.import_module(module)
    rows = []
    for row in rows_of.rows(target, **choices):
        print(", ".join(f"{head} {value}" for head, value in row.items()), flush=True)
        rows.append(row)
    facts = table.about(rows_of.DEVICES[target])
    title = rows_of.TITLE.format(target.upper())
    table.write(folder / f"{file}_{target}", title, facts, rows, rows_of.NOTES[target])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument("--target", choices=ENVIRONMENT, required=True)
    parser.add_argument("--part", choices=PARTS, action="append", help="all where none is named")
    parser.add_argument("--without-peers", action="store_true", help="leave optax out on meshes")
    parser.add_argument(
        "--small", action="store_true", help="no large trees where there is a choice"
    )
    parser.add_argument("--folder", type=Path, default=table.RESULTS, help="to write to")
    asked = parser.parse_args()
    os.environ.update(ENVIRONMENT[asked.target])
    for part in asked.part or PARTS:
        peers = not asked.without_peers
        run(part, asked.target, asked.folder, peers=peers, small=asked.small)


if __name__ == "__main__":
    main()
