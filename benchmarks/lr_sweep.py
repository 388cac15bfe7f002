"""Find the race's default learning rates: python -m benchmarks.lr_sweep [NAME ...]

Each optimizer trains the quick race's model on the quick race's text with the rates 1, 3, 10, 30,
... x 10^-k around a first guess, walking downhill until the best rate has a worse one on both
sides. The losses go to benchmarks/results/lr_sweep.json; what is there already is kept, so a
sweep can be stopped and gone on with. The best rates, printed at the end, are the table of
optlab/lab/rates.py, and a test holds the two together.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from optlab.lab import data, optimizers, report, train
from optlab.lab.race import new_config

RESULTS = Path(__file__).parent / "results" / "lr_sweep.json"
STEPS = 500
NOT_OF_THE_SWEEP = ("optimizers", "learning_rates", "rounds", "workload")
# Exponents e of the rate 10^(e/2), rounded to 1 or 3 in its first digit; 0 where not named.
FIRST_GUESS = {
    "adamw": -5, "sgd": -1, "lion": -7, "lion_k": -7, "signum": -6, "adamp": -5, "sgdp": -1,
    "nap": -5, "diffgrad": -5, "adabelief": -5, "lamb": -4, "lars": 2, "sgd_sai": 0,
    "muon": -3, "normuon": -5, "lanton": -4, "scion": -7, "galore": -3, "q_galore": -3, "fira": -4,
    "frugal": -5, "apollo": -4, "conda": -4, "ldadam": -5, "grad_norm_lorp": -3,
    "spam": -5, "stable_spam": -5, "sophia": -7,
}  # fmt: skip
LEAST, MOST = -12, 8
# Of one seed this is nothing, and the larger of two such rates is too large for a wider model:
# GaLore at 0.03 and 0.01 ends alike here, at 1.63 and 1.49 on the small preset.
NOISE = 0.002


def rate(exponent: int) -> float:
    """Return 1e-3 for -6, 3e-3 for -5, 1e-2 for -4."""
    whole, half = divmod(exponent, 2)
    return float(f"{3 if half else 1}e{whole}")


def make_trial(name: str, problem: train.Problem) -> Callable[[float], float | None]:
    """Return rate -> held-out loss after training, None where it diverged; compiled once."""
    config = problem.config
    unit = optimizers.SCHEDULES[config.schedule](1.0, config.warmup_steps, config.steps)

    def transform(peak):
        return optimizers.make(name, lambda step: peak * unit(step))

    @jax.jit
    def run(params, corpus, peak):
        tx = transform(peak)
        chunk = train.make_chunk(problem.structure, tx, config, config.steps)
        params, _, losses = chunk(params, tx.init(params), corpus, np.int32(0))
        return params, losses

    def trial(peak: float) -> float | None:
        params, losses = run(problem.params, problem.corpus.train, np.float32(peak))
        loss = problem.evaluate(params)
        return loss if np.isfinite([*losses, loss]).all() else None

    return trial


def downhill(guess: int, loss: Callable[[int], float]) -> None:
    """Call `loss` until the best exponent lies between two worse ones."""
    best = guess
    while True:
        near = [e for e in (best - 1, best, best + 1) if LEAST <= e <= MOST]
        lowest = min(near, key=lambda e: (loss(e), e))
        if lowest == best:
            return
        best = lowest


def sweep(name: str, problem: train.Problem, known: dict[str, float | None]) -> None:
    """Fill `known`, rate to loss, with what it takes to find the best rate of one optimizer."""
    trial = make_trial(name, problem)

    def loss(exponent: int) -> float:
        key = f"{rate(exponent):g}"
        if key not in known:
            begin = time.perf_counter()
            known[key] = trial(float(key))
            print(f"{name} {key}: {known[key]} ({time.perf_counter() - begin:.0f} s)", flush=True)
        found = known[key]
        return math.inf if found is None else found

    downhill(FIRST_GUESS.get(name, 0), loss)


def best_rates(losses: dict[str, dict[str, float | None]]) -> dict[str, float]:
    """Return the lowest rate of each optimizer whose loss is within `NOISE` of its best."""
    found = {}
    for name, known in losses.items():
        finite = {float(rate): loss for rate, loss in known.items() if loss is not None}
        most = (1 + NOISE) * min(finite.values())
        found[name] = min(rate for rate, loss in finite.items() if loss <= most)
    return found


def main(names: tuple[str, ...]) -> None:
    text = data.read_text(None)
    config = new_config({"steps": STEPS, "optimizers": ("adamw",)}, text)
    about = {k: v for k, v in dataclasses.asdict(config).items() if k not in NOT_OF_THE_SWEEP}
    found = {"config": about, "versions": report.versions(), "device": report.device()}
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    same = all(before.get(key) == found[key] for key in found)
    losses = before["losses"] if same else {}
    problem = train.make_problem(config, text)
    for name in names or optimizers.names():
        sweep(name, problem, losses.setdefault(name, {}))
        losses[name] = dict(sorted(losses[name].items(), key=lambda item: float(item[0])))
        found["losses"] = dict(sorted(losses.items()))
        report.write_whole(RESULTS, json.dumps(found, indent=1, allow_nan=False) + "\n")
    for name, best in best_rates(losses).items():
        print(f'    "{name}": {best:g},')


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
