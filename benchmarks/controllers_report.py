"""What `benchmarks.controllers` found, as a table, a sentence and a picture."""

from pathlib import Path
from typing import Any

import numpy as np

from optlab.diagnostics import page

Runs = dict[str, dict[str, Any]]


def _best(runs: Runs, kind: str, seeds: tuple[int, ...]) -> tuple[str, list[dict[str, Any]]]:
    """Return the peak tuned on the first seed, and the runs of all seeds with it."""
    first = {key: run for key, run in runs.items() if key.startswith(f"{kind}/{seeds[0]}/")}
    peak = min(first, key=lambda key: first[key]["loss"]).split("/")[-1]
    return peak, _each(runs, kind, seeds, peak)


def _each(runs: Runs, kind: str, seeds: tuple[int, ...], *more: str) -> list[dict[str, Any]]:
    return [runs["/".join((kind, str(seed), *more))] for seed in seeds]


def _row(what: str, losses: Any, beside: Any, most: float) -> dict[str, Any]:
    """Return the losses of seeds and their mean ratio to others, which is to be at most `most`."""
    losses, beside = np.asarray(losses), np.asarray(beside)
    ratio = losses.mean() / beside.mean()
    return {
        "run": what,
        "held-out loss": float(losses.mean()),
        "least": float(losses.min()),
        "largest": float(losses.max()),
        "beside": float(beside.mean()),
        "ratio": float(ratio),
        "at most": most,
        "holds": "yes" if ratio <= most else "no",
    }


def rows(runs: Runs, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return a row for every comparison; the loss of what it is compared with is `beside`."""
    peak, linear = _best(runs, "muon_warmup_linear_decay", seeds)
    refined_peak, refined = _best(runs, "refined", seeds)
    base = [run["loss"] for run in linear]
    found = [
        _row(f"refined {times}, peak {refined_peak} (warmup_linear_decay, peak {peak})",
             [run["losses"][i] for run in refined], base, 1.0)
        for i, times in enumerate(("once", "twice"))
    ]  # fmt: skip
    tuned = [run["loss"] for run in _best(runs, "scion_wsd", seeds)[1]]
    for start in _starts(runs):
        of_start = _each(runs, "autolrs", seeds, start)
        losses, after = ([run[key] for run in of_start] for key in ("loss", "loss_of_schedule"))
        what = f"AutoLRS, first twentieth {start}"
        found.append(_row(f"{what} (tuned wsd)", losses, tuned, 1.05))
        found.append(_row(f"{what} (tuned wsd after it)", losses, after, 1.05))
    ours, cosine = (_each(runs, kind, seeds) for kind in ("wsd_s", "cosines"))
    for i, end in enumerate(ours[0]["ends"]):
        mine, theirs = ([run["losses"][i] for run in of] for of in (ours, cosine))
        found.append(_row(f"WSD-S at {end} (cosine of {end})", mine, theirs, 1.01))
    return found


def notes(runs: Runs, seeds: tuple[int, ...]) -> str:
    """Say how the refined schedules look, and what each side took."""
    _, shapes = _shapes(runs, seeds)
    steps = shapes.shape[-1]
    tops, starts = shapes.argmax(-1) / steps, shapes[..., 0]
    late = shapes[..., int(0.9 * steps)]
    ours, cosine = (runs[f"{kind}/{seeds[0]}"]["steps"] for kind in ("wsd_s", "cosines"))
    return (
        f"Nats a byte, mean, least and largest of {len(seeds)} seeds; beside: the mean of what is "
        "in brackets. The batches for refinement, and AutoLRS's optimizer, stages and starts, were "
        "chosen after others had done worse (benchmarks/controllers.py says which). The one "
        f"refined twice begins at {_range(starts)} of its peak, has it after {_range(tops)} of the "
        f"run and is at {_range(late)} when a tenth is left. AutoLRS searches as many steps as it "
        f"takes. WSD-S took {ours} steps a seed for its three checkpoints, cosine {cosine}."
    )


def _range(values: np.ndarray) -> str:
    low, high = (f"{x:.2f}" for x in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _shapes(runs: Runs, seeds: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the schedules refined once and twice of every seed, (seeds, steps) each."""
    shapes = np.array([run["shapes"] for run in _best(runs, "refined", seeds)[1]])
    return shapes[:, 0], shapes[:, 1]


def draw(runs: Runs, seeds: tuple[int, ...], path: Path) -> None:
    """Draw the refined schedules, and the rates that AutoLRS chose."""
    says = "Above: schedules from gradient norms, a line per seed. Below: rates AutoLRS chose."
    with page.page(path, "What the controllers did", says, (1, 1)) as (above, below):
        _draw_refined(above, runs, seeds)
        _draw_rates(below, runs, seeds)
        for ax in (above, below):
            ax.set_xlim(0, 1)
        page.name_axes(above, y="share of the peak")
        page.name_axes(below, "share of the run", "learning rate")
        _label(above, below, runs, seeds)


def _draw_refined(ax: Any, runs: Runs, seeds: tuple[int, ...]) -> None:
    for shapes, colour in zip(_shapes(runs, seeds), page.COLOURS, strict=False):
        for shape in shapes:
            ax.plot(
                np.arange(len(shape)) / len(shape), shape, color=colour, linewidth=1.6, alpha=0.8
            )
    ax.set_ylim(0, 1.05)


def _starts(runs: Runs) -> list[str]:
    return sorted({key.split("/")[2] for key in runs if key.startswith("autolrs/")})


def _draw_rates(ax: Any, runs: Runs, seeds: tuple[int, ...]) -> None:
    for start, colour in zip(_starts(runs), page.COLOURS[2:], strict=False):
        for run in _each(runs, "autolrs", seeds, start):
            ends = np.array(run["ends"]) / run["ends"][-1]
            ax.stairs(run["rates"], ends, baseline=None, color=colour, linewidth=1.8, alpha=0.8)
    page.log_axis(ax.yaxis)


def _label(above: Any, below: Any, runs: Runs, seeds: tuple[int, ...]) -> None:
    names = ("refined once", "refined twice")
    middles = [shapes[:, shapes.shape[1] // 2].mean() for shapes in _shapes(runs, seeds)]
    page.beside(above, list(zip(names, middles, page.COLOURS, strict=False)))
    starts = _starts(runs)
    ends = [runs[f"autolrs/{seeds[0]}/{start}"]["rates"][-1] for start in starts]
    page.beside(below, list(zip(starts, ends, page.COLOURS[2:], strict=False)))
