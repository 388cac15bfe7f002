"""Do controllers keep up with tuned schedules? python -m benchmarks.controllers [--smoke]

Three questions about the quick race's model and text under AdamW, each with three seeds:

1. Refinement: a run at a constant rate records its gradient norms, their schedule runs, and its
   norms give the next. Do warm-up and annealing emerge, and is the loss no worse than that of
   `warmup_linear_decay`? The peaks of both are tuned on the first seed.
2. AutoLRS: after a bad start, a twentieth of the run at a rate far too small or too large, does it
   end within 5 % of the tuned schedule's loss, and of that schedule's after the same start, which
   may do damage that no rate undoes? Twice as many steps as the others, in stages of 200,
   400 and 800, the code's own design in a fifth of its size: in trials of less it sees only noise.
3. WSD-S: are its checkpoints at three budgets no worse by more than 1 % than those of three cosine
   runs, which take twice the steps?

What is found goes to results/controllers_runs.json at once, and what is there already is kept, so
this can be stopped and gone on with; then controllers.json, .md and .png are made of it. All runs
are pieces of one compiled program, whose arguments are the seed and the rates. --smoke runs all of
it on next to nothing and writes to a temporary folder.
"""

import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab
from benchmarks import controllers_report, table
from optlab import measures
from optlab.lab import data, model, optimizers, report, train
from optlab.lab.config import Config
from optlab.lab.race import new_config

STEPS = {"quick": 1000, "smoke": 40}
SMALL = {"layers": 1, "width": 16, "heads": 2, "context": 8, "batch_size": 2, "eval_windows": 4}
PEAKS = (1e-3, 3e-3, 1e-2)
CONSTANT = 1e-3  # of the first run that refinement starts from
TUNED = optimizers.RATES["adamw"]
BAD = {"30 times too large": 30 * TUNED, "300 times too small": TUNED / 300}
BOUNDS = (1e-5, 1e-2)
EXPLORATION = 2.0  # standard deviations: what was found is looked at
LONG = 2  # times as many steps for AutoLRS and what it is compared with
State = tuple[Any, Any, jax.Array]  # parameters, optimizer state, steps taken
Runs = dict[str, dict[str, Any]]


class Bench:
    """The model, the text and the one compiled piece of a run."""

    def __init__(self, config: Config, text: bytes):
        self.config = config
        self.steps = config.steps
        self.piece = config.steps // 100 if config.steps >= 1000 else 2
        self.problem = train.make_problem(config, text)
        self._compiled = jax.jit(self._piece_of_run)
        self._weights = functools.cache(
            lambda seed: model.initial_params(dataclasses.replace(config, seed=seed))
        )

    def start(self, seed: int) -> State:
        """Return where the runs of a seed begin."""
        params = self._weights(seed)
        return params, self._tx(0.0).init(params), jnp.int32(0)

    def advance(
        self, state: State, seed: int, rates: np.ndarray
    ) -> tuple[State, np.ndarray, np.ndarray]:
        """Take a step for every rate; return the state, the losses and the gradients' sizes."""
        found = []
        for begin in range(0, len(rates), self.piece):
            piece = jnp.asarray(rates[begin : begin + self.piece], jnp.float32)
            state, *numbers = self._compiled(state, self.problem.corpus.train, seed, piece)
            found.append(np.asarray(numbers, np.float64))
        losses, norms = np.concatenate(found, axis=1)
        return state, losses, norms

    def evaluate(self, state: State) -> float:
        """Return the held-out loss."""
        return self.problem.evaluate(state[0])

    def train(
        self, seed: int, schedule: Callable[[Any], Any], times: int = 1
    ) -> tuple[float, np.ndarray]:
        """Return the held-out loss after a whole run, and the gradients' sizes."""
        rates = np.asarray(jax.vmap(schedule)(jnp.arange(times * self.steps)))
        state, _, norms = self.advance(self.start(seed), seed, rates)
        return self.evaluate(state), norms

    def _tx(self, rate: Any) -> optax.GradientTransformationExtraArgs:
        return optlab.watch(optax.adamw(rate), [measures.gradient_mean_abs])

    def _piece_of_run(
        self, state: State, corpus: jax.Array, seed: jax.Array, rates: jax.Array
    ) -> tuple[State, jax.Array, jax.Array]:
        structure = self.problem.structure

        def one(state: State, rate: jax.Array) -> tuple[State, tuple[jax.Array, jax.Array]]:
            params, opt_state, step = state
            windows = data.batch(corpus, seed, step, self.config)  # type: ignore[bad-argument-type]
            loss, grads = jax.value_and_grad(lambda p: model.loss(structure, p, windows))(params)
            updates, opt_state = self._tx(rate).update(grads, opt_state, params)
            size = optlab.metrics(opt_state)["gradient_mean_abs"]
            return (optax.apply_updates(params, updates), opt_state, step + 1), (loss, size)

        state, (losses, sizes) = jax.lax.scan(one, state, rates)
        return state, losses, sizes


