"""The numbers of a race: results.json, the summary, and the rows of every table."""

import dataclasses
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from optlab.lab import data
from optlab.lab.config import Config
from optlab.lab.train import Problem, Runner

REFERENCE = "adamw"
LIVE_HEADINGS = (
    "optimizer", "step", "train loss", "held-out loss", "tokens/s", "optimizer's share",
    "state bytes/param",
)  # fmt: skip
HEADINGS = (
    "optimizer", "learning rate", "held-out loss", "steps to AdamW's loss", "seconds to it",
    "tokens/s", "optimizer's share", "state bytes/param",
)  # fmt: skip
_PACKAGES = ("optlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    found = {name: metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found}


def device() -> str:
    """Return what computed, in words."""
    first = jax.devices()[0]
    if first.platform == "cpu":
        cores = cores_to_use()
        return f"{cores} CPU core{'s' * (cores > 1)}"
    return first.device_kind


def cores_to_use() -> int:
    """Return the processor cores this process may run on, which can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def millions(count: int) -> str:
    """Return 0.79M for 790000, and few as they are."""
    return f"{count:,}" if count < 100_000 else f"{count / 1e6:.2f}M"


def size_of(corpus: data.Corpus) -> str:
    """Return how much there is to train on."""
    return f"{millions(len(corpus.train))} {'bytes' if corpus.train.ndim == 1 else 'images'}"


def sizes(config: Config) -> str:
    """Return the sizes of the network that mean something to it."""
    more = () if config.work.without else (f"{config.heads} heads", f"context {config.context}")
    layers = f"{config.layers} layer{'s' * (config.layers > 1)}"
    return ", ".join((layers, f"width {config.width}", *more))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _fewer(steps: float | None, of: int) -> str:
    """Return the steps to the target, and how many fewer than all they are."""
    if steps is None:
        return "-"
    saved = f" ({1 - steps / of:.0%} fewer)" if steps < of else ""
    return f"{steps:.0f}{saved}"


def live_row(runner: Runner, steps: int) -> tuple[str, ...]:
    """Return the cells of one optimizer while it runs."""
    curve = runner.curve
    state = "diverged" if runner.diverged_at is not None else None
    return (
        runner.name,
        f"{runner.step}/{steps}",
        state or _number(curve.train[-1] if curve.train else None, ".4f"),
        state or _number(curve.held_out[-1] if curve.held_out else None, ".4f"),
        _number(runner.tokens_per_second, ",.0f"),
        _number(runner.optimizer_share, ".1%"),
        f"{runner.state_bytes:.2f}",
    )


def crossing(xs: list[float], losses: list[float], target: float) -> float | None:
    """Return where the curve first comes down to `target`, linear between evaluations."""
    for i, value in enumerate(losses):
        if value <= target:
            if i == 0:
                return xs[0]
            part = (losses[i - 1] - target) / (losses[i - 1] - value)
            return xs[i - 1] + part * (xs[i] - xs[i - 1])
    return None


def results(problem: Problem, runners: list[Runner]) -> dict[str, Any]:
    """Return all that results.json holds; `losses` repeats bit for bit, `timings` does not."""
    config = problem.config
    final = {r.name: r.curve.held_out[-1] for r in runners if r.diverged_at is None}
    target = final.get(REFERENCE)
    return {
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "versions": versions(),
        "device": device(),
        "text": data.describe(config),
        "text_bytes": problem.corpus.train.size,
        "parameters": problem.size,
        "losses": {r.name: _losses(r, final.get(r.name), target) for r in runners},
        "timings": {r.name: _timings(r, target) for r in runners},
    }


def _losses(runner: Runner, final: float | None, target: float | None) -> dict[str, Any]:
    steps, held_out = [float(step) for step in runner.curve.step], runner.curve.held_out
    return {
        "step": runner.curve.step,
        "train": runner.curve.train,
        "held_out": held_out,
        "final": final,
        "diverged_at": runner.diverged_at,
        "steps_to_adamw": None if target is None else crossing(steps, held_out, target),
        "state_bytes_per_parameter": runner.state_bytes,
    }


def _timings(runner: Runner, target: float | None) -> dict[str, Any]:
    seconds, held_out = runner.curve.seconds, runner.curve.held_out
    return {
        "seconds": seconds,
        "step_seconds": runner.seconds / runner.step,
        "tokens_per_second": runner.tokens_per_second,
        "optimizer_share": runner.optimizer_share,
        "compile_seconds": runner.compile_seconds,
        "seconds_to_adamw": None if target is None else crossing(seconds, held_out, target),
    }


def standing(results: dict[str, Any]) -> list[str]:
    """Return the names, the lowest final loss first and the diverged ones last."""
    finals = {name: losses["final"] for name, losses in results["losses"].items()}
    return sorted(finals, key=lambda name: (finals[name] is None, finals[name] or 0.0))


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the cells of the final table, the winner first."""
    table: list[tuple[str, ...]] = []
    for name in standing(results):
        losses, timings = results["losses"][name], results["timings"][name]
        diverged = losses["diverged_at"]
        table.append(
            (
                name,
                f"{results['config']['learning_rates'][name]:g}",
                f"{losses['final']:.4f}" if diverged is None else f"diverged at step {diverged}",
                _fewer(losses["steps_to_adamw"], results["config"]["steps"]),
                _number(timings["seconds_to_adamw"], ".1f"),
                _number(timings["tokens_per_second"], ",.0f"),
                _number(timings["optimizer_share"], ".1%"),
                f"{losses['state_bytes_per_parameter']:.2f}",
            )
        )
    return table


def markdown_table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def summary(results: dict[str, Any]) -> str:
    """Return summary.md."""
    config = Config.from_json(results["config"])
    work = config.work
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"""# Race on {results["text"]}

{work.network} of {millions(results["parameters"])} parameters ({sizes(config)}) trained for
{config.steps} steps of {config.batch_size} x {config.context} {work.token} with each optimizer: the
same initial weights, the same batches, the same `{config.schedule}` schedule. What is compared is
the {work.measure}.

{markdown_table(HEADINGS, rows(results))}

![Held-out loss against steps and seconds](curves.png)

Steps and seconds to AdamW's final loss are read off the curves, linear between
evaluations; seconds hold neither compilation nor evaluation. The optimizer's share is the time of
the update alone over the time of the whole step.

Preset {config.preset}, seed {results["seed"]}, on {results["device"]}. {used}.
"""


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, whenever, sees all of it or the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def write(results: dict[str, Any], out: Path) -> None:
    """Write results.json and summary.md."""
    text = json.dumps(results, indent=1, allow_nan=False)
    write_whole(out / "results.json", text + "\n")
    write_whole(out / "summary.md", summary(results))
