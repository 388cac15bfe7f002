"""The pictures of the page: curves with their spread, profiles, memory, shares, tuning."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from optlab.lab import figure, findings, score
from optlab.lab.figure import FAINT, INK, plt
from optlab.lab.workloads import WORKLOADS

_SMALL = 10.5
_PLOT = 2.8  # inches of a panel, without what stands above and below it
_CHARACTER = 0.085  # inches of a bold letter of that size


class Line(NamedTuple):
    """A curve: its middle and, of several seeds, the least and the largest."""

    x: np.ndarray
    middle: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _panels(count: int, labels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Return axes side by side with room for the longest label on the right of each."""
    room = 0.25 + _CHARACTER * max(map(len, labels), default=0)
    plot = plt.figure(figsize=(13, _PLOT + 1.1))
    left, gap = 0.75, 0.6
    width = (13 - left - count * room - (count - 1) * gap) / count
    axes = []
    for i in range(count):
        start = left + i * (width + room + gap)
        box = (start / 13, 0.62 / (_PLOT + 1.1), width / 13, _PLOT / (_PLOT + 1.1))
        axes.append(plot.add_axes(box))
    return plot, axes


def _name(axes: Axes, ends: Mapping[str, float], colours: Mapping[str, str]) -> None:
    """Write the names at the right edge, each as near to its height as the others allow."""
    low, high = axes.get_ylim()
    ends = dict(sorted(ends.items(), key=lambda end: end[1]))  # those off the panel as well
    wanted = [(min(max(y, low), high) - low) / (high - low) for y in ends.values()]
    gap = 0.19 / _PLOT
    for name, spot in zip(ends, figure.spread(wanted, gap, 0, 1 - gap / 2), strict=True):
        axes.annotate(
            name, (1, spot), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points",
            va="center", color=colours[name], fontsize=_SMALL, fontweight="bold",
            annotation_clip=False,
        )  # fmt: skip


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=12, fontweight="bold", color=INK)


def _tick_small(axes: Axes) -> None:
    axes.tick_params(labelsize=_SMALL)
    axes.set_xlabel(axes.get_xlabel(), fontsize=_SMALL)


def line(records: list[dict[str, Any]]) -> Line | None:
    """Return the median and the range of curves over seeds, up to where the first one diverged."""
    length = min(len(r["held_out"]) for r in records)
    if not length:
        return None
    values = np.array([r["held_out"][:length] for r in records])
    x = np.array(records[0]["step"][:length], float)
    return Line(x, np.median(values, 0), values.min(0), values.max(0))