def linear(bench: Bench, peak: float) -> optax.Schedule:
    warmup = bench.config.warmup_steps
    return optimizers.SCHEDULES["warmup_linear_decay"](peak, warmup, bench.steps)


def refine(bench: Bench, seed: int, peak: float) -> dict[str, Any]:
    """Train at a constant rate, then twice with the schedule of the run before."""
    loss, norms = bench.train(seed, optax.constant_schedule(CONSTANT))
    losses, shapes = [loss], []
    for _ in range(2):
        shape = optlab.refine_schedule(norms, "adam")
        loss, norms = bench.train(seed, lambda t, shape=shape: peak * jnp.asarray(shape)[t])
        losses.append(loss)
        shapes.append([float(f"{x:.4g}") for x in shape])
    return {"losses": losses, "shapes": shapes}


def autolrs(bench: Bench, seed: int, bad: float) -> dict[str, Any]:
    """Train a twentieth of the run at a bad rate, and the rest by AutoLRS or by the schedule."""
    steps = LONG * bench.steps
    before = steps // 20
    state, _, _ = bench.advance(bench.start(seed), seed, np.full(before, bad))

    def run_steps(state: State, rate: float, n: int) -> tuple[State, np.ndarray]:
        state, losses, _ = bench.advance(state, seed, np.full(n, rate))
        return state, losses

    search = optlab.AutoLRS(
        run_steps, BOUNDS, tau_min=20 * bench.piece, tau_max=80 * bench.piece,
        exploration=EXPLORATION, evaluate=bench.evaluate, seed=seed,
    )  # fmt: skip
    schedule = optimizers.SCHEDULES["wsd"](TUNED, bench.config.warmup_steps, steps - before)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(steps - before)))
    scheduled, _, _ = bench.advance(state, seed, rates)
    ended, stages = search.run(state, steps - before)
    return {
        "loss": bench.evaluate(ended),
        "loss_of_schedule": bench.evaluate(scheduled),
        "after_start": bench.evaluate(state),
        "rates": search.learning_rates,
        "ends": np.cumsum([before, *(stage.steps for stage in stages)]).tolist(),
    }


def budgets(bench: Bench) -> list[int]:
    return [round(bench.steps * share / bench.piece) * bench.piece for share in (0.4, 0.7, 1.0)]


def one_run(bench: Bench, seed: int) -> dict[str, Any]:
    """Return the losses of WSD-S at every budget."""
    ends = budgets(bench)
    schedule = optlab.wsd_s(TUNED, bench.config.warmup_steps, ends, decay_fraction=0.1)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(bench.steps)))
    state, losses = bench.start(seed), []
    for begin, end in zip([0, *ends], ends, strict=False):
        state, _, _ = bench.advance(state, seed, rates[begin:end])
        losses.append(bench.evaluate(state))
    return {"losses": losses, "steps": ends[-1], "ends": ends}


