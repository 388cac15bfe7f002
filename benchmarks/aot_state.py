"""Compressed state compiled for one device that is only described, beside plain state.

Import this only after `ENVIRONMENT[target]` of `benchmarks.aot` is in `os.environ`.
"""

from collections.abc import Iterator
from typing import Any

import optax

import optlab
from benchmarks import described, methods, trees
from benchmarks.aot_low_rank import RANK

TITLE = "State in few bits compiled for a {} ahead of time"
DEVICES = {"tpu": "Described topology v5e:2x2, one chip", "gpu": "Described H200, one device"}
NOTES = {
    "tpu": (
        "float32 leaves; params and state donated. `state B/param` is what the state takes. "
        "`bytes/param` is the compiler's count, of which 9 with int8 are scales that stay in "
        "on-chip memory; `without prefetch` is that of the same program compiled without copies "
        "into it. Muon and Q-GaLore are judged by temporary memory and compile time."
    ),
    "gpu": (
        "float32 leaves; params and state donated. `state B/param` is what the state takes. "
        "Kernels are the fusions, custom calls, copies and reductions of the entry computation "
        "and of what it calls."
    ),
}


def rows(target: str, *, peers: bool, small: bool) -> Iterator[dict[str, Any]]:
    """Yield a row per method, codec and tree; with `small` none of the leaf of 256 MiB."""
    del peers
    for codec in methods.CODECS:
        for tree in ("one_matrix",) if small else ("one_matrix", "large_matrix"):
            yield _row(target, "adamw", codec, tree)
    for codec in methods.CODECS:
        yield _row(target, "muon", codec, "gpt10")
    for codec in ("-", "int8"):
        yield _row(target, "q_galore", codec, "gpt10")


def _row(target: str, name: str, codec: str, tree_name: str) -> dict[str, Any]:
    tree = getattr(trees, tree_name)()
    tx = _transformation(name, codec, tree)
    job = described.update_job(tx, tree, described.sharding(target))
    found = described.measure(target, job, bytes_count=name == "adamw")
    shapes = trees.shapes(tree)
    stored = round(optlab.state_bytes(tx, shapes) / trees.size(shapes), 2)
    return {"method": name, "codec": codec, "tree": tree_name, "state B/param": stored} | found


def _transformation(name: str, codec: str, tree: Any) -> optax.GradientTransformation:
    if name != "q_galore":
        return methods.coded(name, codec)
    rank = RANK * tree["norm"]["scale"][0] // 1024
    return methods.low_rank(name, rank, state_codec=methods.CODECS[codec])
