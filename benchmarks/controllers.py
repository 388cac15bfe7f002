"""Do controllers keep up with tuned schedules? python -m benchmarks.controllers [--smoke]

Three questions about the quick race's model and text, of several seeds. Peaks are tuned on the
first of them.

1. Refinement under Muon: the gradient norms of a run give a schedule, those of the run with it give
   the next; the first run has `warmup_linear_decay` or a constant rate. Do warm-up and annealing
   emerge, and is the loss no worse? In batches of 4, as the theory is about gradients of much
   noise. Ten seeds: the first three were 0.3 % above linear decay in the mean, but a seed's
   difference has a standard deviation of 1.2 %, so three could not tell, and seven were added, for
   a constant rate too. Elsewhere, one or two seeds each, of which only what is more than twice
   that says something, the refined schedule ended above: with weight decay, shorter medians or
   batches of 1, 2 and 16 by 0.3 to 1.5 %, by nuclear norms, which are those Muon's steps are dual
   to, 1.6 %, refined once on the small preset 2 %; in 12 000 steps of batches of 2, where norms
   rise by only a tenth, by 0 to 1 %.
   Under AdamW 1.4 to 3.4 %, Scion 1.5 to 2.1 %, SGD, by its l2 norms, 2.1 %, and under Signum and
   Lion, whose steps the l1 norm is dual to, 1.8 and 8.9 %. Norms rise when the rate falls: under
   Muon to 1.2 to 1.4 times with linear decay, to 1.04 at a constant rate.
2. WSD-S under Muon: are its checkpoints at three budgets no worse by more than 1 % than those of
   three cosine runs, which take twice the steps?
3. AutoLRS under Scion: after a bad start, a twentieth of the run at a rate far too small or too
   large, does it end within 5 % of the tuned schedule's loss, and of that schedule's after the same
   start, which may do damage that no rate undoes? In stages of 1000 steps, the code's first: trials
   of 20 and 40 steps saw only noise, and chose rates that ended 22 % above the schedule. AutoLRS
   takes the rate that falls fastest within a trial. Scion's is its best in the long run as well;
   under Muon three times the best rate falls fastest over 100 steps, and after 200 with it the run
   ended 11 % worse with the best rates that followed. After a start at ten times the rate AutoLRS
   ended 8.6 % above the tuned schedule, that schedule 21 % above its run without (one seed each).
   So optimizer, stages and starts here were chosen after others had failed.

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

RUNS = {
    "refinement": {"optimizers": ("muon",), "steps": 3000, "batch_size": 4},
    "budgets": {"optimizers": ("muon",), "steps": 2000, "batch_size": 16},
    "search": {"optimizers": ("scion",), "steps": 2000, "batch_size": 16},
}
SEEDS = {"refinement": tuple(range(10)), "budgets": (0, 1, 2), "search": tuple(range(7))}
SMALL = {"layers": 1, "width": 16, "heads": 2, "context": 8, "steps": 40, "eval_windows": 4}
PEAKS = (0.5, 1.0, 2.0)  # of the recorded sweep's rate
BAD = {"3 times too large": 3.0, "100 times too small": 0.01}  # of the tuned peak
BOUNDS = (1e-5, 1e-2)
EXPLORATION = 2.0  # standard deviations: what was found is looked at
DECAY_FRACTION = 0.1  # of WSD-S: the share of each budget that cools it
State = tuple[Any, Any, jax.Array]  # parameters, optimizer state, steps taken
Runs = dict[str, dict[str, Any]]
Do = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]


class Bench:
    """The model, the text and the one compiled piece of a run."""

    def __init__(self, config: Config, text: bytes):
        self.config = config
        self.steps = config.steps
        self.piece = max(1, config.steps // 200)
        self.name, self.rate = next(iter(config.learning_rates.items()))
        self.problem = train.make_problem(config, text)
        self._compiled = jax.jit(self._piece_of_run)
        self._weights = functools.cache(model.make_initial_params(config))

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

    def rates(self, kind: str, peak: float, steps: int) -> np.ndarray:
        """Return the rates of one of the race's schedules over so many steps."""
        schedule = optimizers.SCHEDULES[kind](peak, self.config.warmup_steps, steps)
        return np.asarray(jax.vmap(schedule)(jnp.arange(steps)))

    def train(self, seed: int, rates: np.ndarray) -> dict[str, Any]:
        """Return the held-out loss after a run, and the gradients' sizes in it."""
        state, _, sizes = self.advance(self.start(seed), seed, rates)
        return {"loss": self.evaluate(state), "sizes": rounded(sizes)}

    def _tx(self, rate: Any) -> optax.GradientTransformationExtraArgs:
        return optlab.watch(optimizers.make(self.name, rate), [measures.gradient_mean_abs])

    def _piece_of_run(
        self, state: State, corpus: jax.Array, seed: jax.Array, rates: jax.Array
    ) -> tuple[State, jax.Array, jax.Array]:
        structure = self.problem.structure

        def one(state: State, rate: jax.Array) -> tuple[State, tuple[jax.Array, jax.Array]]:
            params, opt_state, step = state
            windows = data.batch(corpus, seed, step, self.config)
            loss, grads = jax.value_and_grad(lambda p: model.loss(structure, p, windows))(params)
            updates, opt_state = self._tx(rate).update(grads, opt_state, params)
            size = optlab.metrics(opt_state)["gradient_mean_abs"]
            return (optax.apply_updates(params, updates), opt_state, step + 1), (loss, size)

        state, (losses, sizes) = jax.lax.scan(one, state, rates)
        return state, losses, sizes


def rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def refine(bench: Bench, seed: int, peak: float, sizes: list[float]) -> dict[str, Any]:
    """Train twice, each time with the schedule that the run before asks for."""
    losses, shapes = [], []
    for _ in range(2):
        shape = optlab.refine_schedule(sizes, "adam")
        found = bench.train(seed, peak * shape)
        losses.append(found["loss"])
        shapes.append(rounded(shape))
        sizes = found["sizes"]
    return {"loss": losses[-1], "losses": losses, "shapes": shapes}


def autolrs(bench: Bench, seed: int, peak: float, bad: float) -> dict[str, Any]:
    """Train a twentieth of the run at a bad rate, and the rest by AutoLRS or by the schedule."""
    before = bench.steps // 20
    state, _, _ = bench.advance(bench.start(seed), seed, np.full(before, bad * peak))

    def run_steps(state: State, rate: float, n: int) -> tuple[State, np.ndarray]:
        state, losses, _ = bench.advance(state, seed, np.full(n, rate))
        return state, losses

    search = optlab.AutoLRS(
        run_steps, BOUNDS, tau_min=bench.steps // 2, tau_max=bench.steps // 2,
        exploration=EXPLORATION, evaluate=bench.evaluate, seed=seed,
    )  # fmt: skip
    left = bench.steps - before
    scheduled, _, _ = bench.advance(state, seed, bench.rates("wsd", peak, left))
    ended, stages = search.run(state, left)
    return {
        "loss": bench.evaluate(ended),
        "loss_of_schedule": bench.evaluate(scheduled),
        "after_start": bench.evaluate(state),
        "rates": search.learning_rates,
        "ends": np.cumsum([before, *(stage.steps for stage in stages)]).tolist(),
    }


def budgets(bench: Bench) -> list[int]:
    return [round(bench.steps * share / bench.piece) * bench.piece for share in (0.4, 0.7, 1.0)]


def one_run(bench: Bench, seed: int, peak: float) -> dict[str, Any]:
    """Return the losses of WSD-S at every budget."""
    ends = budgets(bench)
    warmup = bench.config.warmup_steps
    schedule = optlab.wsd_s(peak, warmup, ends, decay_fraction=DECAY_FRACTION)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(bench.steps)))
    state, losses = bench.start(seed), []
    for begin, end in zip([0, *ends], ends, strict=False):
        state, _, _ = bench.advance(state, seed, rates[begin:end])
        losses.append(bench.evaluate(state))
    return {"losses": losses, "steps": ends[-1], "ends": ends}


def cosines(bench: Bench, seed: int, peak: float) -> dict[str, Any]:
    """Return the losses of a cosine run for every budget."""
    ends = budgets(bench)
    losses = [bench.train(seed, bench.rates("cosine", peak, end))["loss"] for end in ends]
    return {"losses": losses, "steps": sum(ends)}


def tune(
    bench: Bench, run: Callable[[int, float], dict[str, Any]], seeds: tuple[int, ...]
) -> float:
    """Return the best peak of the first seed, and see that every seed has a run with it."""
    peaks = [share * bench.rate for share in PEAKS]
    best = min(peaks, key=lambda peak: run(seeds[0], peak)["loss"])
    for seed in seeds:
        run(seed, best)
    return best