def _limits(lines: Mapping[str, Line], goal: float) -> tuple[float, float]:
    """Return the range worth looking at: the first quarter of a run may leave it."""
    low = min(goal, *(float(found.low.min()) for found in lines.values()))
    late = [float(found.middle[len(found.middle) // 4 :].max()) for found in lines.values()]
    high = max(goal, float(np.median(late)))
    room = 0.06 * max(high - low, 1e-3)
    return low - room, high + room


def curves(study: dict[str, Any], names: list[str]) -> Figure:
    """Draw what is held out against steps, tuned, every workload on its own."""
    runs, colours = findings.group(study), figure.colours(names)
    shown = [name for name in names if name in colours]
    plot, panels = _panels(len(runs), shown)
    for axes, (workload, of) in zip(panels, runs.items(), strict=True):
        found = {name: line(of[name]["tuned"]) for name in names}
        lines = {name: of_name for name, of_name in found.items() if of_name is not None}
        goal = findings.target(study, workload)
        figure.style(axes, "steps", _limits(lines, goal) if lines else (0, 1))
        for name, each in lines.items():
            colour = colours.get(name, figure.PALE)
            axes.plot(each.x, each.middle, color=colour, linewidth=1.8 if name in colours else 0.8)
            if name in colours:
                axes.fill_between(each.x, each.low, each.high, color=colour, alpha=0.15, lw=0)
        axes.axhline(goal, color=FAINT, linewidth=1, linestyle=":")
        axes.annotate(
            "target", (0.02, goal), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", color=FAINT, fontsize=_SMALL,
        )  # fmt: skip
        _title(axes, f"{workload}: {WORKLOADS[workload].measure}")
        _tick_small(axes)
        axes.set_xlim(left=0)
        _name(axes, {n: lines[n].middle[-1] for n in shown if n in lines}, colours)
    return plot


def profiles(found: findings.Findings) -> Figure:
    """Draw the share of workloads that are done within tau times the best."""
    colours = figure.colours(found.names)
    shown = [name for name in found.names if name in colours]
    plot, panels = _panels(2, shown)
    at = np.linspace(1, score.WORST, 301)
    clocks = (("steps", found.steps), ("seconds of training", found.seconds))
    for axes, (clock, times) in zip(panels, clocks, strict=True):
        rho = score.profile(found.medians(times), at)
        figure.style(axes, "times the best (tau)", (-0.03, 1.03))
        for name, values in zip(found.names, rho, strict=True):
            colour = colours.get(name, figure.PALE)
            # Curves that lie on each other are told apart by their steps' heights and labels.
            axes.step(at, values, where="post", color=colour, linewidth=2, alpha=0.85)
        axes.set_xlim(1, score.WORST)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        _title(axes, f"Share of workloads done, by {clock}")
        _tick_small(axes)
        last = dict(zip(found.names, rho.mean(1), strict=True))
        _name(axes, {name: last[name] for name in shown}, colours)
    return plot


def scatter(panels: Mapping[str, Mapping[str, tuple[float, float]]], x: str) -> Figure:
    """Draw where every optimizer stands, {title: {name: (cost, result)}}."""
    names = list(dict.fromkeys(name for of in panels.values() for name in of))
    plot, all_axes = _panels(len(panels), names)
    for axes, (title, points) in zip(all_axes, panels.items(), strict=True):
        finite = {name: p for name, p in points.items() if np.isfinite(p).all()}
        colours = figure.colours(list(points))
        ys = [y for _, y in finite.values()] or [0.0, 1.0]
        # Who ends far above the others would squeeze them: it is drawn at the edge.
        high = min(max(ys), min(ys) + 4 * max(float(np.median(ys)) - min(ys), 1e-3))
        room = 0.1 * max(high - min(ys), 1e-3)
        figure.style(axes, x, (min(ys) - room, high + room))
        for name, (cost, y) in finite.items():
            colour, above = colours.get(name, figure.PALE), 3 if name in colours else 2
            axes.plot(cost, min(y, high + room / 2), "o", color=colour, ms=7, zorder=above)
        axes.set_xlim(left=0)
        axes.margins(x=0.08)
        _title(axes, title)
        _tick_small(axes)
        _name(axes, {name: y for name, (_, y) in finite.items() if name in colours}, colours)
    return plot


def bars(panels: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw the part of a step's time that the optimizer takes, {title: {name: part}}."""
    names = list(dict.fromkeys(name for of in panels.values() for name in of))
    height = 1.1 + 0.27 * len(names)
    plot, all_axes = plt.subplots(
        1, len(panels), figsize=(13, height), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, (title, parts) in zip(all_axes[0], panels.items(), strict=True):
        figure.style(axes, "part of the step's time", (len(names) - 0.4, -0.6))
        axes.grid(visible=False)
        values = [parts.get(name, np.nan) for name in names]
        axes.barh(range(len(names)), values, color="#9DB8CC", height=0.65)
        for i, part in enumerate(values):
            if np.isfinite(part):
                axes.text(part, i, f" {part:.1%}", va="center", fontsize=_SMALL, color=INK)
        axes.set_yticks(range(len(names)), names)
        axes.xaxis.set_major_formatter(lambda part, _: f"{100 * part:.3g}%")
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlim(0, 1.25 * np.nanmax([*values, 0.01]))
        _title(axes, title)
        _tick_small(axes)
    return plot


def tuning(study: dict[str, Any], names: list[str]) -> Figure:
    """Draw where each trial came against its rate, in parts of the recorded one."""
    runs, colours = findings.group(study), figure.colours(names)
    shown = [name for name in names if name in colours]
    plot, panels = _panels(len(runs), shown)
    for axes, (workload, of) in zip(panels, runs.items(), strict=True):
        ends, seen = {}, [findings.target(study, workload)]
        for name in shown:
            trials = sorted(of[name]["trial"], key=lambda r: r["choice"]["learning_rate"])
            first = of[name]["trial"][0]["choice"]["learning_rate"]
            x = [r["choice"]["learning_rate"] / first for r in trials]
            y = np.array(findings.ends(trials))
            axes.plot(x, np.where(np.isfinite(y), y, np.nan), "o-", color=colours[name], ms=4)
            if np.isfinite(y).any():
                ends[name] = float(y[np.isfinite(y)][-1])
                seen += [float(y.min()), float(np.median(y))]
        seen = [value for value in seen if np.isfinite(value)]
        room = 0.1 * max(max(seen) - min(seen), 1e-3)
        figure.style(
            axes, "rate, in parts of the recorded one", (min(seen) - room, max(seen) + room)
        )
        axes.axhline(seen[0], color=FAINT, linewidth=1, linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
        axes.minorticks_off()
        axes.set_xlim(0.1, 10)
        _title(axes, f"{workload}: held-out loss at the end")
        _tick_small(axes)
        _name(axes, ends, colours)
    return plot