def cosines(bench: Bench, seed: int) -> dict[str, Any]:
    """Return the losses of a cosine run for every budget."""
    losses, ends = [], budgets(bench)
    for end in ends:
        schedule = optimizers.SCHEDULES["cosine"](TUNED, bench.config.warmup_steps, end)
        rates = np.asarray(jax.vmap(schedule)(jnp.arange(end)))
        losses.append(bench.evaluate(bench.advance(bench.start(seed), seed, rates)[0]))
    return {"losses": losses, "steps": sum(ends)}


def work(bench: Bench, seeds: tuple[int, ...], do: Callable[..., dict[str, Any]]) -> None:
    """Ask for every run, `do(key, function)`, which keeps what is known."""

    def linear_run(seed: int, peak: float) -> dict[str, Any]:
        return do(
            f"linear/{seed}/{peak:g}",
            lambda: {"losses": [bench.train(seed, linear(bench, peak))[0]]},
        )

    def refined_run(seed: int, peak: float) -> dict[str, Any]:
        return do(f"refined/{seed}/{peak:g}", lambda: refine(bench, seed, peak))

    for run in (linear_run, refined_run):
        best = min(PEAKS, key=lambda peak, run=run: run(seeds[0], peak)["losses"][-1])
        for seed in seeds:
            run(seed, best)
    wsd = optimizers.SCHEDULES["wsd"](TUNED, bench.config.warmup_steps, LONG * bench.steps)
    for seed in seeds:
        do(f"tuned/{seed}", lambda seed=seed: {"losses": [bench.train(seed, wsd, LONG)[0]]})
        for name, bad in BAD.items():
            do(f"autolrs/{seed}/{name}", lambda seed=seed, bad=bad: autolrs(bench, seed, bad))
        do(f"wsd_s/{seed}", lambda seed=seed: one_run(bench, seed))
        do(f"cosine/{seed}", lambda seed=seed: cosines(bench, seed))


def main(smoke: bool, folder: Path) -> None:
    sizes = SMALL if smoke else {}
    text, asked = data.read_text(None), {"steps": STEPS["smoke" if smoke else "quick"], **sizes}
    config = new_config({**asked, "optimizers": ("adamw",)}, text)
    seeds = (0,) if smoke else (0, 1, 2)
    store = folder / "controllers_runs.json"
    about = json.loads(json.dumps({"config": dataclasses.asdict(config), "bounds": BOUNDS}))
    about |= {"versions": report.versions(), "device": report.device()}
    before = json.loads(store.read_text()) if store.exists() else {}
    runs: Runs = before["runs"] if before.get("about") == about else {}
    bench = Bench(config, text)

    def do(key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in runs:
            begin = time.perf_counter()
            runs[key] = run()
            shown = {k: v for k, v in runs[key].items() if k != "shapes"}
            print(f"{key}: {shown} ({time.perf_counter() - begin:.0f} s)", flush=True)
            report.write_whole(store, json.dumps({"about": about, "runs": runs}, indent=1) + "\n")
        return runs[key]

    work(bench, seeds, do)
    rows = controllers_report.rows(runs, seeds)
    facts = table.about(report.device()) | {"seed": f"{seeds[0]} to {seeds[-1]}"}
    table.write(folder / "controllers", "Controllers beside tuned schedules", facts, rows,
                controllers_report.notes(runs, seeds, bench.steps))  # fmt: skip
    controllers_report.draw(runs, seeds, bench.steps, folder / "controllers.png")
    print(table.text(rows))


if __name__ == "__main__":
    if sys.argv[1:] == ["--smoke"]:
        with tempfile.TemporaryDirectory() as folder:
            main(True, Path(folder))
    elif sys.argv[1:]:
        sys.exit(f"benchmarks.controllers: takes --smoke or nothing, got {sys.argv[1:]}.")
    else:
        main(False, table.RESULTS)
