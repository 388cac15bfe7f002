"""Time one optimizer step on this machine: python -m benchmarks.step_time [NAME ...].

Every recipe, on a GPT of 196 leaves (12 layers of width 256, 11.8 M parameters), params and state
donated, beside optax's method of the same name and the same mathematics written by hand. The three
run in turns in one process, and the ratio is the median over turns of the recipe's time by that of
the fastest of the others, so that a busy machine slows them alike. Each must land where the recipe
does. Writes benchmarks/results/step_time.{json,md}.
"""

import argparse
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab
from benchmarks import handwritten_matrices, hlo, methods, table, trees
from benchmarks.handwritten import BY_NAME, IN_PLACE, Handwritten
from optlab.lab import report

RESULTS = Path(__file__).parent / "results" / "step_time"
SEED = 0
TURNS, STEPS = 21, 5
# A step of matrices takes half a second.
MATRIX_TURNS, MATRIX_STEPS = 11, 1
# Of the way gone in three steps, in float32; a sign may turn where a momentum is next to zero.
TOLERANCE = 1e-3
# optax's LARS divides by another norm, its Signum has no decay.
SAME_IN_OPTAX = ("adabelief", "lamb", "lion")
FORMS = BY_NAME | handwritten_matrices.BY_NAME


class Runner:
    """A compiled step with its own params and state, both donated at every call."""

    def __init__(self, optimizer: Handwritten):
        self.params = trees.normal(trees.gpt196(), SEED, 0.02)
        # Varies over the leaves, as gradients do.
        self.grads = trees.normal(trees.gpt196(), SEED + 1, 1e-3)
        self.state = jax.jit(optimizer.init)(self.params)
        lowered = jax.jit(optimizer.step, donate_argnums=(0, 1)).lower(
            self.params, self.state, self.grads
        )
        begin = time.perf_counter()
        self.compiled: Any = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin

    def settle(self) -> None:
        """Take three steps with other gradients each; the same ones would hide any momentum."""
        for seed in range(SEED + 2, SEED + 5):
            grads = trees.normal(trees.gpt196(), seed, 1e-3)
            self.params, self.state = self.compiled(self.params, self.state, grads)

    def milliseconds(self, steps: int) -> float:
        """Run `steps` steps and return the time of one."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.params, self.state = self.compiled(self.params, self.state, self.grads)
        jax.block_until_ready((self.params, self.state))
        return 1e3 * (time.perf_counter() - begin) / steps

    def counts(self) -> dict[str, Any]:
        """Return temporary memory in percent of the parameters, program size, compile time."""
        temp = self.compiled.memory_analysis().temp_size_in_bytes
        return {
            "temp %": round(100 * temp / (4 * trees.size(self.params)), 2),
            "instructions": hlo.instructions(self.compiled.as_text()),
            "compile s": round(self.compile_seconds, 1),
        }


def _of_optax(tx: Any) -> Handwritten:
    from benchmarks.described import optimizer_step

    return Handwritten(tx.init, optimizer_step(tx))


def _forms(name: str) -> dict[str, Handwritten]:
    """Return the forms of one method, the recipe first."""
    forms = {"optlab": _of_optax(methods.optimizers()[name]), "by hand": FORMS[name]}
    if name in IN_PLACE:
        forms["in place"] = IN_PLACE[name]
    if name in SAME_IN_OPTAX:
        forms["optax"] = _of_optax(methods.baseline(name))
    if name == "muon":
        forms |= {form: _of_optax(tx) for form, tx in _muons_of_optax().items()}
    return forms


def _muons_of_optax() -> dict[str, optax.GradientTransformation]:
    """Return optax's Muon, and ours in its form.

    Its momentum is debiased, which weighs the look ahead otherwise, and its other leaves take
    NAdamW: it lands 8 % of the way off the default, so it is held to our counterpart.
    """
    rate, decay, fallback_rate = methods.RATE, methods.WEIGHT_DECAY, 0.015 * methods.RATE
    sides = optax.contrib.MuonDimensionNumbers()

    def dimensions(params: Any) -> Any:
        of = lambda path, p: sides if "kernel" in jax.tree_util.keystr(path) else None  # noqa: E731
        return jax.tree_util.tree_map_with_path(of, params)

    ours = optlab.muon(
        rate,
        accumulation="debiased",
        polar=optlab.polar.keller(eps=1e-8),
        weight_decay=decay,
        fallback=optax.nadamw(fallback_rate, weight_decay=decay),
    )
    theirs = optax.contrib.muon(
        rate,
        weight_decay=decay,
        adam_weight_decay=decay,
        adam_learning_rate=fallback_rate,
        muon_weight_dimension_numbers=dimensions,
    )
    return {"optlab as optax": ours, "optax": theirs}


def _distance(a: Any, b: Any) -> float:
    gaps = jax.tree.map(lambda x, y: jnp.sum(jnp.abs(x - y)), a, b)
    return float(sum(jax.tree.leaves(gaps)))


def _check_same(name: str, runners: dict[str, Runner]) -> None:
    """Refuse to compare what does not compute the same."""
    start = trees.normal(trees.gpt196(), SEED, 0.02)
    for form, runner in runners.items():
        peer = "optlab as optax" if name == "muon" and "optax" in form else "optlab"
        wanted = runners[peer].params
        gap = _distance(wanted, runner.params) / _distance(wanted, start)
        if not gap < TOLERANCE:
            raise AssertionError(f"step_time: {name} {form} lands {gap:g} of the way off.")


def compare(name: str, turns: int) -> Iterator[dict[str, Any]]:
    """Yield a row per form of one method, the recipe first."""
    steps = MATRIX_STEPS if methods.of_matrices(name) else STEPS
    runners = {form: Runner(optimizer) for form, optimizer in _forms(name).items()}
    for runner in runners.values():
        runner.settle()
    _check_same(name, runners)
    times: dict[str, list[float]] = {form: [] for form in runners}
    for turn in range(turns):
        # Forwards and backwards, so that none always runs after the same one.
        for form in list(runners)[:: -1 if turn % 2 else 1]:
            times[form].append(runners[form].milliseconds(steps))
    others = [form for form in runners if not form.startswith("optlab")]
    fastest = min(others, key=lambda form: np.median(times[form]))
    for form, runner in runners.items():
        ratio = np.median(np.array(times[form]) / np.array(times[fastest]))
        yield {
            "method": name,
            "form": form,
            "ms": round(float(np.median(times[form])), 2),
            "ratio": round(float(ratio), 3),
            **runner.counts(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__)
    parser.add_argument("names", nargs="*", help="recipes; all where none is named")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in asked.names or sorted(FORMS):
        turns = MATRIX_TURNS if methods.of_matrices(name) else TURNS
        for row in compare(name, asked.turns or turns):
            print(", ".join(f"{head} {value}" for head, value in row.items()), flush=True)
            rows.append(row)
        gc.collect()
    notes = (
        "GPT of 196 leaves, 11.8 M float32 parameters, donated. `ratio`: to the fastest of the "
        f"other forms, median over {asked.turns or TURNS} turns of {STEPS} steps each, of "
        f"{asked.turns or MATRIX_TURNS} of {MATRIX_STEPS} for what orthogonalizes. `temp %`: of "
        "the parameters' bytes. `in place` overwrites the weights in the middle of the step, which "
        "an optax transformation, whose updates are added to them, cannot do."
    )
    table.write(asked.out, "Time of one step", table.about(report.device(), SEED), rows, notes)


if __name__ == "__main__":
    main()
