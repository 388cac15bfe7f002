"""The page that the pictures of the diagnostics are drawn on: its style, and how it is saved."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Distinguishable with the common colour deficiencies and on a projector, as in the race's picture.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7B5BA6", "#8C564B")
INK, FAINT, GRID = "#333333", "#6B6B6B", "#E6E6E6"
LEFT, RIGHT, BOTTOM, TOP = 0.09, 0.8, 0.11, 0.82


@contextlib.contextmanager
def page(path: Any, title: str, says: str, panels: tuple[int, ...] = (1,)) -> Iterator[Any]:
    """Yield axes below each other, of these relative heights, and save the page at the end.

    `says` is a sentence under the title: how to read the picture.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('picture: needs matplotlib. pip install "optlab[diagnostics]"') from None
    # Not the user's layout; that "none" is one is missing in matplotlib's annotation.
    figure = Figure(figsize=(11, 6.6), layout="none")  # type: ignore[bad-argument-type]
    FigureCanvasAgg(figure)
    edges = {"left": LEFT, "right": RIGHT, "bottom": BOTTOM, "top": TOP, "hspace": 0.16}
    grid = figure.add_gridspec(len(panels), 1, height_ratios=panels, **edges)
    axes = [figure.add_subplot(grid[i]) for i in range(len(panels))]
    figure.text(LEFT, 0.925, title, fontsize=18, fontweight="bold", color=INK)
    figure.text(LEFT, 0.873, says, fontsize=11.5, color=FAINT)
    for ax in axes:
        _style(ax)
    for ax in axes[:-1]:
        ax.tick_params(labelbottom=False)
    yield axes if len(axes) > 1 else axes[0]
    figure.align_ylabels(axes)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _style(ax: Any) -> None:
    ax.tick_params(which="both", colors=INK, labelsize=10.5, length=0)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color("#BBBBBB")


def name_axes(ax: Any, x: str | None = None, y: str | None = None) -> None:
    """Say what the axes are."""
    if x:
        ax.set_xlabel(x, color=INK, fontsize=11.5)
    if y:
        ax.set_ylabel(y, color=INK, fontsize=11.5)


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Push heights apart to at least `gap`, each as near as can be to where it is wanted."""
    order = np.argsort(wanted, kind="stable")
    spots = np.asarray(wanted, float)[order]
    for _ in range(200):
        lack = np.maximum(gap - np.diff(spots), 0) / 2
        spots[:-1] -= lack
        spots[1:] += lack
    return list(spots[np.argsort(order, kind="stable")])


def beside(ax: Any, labels: Sequence[tuple[str, float, str]]) -> None:
    """Write labels (text, height in data, colour) at the right edge, none over another."""
    if not labels:
        return
    to_axes = ax.transData + ax.transAxes.inverted()
    x = ax.get_xlim()[1]
    heights = [float(np.clip(to_axes.transform((x, y))[1], 0, 1)) for _, y, _ in labels]
    inches = ax.get_position().height * ax.figure.get_figheight()
    spots = _apart(heights, 0.2 / inches)
    for (text, _, colour), spot in zip(labels, spots, strict=True):
        ax.annotate(
            text, (1, spot), xycoords="axes fraction", xytext=(8, 0), textcoords="offset points",
            va="center", color=colour, fontsize=11, fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def log_axis(axis: Any) -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2, 5 or, where it is long, at 1 only."""
    from matplotlib import ticker

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    decades = np.log10(high / low) if low > 0 else 1
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    short = lambda x, _: f"{x:,.10g}" if x < 1e6 else f"{x / 1e6:,g} M"  # noqa: E731
    axis.set_major_formatter(ticker.FuncFormatter(short))
    axis.set_minor_locator(ticker.NullLocator())


def last_finite(values: Any) -> float | None:
    """Return the last entry that is finite."""
    finite = np.asarray(values, float)
    finite = finite[np.isfinite(finite)]
    return float(finite[-1]) if finite.size else None


def steps_axis(ax: Any, histories: Mapping[str, Any]) -> None:
    """Let the axis of steps begin at 0 and end with the longest history."""
    last = max((max(h["step"]) for h in histories.values() if len(h["step"])), default=1)
    ax.set_xlim(0, last or 1)


def note(ax: Any, text: str, at: tuple[float, float], off: tuple[int, int], side: str) -> None:
    """Write beside a point, `off` by so many points."""
    ax.annotate(
        text, at, xytext=off, textcoords="offset points", ha=side, color=INK, fontsize=11,
        fontweight="bold", annotation_clip=False, bbox={"color": "white", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