def scheduled(bench: Bench, kind: str, do: Do) -> Callable[[int, float], dict[str, Any]]:
    """Return `run(seed, peak)` with one of the race's schedules."""

    def run(seed: int, peak: float) -> dict[str, Any]:
        rates = bench.rates(kind, peak, bench.steps)
        return do(f"{bench.name}_{kind}/{seed}/{peak:g}", lambda: bench.train(seed, rates))

    return run


def refining(
    bench: Bench, name: str, first: Callable[[int], dict[str, Any]], do: Do
) -> Callable[[int, float], dict[str, Any]]:
    """Return `run(seed, peak)`, refined from the gradients' sizes in `first(seed)`."""

    def run(seed: int, peak: float) -> dict[str, Any]:
        sizes = first(seed)["sizes"]
        return do(f"{name}/{seed}/{peak:g}", lambda: refine(bench, seed, peak, sizes))

    return run


def refinement(bench: Bench, seeds: tuple[int, ...], do: Do) -> None:
    linear, constant = (scheduled(bench, kind, do) for kind in ("warmup_linear_decay", "constant"))
    peak = tune(bench, linear, seeds)
    tune(bench, refining(bench, "refined", lambda seed: linear(seed, peak), do), seeds)
    tune(bench, refining(bench, "refined_constant", lambda seed: constant(seed, peak), do), seeds)


def checkpoints(bench: Bench, seeds: tuple[int, ...], do: Do) -> None:
    of_wsd, of_cosine = (
        tune(bench, scheduled(bench, kind, do), seeds) for kind in ("wsd", "cosine")
    )
    for seed in seeds:
        do(f"wsd_s/{seed}", lambda seed=seed: one_run(bench, seed, of_wsd))
        do(f"cosines/{seed}", lambda seed=seed: cosines(bench, seed, of_cosine))


def search(bench: Bench, seeds: tuple[int, ...], do: Do) -> None:
    of_wsd = tune(bench, scheduled(bench, "wsd", do), seeds)
    for seed in seeds:
        for name, bad in BAD.items():
            do(f"autolrs/{seed}/{name}", lambda s=seed, b=bad: autolrs(bench, s, of_wsd, b))


def make_do(runs: Runs, save: Callable[[], None]) -> Do:
    """Return `do(key, run)`, which returns what is known or runs and keeps it."""

    def do(key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in runs:
            begin = time.perf_counter()
            runs[key] = run()
            shown = {k: v for k, v in runs[key].items() if k not in ("shapes", "sizes")}
            print(f"{key}: {shown} ({time.perf_counter() - begin:.0f} s)", flush=True)
            save()
        return runs[key]

    return do


def main(smoke: bool, folder: Path) -> None:
    text = data.read_text(None)
    changes = SMALL if smoke else {}
    configs = {part: new_config({**asked, **changes}, text) for part, asked in RUNS.items()}
    asked = {part: dataclasses.asdict(config) for part, config in configs.items()}
    about = json.loads(json.dumps({"configs": asked, "peaks": PEAKS, "bounds": BOUNDS}))
    about |= {"versions": report.versions()}
    store = folder / "controllers_runs.json"
    before = json.loads(store.read_text()) if store.exists() else {}
    runs: Runs = before["runs"] if before.get("about") == about else {}
    kept = lambda: json.dumps({"about": about, "runs": runs}) + "\n"  # noqa: E731
    do = make_do(runs, lambda: report.write_whole(store, kept()))
    for part, run in (("refinement", refinement), ("budgets", checkpoints), ("search", search)):
        run(Bench(configs[part], text), (0,) if smoke else SEEDS[part], do)
    rows = controllers_report.rows(runs)
    table.write(folder / "controllers", "Controllers beside tuned schedules",
                table.about(report.device()), rows, controllers_report.notes(runs))  # fmt: skip
    controllers_report.draw(runs, folder / "controllers.png")
    print(table.text(rows))


if __name__ == "__main__":
    if sys.argv[1:] == ["--smoke"]:
        with tempfile.TemporaryDirectory() as folder:
            main(True, Path(folder))
    elif sys.argv[1:]:
        sys.exit(f"benchmarks.controllers: takes --smoke or nothing, got {sys.argv[1:]}.")
    else:
        main(False, table.RESULTS)
