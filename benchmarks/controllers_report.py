"""What `benchmarks.controllers` found, as a table, a sentence and a picture."""

from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from optlab.diagnostics import page

Runs = dict[str, dict[str, Any]]
# Where the first gradient norms come from, by the kind of run that was refined from them.
REFINED = {"refined": "of linear decay", "refined_constant": "of a constant rate"}


def _each(runs: Runs, kind: str, *more: str) -> list[dict[str, Any]]:
    """Return the runs of a kind, seed by seed."""
    found = {key: run for key, run in runs.items() if _parts(key)[::2] == (kind, list(more))}
    return [found[key] for key in sorted(found, key=lambda key: _parts(key)[1])]


def _parts(key: str) -> tuple[str, int, list[str]]:
    kind, seed, *more = key.split("/")
    return kind, int(seed), more


def _best(runs: Runs, kind: str) -> tuple[str, list[dict[str, Any]]]:
    """Return the peak tuned on seed 0, and the runs of all seeds with it."""
    first = {key: run for key, run in runs.items() if key.startswith(f"{kind}/0/")}
    peak = min(first, key=lambda key: first[key]["loss"]).split("/")[-1]
    return peak, _each(runs, kind, peak)


def _row(what: str, losses: Any, beside: Any, most: float) -> dict[str, Any]:
    """Return the losses of seeds and their mean ratio to others, which is to be at most `most`."""
    losses, beside = np.asarray(losses), np.asarray(beside)
    ratio, differences = losses.mean() / beside.mean(), losses - beside
    return {
        "run": what,
        "seeds": len(losses),
        "held-out loss": float(losses.mean()),
        "least": float(losses.min()),
        "largest": float(losses.max()),
        "beside": float(beside.mean()),
        "ratio": float(ratio),
        "error": float(stats.sem(differences) / beside.mean()) if len(losses) > 1 else None,
        "at most": most,
        "holds": "yes" if ratio <= most else "no",
    }


def rows(runs: Runs) -> list[dict[str, Any]]:
    """Return a row for every comparison; the loss of what it is compared with is `beside`."""
    peak, linear = _best(runs, "muon_warmup_linear_decay")
    base = [run["loss"] for run in linear]
    found = []
    for kind, first in REFINED.items():
        refined_peak, refined = _best(runs, kind)
        found += [
            _row(f"refined {times}, norms {first}, peak {refined_peak} (linear decay, peak {peak})",
                 [run["losses"][i] for run in refined], base, 1.0)
            for i, times in enumerate(("once", "twice"))
        ]  # fmt: skip
    first = [run["loss"] for run in _best(runs, "refined")[1]][:3]
    found.insert(2, _row("refined twice, norms of linear decay, first three", first, base[:3], 1.0))
    tuned = [run["loss"] for run in _best(runs, "scion_wsd")[1]]
    for start in _starts(runs):
        of_start = _each(runs, "autolrs", start)
        losses, after = ([run[key] for run in of_start] for key in ("loss", "loss_of_schedule"))
        what = f"AutoLRS, first twentieth {start}"
        found.append(_row(f"{what} (tuned wsd)", losses, tuned, 1.05))
        found.append(_row(f"{what} (tuned wsd after it)", losses, after, 1.05))
    ours, cosine = (_each(runs, kind) for kind in ("wsd_s", "cosines"))
    for i, end in enumerate(ours[0]["ends"]):
        mine, theirs = ([run["losses"][i] for run in of] for of in (ours, cosine))
        found.append(_row(f"WSD-S at {end} (cosine of {end})", mine, theirs, 1.01))
    return found


def notes(runs: Runs) -> str:
    """Say how the refined schedules look, and what each side took."""
    _, shapes = _shapes(runs, "refined")
    steps = shapes.shape[-1]
    tops, starts = shapes.argmax(-1) / steps, shapes[..., 0]
    late = shapes[..., int(0.9 * steps)]
    ours, cosine = (runs[f"{kind}/0"]["steps"] for kind in ("wsd_s", "cosines"))
    return (
        "Nats a byte, mean, least and largest of the seeds; beside: the mean of what is in "
        "brackets; error: the ratio's standard error, from the seeds' differences. The batches for "
        "refinement, and AutoLRS's optimizer, stages and starts, were chosen after others had done "
        "worse (benchmarks/controllers.py says which). Refinement's first three seeds have a row "
        "of their own; the others were added as three could not tell. What is refined twice from "
        f"linear decay begins at {_range(starts)} of its peak, has it after {_range(tops)} of the "
        f"run and is at {_range(late)} when a tenth is left. AutoLRS searches as many steps as it "
        f"takes. WSD-S took {ours} steps a seed for its three checkpoints, cosine {cosine}."
    )


def _range(values: np.ndarray) -> str:
    low, high = (f"{x:.2f}" for x in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _shapes(runs: Runs, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the schedules refined once and twice of every seed, (seeds, steps) each."""
    shapes = np.array([run["shapes"] for run in _best(runs, kind)[1]])
    return shapes[:, 0], shapes[:, 1]


def draw(runs: Runs, path: Path) -> None:
    """Draw the refined schedules, and the rates that AutoLRS chose."""
    says = "Above: schedules from gradient norms, a line per seed. Below: rates AutoLRS chose."
    with page.page(path, "What the controllers did", says, (1, 1)) as (above, below):
        named = _draw_refined(above, runs)
        _draw_rates(below, runs)
        for ax in (above, below):
            ax.set_xlim(0, 1)
        page.name_axes(above, y="share of the peak")
        page.name_axes(below, "share of the run", "learning rate")
        page.beside(above, named)
        starts = _starts(runs)
        ends = [runs[f"autolrs/0/{start}"]["rates"][-1] for start in starts]
        page.beside(below, list(zip(starts, ends, page.COLOURS[2:], strict=False)))


def _draw_refined(ax: Any, runs: Runs) -> list[tuple[str, float, str]]:
    """Draw what was refined; return names, heights and colours for the right edge."""
    once, twice = _shapes(runs, "refined")
    of_constant, _ = _shapes(runs, "refined_constant")
    groups = {"of a constant rate": of_constant, "refined once": once, "refined twice": twice}
    colours = page.COLOURS[4], *page.COLOURS[:2]
    for shapes, colour in zip(groups.values(), colours, strict=True):
        for shape in shapes:
            ax.plot(np.arange(len(shape)) / len(shape), shape, color=colour, linewidth=1, alpha=0.5)
    ax.set_ylim(0, 1.05)
    middles = [shapes[:, shapes.shape[1] // 2].mean() for shapes in groups.values()]
    return list(zip(groups, middles, colours, strict=True))


def _starts(runs: Runs) -> list[str]:
    return sorted({key.split("/")[2] for key in runs if key.startswith("autolrs/")})


def _draw_rates(ax: Any, runs: Runs) -> None:
    for start, colour in zip(_starts(runs), page.COLOURS[2:], strict=False):
        for run in _each(runs, "autolrs", start):
            ends = np.array(run["ends"]) / run["ends"][-1]
            ax.stairs(run["rates"], ends, baseline=None, color=colour, linewidth=1.8, alpha=0.8)
    page.log_axis(ax.yaxis)
