"""The picture of a race: what is held out, against steps and against seconds."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optlab.lab import report
from optlab.lab.config import Config

# Distinguishable with the common colour deficiencies and on a projector; AdamW is the dark one.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B5BA6", "#8C564B")
_REFERENCE, INK, FAINT, PALE = "#1A1A1A", "#333333", "#6B6B6B", "#D0D0D0"
MOST = 8  # curves that can be told apart; of more, so many of the best have colours and names


def colours(names: list[str]) -> dict[str, str]:
    """Return a colour for each optimizer to be named, the best first; the others are left out."""
    few = len(names) <= MOST
    others = [name for name in names if name != report.REFERENCE][: None if few else MOST - 2]
    found = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(others)}
    return {report.REFERENCE: _REFERENCE, **found}


def _limits(results: dict[str, Any]) -> tuple[float, float]:
    """Return the range of losses worth looking at: the first tenth of the run may leave it."""
    curves = [c["held_out"] for c in results["losses"].values() if c["held_out"]]
    low = min(min(curve) for curve in curves)
    late = [value for curve in curves for value in curve[len(curve) // 10 :]]
    best = min(max(curve[len(curve) // 10 :]) for curve in curves)
    high = min(max(late), low + 1.5 * max(best - low, 1e-3))
    high = max(high, low + 1e-3)  # a single evaluation has no extent
    room = 0.05 * (high - low)
    return low - room, high + room


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Push labels apart to at least `gap`, each as near as can be to where it is wanted.

    None is higher than `high`, nor lower than `low` while there is room for all.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [wanted[i] for i in order]
    for _ in range(200):
        for i in range(len(placed) - 1):
            lack = gap - (placed[i + 1] - placed[i])
            if lack > 0:
                placed[i] -= lack / 2
                placed[i + 1] += lack / 2
    placed = [max(y, low + i * gap) for i, y in enumerate(placed)]
    placed = [min(y, high - i * gap) for i, y in enumerate(reversed(placed))][::-1]
    spots = dict(zip(order, placed, strict=True))
    return [spots[i] for i in range(len(wanted))]


def style(axes: Axes, xlabel: str, limits: tuple[float, float]) -> None:
    """Give a panel its limits, faint horizontal lines and no frame."""
    axes.set_ylim(*limits)
    axes.set_xlabel(xlabel, color=INK, fontsize=12)
    axes.tick_params(colors=INK, labelsize=11, length=0)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#BBBBBB")


def _draw(axes: Axes, results: dict[str, Any], xs: dict[str, list[float]], crossed: dict) -> None:
    found = colours(report.standing(results))
    last = max(x[-1] for x in xs.values() if x)
    axes.set_xlim(0, last)
    labelled = []
    for name, x in xs.items():
        losses = results["losses"][name]["held_out"]
        if not losses:
            continue
        reference = name == report.REFERENCE
        if name not in found:
            axes.plot(x, losses, color=PALE, linewidth=0.9, zorder=1)
            continue
        axes.plot(
            x, losses, color=found[name], linewidth=2.2, solid_capstyle="round",
            linestyle=(0, (4, 1.6)) if reference else "-", zorder=3 if reference else 2,
        )  # fmt: skip
        labelled.append((name, x[-1], losses[-1]))
    _mark_target(axes, results, crossed, found, last)
    _label(axes, results, labelled, found, last)


def _mark_target(
    axes: Axes, results: dict[str, Any], crossed: dict, colours: dict, last: float
) -> None:
    """Draw AdamW's final loss and a dot where each other curve comes down to it."""
    target = results["losses"].get(report.REFERENCE, {}).get("final")
    if target is None:
        return
    axes.plot([0, last], [target, target], color=FAINT, linewidth=1, linestyle=":", zorder=1)
    axes.annotate(
        "AdamW's final loss", (0, target), xytext=(4, 4),
        textcoords="offset points", color=FAINT, fontsize=10.5,
    )  # fmt: skip
    for name, x in crossed.items():
        if x is not None and name != report.REFERENCE and name in colours:
            axes.plot(
                x, target, "o", color=colours[name], markersize=9,
                markeredgecolor="white", markeredgewidth=1.5, zorder=4,
            )  # fmt: skip


def _label(
    axes: Axes, results: dict[str, Any], labelled: list[tuple], colours: dict, last: float
) -> None:
    """Write each name and final loss beside the end of its curve."""
    low, high = axes.get_ylim()
    wanted = [min(y, high) for _, _, y in labelled]
    gap = 0.055 * (high - low)
    spots = spread(wanted, gap, low + gap / 2, high)
    for (name, x, y), spot in zip(labelled, spots, strict=True):
        final = results["losses"][name]["final"]
        text = f"{name}  {final:.3f}" if final is not None else f"{name}  diverged"
        if y <= high:
            axes.plot(x, y, "o", color=colours[name], markersize=4, zorder=4, clip_on=False)
        axes.annotate(
            text, (last, spot), xytext=(9, 0), textcoords="offset points", va="center",
            color=colours[name], fontsize=12, fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def draw(results: dict[str, Any]) -> Figure:
    """Return the picture of a race; whoever takes it closes it."""
    names = list(results["losses"])
    steps = {name: [float(s) for s in results["losses"][name]["step"]] for name in names}
    seconds = {name: results["timings"][name]["seconds"] for name in names}
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6.2), sharey=True)
    if any(steps.values()):
        limits = _limits(results)
        style(left, "training steps", limits)
        style(right, f"seconds of training on {results['device']}", limits)
        left.set_ylabel(_config(results).work.measure, color=INK, fontsize=12)
        _draw(left, results, steps, {n: results["losses"][n]["steps_to_adamw"] for n in names})
        _draw(
            right, results, seconds, {n: results["timings"][n]["seconds_to_adamw"] for n in names}
        )
    _title(figure, results)
    named = [name for name in colours(report.standing(results)) if name in names]
    # Room beside each panel for the longest label, which is about 0.085 in of width a letter.
    room = 0.02 + max(len(name) + 8 for name in named) * 0.1 / 14
    width = (1 - 0.055 - 2 * room) / 2
    left.set_position((0.055, 0.1, width, 0.74))
    right.set_position((0.055 + width + room, 0.1, width, 0.74))
    return figure


def write(results: dict[str, Any], path: Path) -> None:
    """Draw the race and save it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, beside = draw(results), path.with_name("curves.part.png")
    figure.savefig(beside, dpi=160)
    beside.replace(path)
    plt.close(figure)


def _config(results: dict[str, Any]) -> Config:
    return Config.from_json(results["config"])


def _title(figure: Figure, results: dict[str, Any]) -> None:
    config, names = _config(results), list(results["losses"])
    work, unnamed = config.work, len(names) - len(set(names) & set(colours(names)))
    figure.text(
        0.055, 0.935, work.does.format(text=results["text"]),
        fontsize=19, fontweight="bold", color=INK,
    )  # fmt: skip
    if unnamed:
        figure.text(
            0.985, 0.94, f"In colour: the best {MOST - 2} and AdamW. In grey: the other {unnamed}.",
            fontsize=12, color=INK, ha="right",
        )  # fmt: skip
    figure.text(
        0.055, 0.885,
        f"{work.network}, {report.millions(results['parameters'])} parameters: the same initial "
        f"weights, batches and schedule ({config.schedule}) for every optimizer, "
        f"{config.steps} steps of {config.tokens_per_step} {work.token}",
        fontsize=12, color=FAINT,
    )  # fmt: skip
