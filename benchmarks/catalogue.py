"""Does every recipe train a GPT? python -m benchmarks.catalogue [quick] [small]

Runs `optlab race --optimizers all` with these presets (both, if none is named), and writes
results/catalogue_PRESET.md, .json and .png: who ended where, beside what counting the same text
reaches. A model that learns only how frequent bytes are ends at the unigram's loss; one that learns
which byte follows which, at the bigram's. An interrupted race goes on where it was.
"""

import json
import shutil
import sys

import numpy as np

from benchmarks import table
from optlab.lab import data, optimizers, race, report
from optlab.lab.checkpoint import Checkpoints
from optlab.lab.config import Config

SYMBOLS = 256  # bytes
# What a preset is long enough to learn: the quick race reads 1 MiB, the small one 2.
MUST_BEAT = {"quick": "unigram", "small": "bigram"}


def counting_losses(train_bytes: np.ndarray, windows: np.ndarray) -> dict[str, float]:
    """Return nats a byte of counting models on held-out windows (n, context + 1).

    Every count begins at 1, so that nothing unseen is impossible. The first byte of a window is
    given, as it is to the GPT.
    """
    codes = train_bytes.astype(np.int64)
    singles = 1 + np.bincount(codes, minlength=SYMBOLS)
    pairs = 1 + np.bincount(SYMBOLS * codes[:-1] + codes[1:], minlength=SYMBOLS**2)
    pairs = pairs.reshape(SYMBOLS, SYMBOLS)
    before, after = windows[:, :-1], windows[:, 1:]
    return {
        "unigram": float(-np.log(singles / singles.sum())[after].mean()),
        "bigram": float(-np.log(pairs / pairs.sum(1, keepdims=True))[before, after].mean()),
    }


def row(name: str, results: dict, bound: float) -> dict:
    """Return what the table says of one optimizer."""
    losses, timings = results["losses"][name], results["timings"][name]
    finite = losses["diverged_at"] is None and np.isfinite(losses["train"]).all()
    return {
        "optimizer": name,
        "learning rate": results["config"]["learning_rates"][name],
        "held-out loss": losses["final"],
        "below the bound": "yes" if finite and losses["final"] < bound else "no",
        "steps to AdamW's loss": losses["steps_to_adamw"],
        "optimizer's share of the step": timings["optimizer_share"],
        "state bytes/param": losses["state_bytes_per_parameter"],
    }


def run(preset: str) -> None:
    """Run the race of everyone, or what is left of it, and write the table."""
    out = f"runs/race-all-{preset}"
    resume = Checkpoints(race.folder(out, preset)).exists()
    asked = {} if resume else {"preset": preset, "optimizers": optimizers.names()}
    folder = race.run(asked, out=out, resume=resume)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    bounds = bounds_of(Config.from_json(results["config"]))
    must_beat = MUST_BEAT[preset]
    rows = [row(name, results, bounds[must_beat]) for name in report.standing(results)]
    path = table.RESULTS / f"catalogue_{preset}"
    table.write(
        path, f"Every recipe in the {preset} race", table.about(results["device"], results["seed"]),
        rows, notes(results, bounds, must_beat),
    )  # fmt: skip
    shutil.copyfile(folder / "curves.png", path.with_suffix(".png"))
    print(table.text(rows))


def bounds_of(config: Config) -> dict[str, float]:
    """Return the counting models' losses on the race's text."""
    corpus = data.make_corpus(data.read_text(config.text), config)
    windows = np.asarray(corpus.held_out)
    return counting_losses(np.asarray(corpus.train), windows.reshape(-1, windows.shape[-1]))


def notes(results: dict, bounds: dict[str, float], must_beat: str) -> str:
    """Say what was trained, and what counting reaches."""
    config = results["config"]
    return (
        f"Nats a byte on {results['text']} held out. By counting: unigram {bounds['unigram']:.3f}, "
        f"bigram {bounds['bigram']:.3f}; the bound here is the {must_beat}'s. {config['steps']} "
        f"steps of {config['batch_size']} x {config['context']} bytes, {config['schedule']} "
        f"schedule, {results['parameters']} parameters. The rates are the recorded sweep's "
        "(lr_sweep.json), which has 500 steps of the quick race."
    )


if __name__ == "__main__":
    if unknown := [name for name in sys.argv[1:] if name not in MUST_BEAT]:
        sys.exit(f"benchmarks.catalogue: takes {', '.join(MUST_BEAT)}, got {unknown[0]!r}.")
    for preset in sys.argv[1:] or MUST_BEAT:
        run(preset)
