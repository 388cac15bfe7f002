"""Every recipe on one device that is only described, beside optax's methods of the same names.

Import this only after `ENVIRONMENT[target]` of `benchmarks.aot` is in `os.environ`.
"""

from collections.abc import Iterator
from typing import Any

import optax
from jax.sharding import NamedSharding

from benchmarks import described, methods, trees

TITLE = "Compiled for a {} ahead of time"
DEVICES = {"tpu": "Described topology v5e:2x2, one chip", "gpu": "Described H200, one device"}
NOTES = {
    "tpu": (
        "float32 leaves; params and state donated. `least` is the bytes that the method cannot "
        "go below, `bound` what optlab promises. `bytes/param` is the compiler's count at its "
        "default options; of a leaf of 64 MiB it copies into on-chip memory what the second pass "
        "reads, and counts the copy at both ends, though the memory is read no more often for it. "
        "`without prefetch` counts the same program compiled without such copies, and the leaf of "
        "256 MiB is too large for them. What orthogonalizes is judged on a GPT of 34 leaves, by "
        "temporary memory and compile time."
    ),
    "gpu": (
        "Params and state donated. Kernels are the fusions, custom calls, copies and reductions "
        "of the entry computation and of what it calls, all branches of a conditional included. "
        "`bound` is what optlab promises: optax.adamw's kernels for a method that reads its "
        "arrays once, half of optax.lamb's 1145 for one with norms, and see methods.py for "
        "what orthogonalizes."
    ),
}
RACE = "adamw"
# What a target judges a recipe on: bytes on one large leaf, kernels on a tree of many.
_TREES = {"tpu": ("one_matrix", "large_matrix"), "gpu": ("gpt170",)}
_MATRIX_TREES = {"tpu": ("gpt34",), "gpu": ("gpt170",)}


def rows(target: str, *, peers: bool, small: bool) -> Iterator[dict[str, Any]]:
    """Yield a row per method and tree, and one for the race."""
    del peers, small  # bounds are in their units
    where = described.sharding(target)
    optimizers = {f"optax.{name}": methods.baseline(name) for name in methods.BASELINES}
    adamw = 0
    for name, tx in (optimizers | methods.optimizers()).items():
        if methods.of_low_rank(name):
            continue  # their own part
        for tree in (_MATRIX_TREES if methods.of_matrices(name) else _TREES)[target]:
            found = _measure(target, name, tx, tree, where, adamw)
            if name == "optax.adamw":
                adamw = found.get("kernels", 0)
            yield found
    found = described.measure(target, described.race_job(RACE, where), bytes_count=True)
    nothing = dict.fromkeys(("least", "bound") if target == "tpu" else ("bound",))
    yield {"method": f"race ({RACE})", "tree": "quick", **nothing} | found


def _measure(
    target: str,
    name: str,
    tx: optax.GradientTransformation,
    tree_name: str,
    where: NamedSharding,
    adamw: int,
) -> dict[str, Any]:
    tree = getattr(trees, tree_name)()
    promised = _promised(target, name, tx, tree, adamw)
    job = described.update_job(tx, tree, where)
    found = described.measure(target, job, bytes_count=not methods.of_matrices(name))
    return {"method": name, "tree": tree_name, **promised} | found


def _promised(target: str, name: str, tx: Any, tree: Any, adamw: int) -> dict[str, Any]:
    own = not name.startswith("optax.")
    if target == "tpu" and methods.of_matrices(name):
        return {"least": None, "bound": None}
    method = methods.plain(name)
    state = described.state_arrays(tx, tree)
    promised = methods.bound(method, state, adamw)
    if target == "gpu":
        return {"bound": promised.kernels if own else None}
    return {
        "least": methods.least_bytes(method, state),
        "bound": promised.bytes_per_parameter if own else None,
    }
