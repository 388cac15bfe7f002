"""Bytes of compressed state, real and predicted: python -m benchmarks.state_bytes.

Every recipe with every codec on the model of the quick race; of AdamW also what a step costs.

The real bytes are those of the arrays that `jax.jit(tx.init)` puts on the device; the predicted
ones come from shapes alone. Steps donate parameters and state. Their time is that of all cores, so
that other programs on the machine do not count.
"""

import itertools
import time
from typing import Any

import jax
import optax

from benchmarks import methods, table, trees
from optlab import recipes, state_bytes
from optlab.lab import model
from optlab.lab.race import new_config

RECIPES = ("adamw", *recipes.__all__)
TIMED = ("adamw",)
_STEPS = 7
NOTES = (
    "real: arrays on the device; predicted: from shapes. cpu_ns_per_parameter: processor time of "
    "a step, all cores together; temp_bytes: what XLA allocates for it beside its arguments."
)


def _real_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(jax.jit(tx.init)(params)))


def _step_costs(tx: optax.GradientTransformation, params: Any, grads: Any) -> dict[str, Any]:
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    args = jax.tree.map(jax.numpy.copy, (params, jax.jit(tx.init)(params)))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args, grads).compile()
    args = jax.block_until_ready(compiled(*args, grads))
    start = time.process_time()
    for _ in range(_STEPS):
        args = jax.block_until_ready(compiled(*args, grads))
    each = (time.process_time() - start) / _STEPS / trees.size(params)
    usage = compiled.memory_analysis()
    temporary = usage.temp_size_in_bytes if usage else None
    return {"cpu_ns_per_parameter": each * 1e9, "temp_bytes": temporary}


def row(name: str, codec: str, params: Any, grads: Any) -> dict[str, Any]:
    """Measure one recipe with one codec."""
    tx = methods.coded(name, codec)
    real, predicted = _real_bytes(tx, params), state_bytes(tx, params)
    costs = {"cpu_ns_per_parameter": None, "temp_bytes": None}
    if name in TIMED:
        costs = _step_costs(tx, params, grads)
    return {
        "recipe": name,
        "codec": codec,
        "real_bytes": real,
        "predicted_bytes": predicted,
        "equal": real == predicted,
        "bytes_per_parameter": real / trees.size(params),
        **costs,
    }


def main() -> None:
    """Measure every recipe with every codec and write the table."""
    params = model.initial_params(new_config({"optimizers": TIMED}, b""))
    grads = jax.tree.map(lambda p: 0.01 * p + 1e-3, params)
    rows = [
        row(name, codec, params, grads)
        for name, codec in itertools.product(RECIPES, methods.CODECS)
    ]
    about = table.about(jax.devices()[0].device_kind, seed=0)
    title = f"State of the quick race's model, {trees.size(params)} parameters, in bytes"
    table.write(table.RESULTS / "state_bytes", title, about, rows, NOTES)


if __name__ == "__main__":
    main()
