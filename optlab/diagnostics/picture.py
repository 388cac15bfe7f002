"""One-page pictures of the diagnostics, in one style; written as files, nothing is shown.

Histories are mappings from names to lists, one entry per measurement: {"step": [0, 10], ...}.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from optlab import layout as _layout
from optlab.diagnostics import page
from optlab.diagnostics.batch_size import CriticalBatch
from optlab.diagnostics.noise_scale import Gsnr
from optlab.diagnostics.sensitivity import lr_sensitivity
from optlab.diagnostics.sharpness import Trace
from optlab.linalg.lanczos import Ritz

_MOST_LEAVES = 24
History = Mapping[str, Any]


def draw_sharpness(histories: Mapping[str, History], path: Any) -> None:
    """Draw the sharpness of runs over their steps, and the limits at which they turn unstable.

    Args:
      histories: by the name of the run: `step`, `sharpness`; if there, `loss`,
        `critical_sharpness`, and `limit`, a number or a list: `stability_limit(learning_rate)`.
      path: the file to write.

    """
    with_loss = any("loss" in h for h in histories.values())
    says = "Solid: the Hessian's largest eigenvalue. Dashed: where gradient descent turns unstable."
    if any("critical_sharpness" in h for h in histories.values()):
        says += " Dotted: critical sharpness."
    heights = (2, 3) if with_loss else (1,)
    with page.page(path, "Sharpness and the edge of stability", says, heights) as axes:
        loss_ax, ax = axes if with_loss else (None, axes)
        labels = []
        for (name, h), colour in zip(histories.items(), itertools.cycle(page.COLOURS)):
            if loss_ax is not None and "loss" in h:
                loss_ax.plot(h["step"], h["loss"], color=colour, linewidth=1.6)
            ax.plot(h["step"], h["sharpness"], color=colour, linewidth=2)
            if "critical_sharpness" in h:
                ax.plot(h["step"], h["critical_sharpness"], ":", color=colour, linewidth=1.6)
            if "limit" in h:
                limit = np.broadcast_to(np.asarray(h["limit"], float), len(h["step"]))
                ax.plot(h["step"], limit, color=colour, linewidth=1.2, linestyle=(0, (5, 3)))
            labels.append((name, page.last_finite(h["sharpness"]) or 0.0, colour))
        for each in (a for a in (loss_ax, ax) if a is not None):
            page.steps_axis(each, histories)
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        page.name_axes(ax, "step", "sharpness")
        if loss_ax is not None:
            page.log_axis(loss_ax.yaxis)
            page.name_axes(loss_ax, y="loss")
        page.beside(ax, labels)


def draw_spectrum(found: Ritz, path: Any) -> None:
    """Draw the Ritz values of a Hessian and their weights.

    Args:
      found: of `hessian_spectrum`.
      path: the file to write.
    """
    values, weights = (np.asarray(x, float) for x in (found.values, found.weights))
    kept = weights > 1e-12
    says = "Ritz values of Lanczos; a stem's height is the share of the spectrum it stands for."
    with page.page(path, "Spectrum of the Hessian", says) as ax:
        low = max(weights[kept].min() / 3, 1e-12)
        ax.vlines(values[kept], low, weights[kept], color=page.COLOURS[0], linewidth=1.5)
        ax.plot(values[kept], weights[kept], "o", color=page.COLOURS[0], markersize=6)
        page.log_axis(ax.yaxis)
        ax.set_ylim(low, 2)
        ax.axvline(0, color=page.FAINT, linewidth=1, linestyle=":")
        page.name_axes(ax, "eigenvalue", "share of the spectrum")
        top = int(np.argmax(np.where(kept, values, -np.inf)))
        page.beside(ax, [(f"sharpness {values[top]:.4g}", weights[top], page.COLOURS[0])])


def draw_trace(found: Trace, path: Any) -> None:
    """Draw the estimate of the trace over its samples, with its standard error.

    Args:
      found: of `hessian_trace`.
      path: the file to write.
    """
    samples = np.asarray(found.samples, float)
    count = np.arange(1, samples.size + 1)
    mean = np.cumsum(samples) / count
    spread = np.sqrt(
        np.maximum(np.cumsum(samples**2) / count - mean**2, 0) / np.maximum(count - 1, 1)
    )
    says = "Line: mean of the first samples. Band: one standard error. Dots: single samples."
    if not float(found.error):
        says = "Exact: the sum of the diagonal entries, largest first."
        samples, mean = np.sort(samples)[::-1], np.cumsum(np.sort(samples)[::-1])
    with page.page(path, "Trace of the Hessian", says) as ax:
        ax.plot(count, samples, "o", color=page.COLOURS[5], markersize=4, alpha=0.6)
        if float(found.error):
            ax.fill_between(
                count[1:],
                (mean - spread)[1:],
                (mean + spread)[1:],
                color=page.COLOURS[0],
                alpha=0.18,
                linewidth=0,
            )
        ax.plot(count, mean, color=page.COLOURS[0], linewidth=2.2)
        ax.set_xlim(0, samples.size + 1)
        page.name_axes(ax, "Hessian-vector products", "trace")
        error = f" ± {float(found.error):.2g}" if float(found.error) else ""
        page.beside(ax, [(f"{float(found.value):.4g}{error}", float(mean[-1]), page.COLOURS[0])])


def draw_noise_scale(histories: Mapping[str, History], path: Any) -> None:
    """Draw the gradient noise scale of runs over their steps.

    Args:
      histories: by the name of the run: `step`, `noise_scale`; if there, `batch_size`, a number or
        a list. What is NaN, an estimate not yet positive, is left out.
      path: the file to write.
    """
    says = "In examples: batches well below the line still save steps. Dashed: the batch in use."
    with page.page(path, "Gradient noise scale", says) as ax:
        labels = []
        for (name, h), colour in zip(histories.items(), itertools.cycle(page.COLOURS)):
            ax.plot(h["step"], h["noise_scale"], color=colour, linewidth=2)
            if "batch_size" in h:
                size = np.broadcast_to(np.asarray(h["batch_size"], float), len(h["step"]))
                ax.plot(h["step"], size, color=colour, linewidth=1.2, linestyle=(0, (5, 3)))
            last = page.last_finite(h["noise_scale"])
            if last is not None:
                labels.append((name, last, colour))
        page.log_axis(ax.yaxis)
        page.steps_axis(ax, histories)
        page.name_axes(ax, "step", "examples")
        page.beside(ax, labels)


def draw_gsnr(found: Gsnr, path: Any) -> None:
    """Draw how the signal-to-noise ratio spreads over the coordinates of every leaf.

    Args:
      found: of `gsnr`. Of more than 24 leaves the largest are drawn. A leaf whose median is 0, as
        an embedding's of which most rows had no gradient, has a line from the left and no dot.
      path: the file to write.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(found.coordinates)
    largest = sorted(flat, key=lambda item: -item[1].size)[:_MOST_LEAVES]
    shown = [item for item in flat if any(item is other for other in largest)]
    says = "Dot: median over a leaf's coordinates. Thick: half of them. Thin: 80 %."
    with page.page(path, "Gradient signal-to-noise ratio", says) as ax:
        for row, (_, x) in enumerate(reversed(shown)):
            ratios = np.asarray(x, float).ravel()
            parts = (0.1, 0.25, 0.5, 0.75, 0.9)
            # The nearest entry: between two infinite ones there is nothing to interpolate.
            low, first, mid, third, high = np.quantile(ratios, parts, method="nearest")
            ax.plot((low, high), (row, row), color=page.COLOURS[5], linewidth=1.5)
            ax.plot((first, third), (row, row), color=page.COLOURS[0], linewidth=5, alpha=0.5)
            ax.plot(mid, row, "o", color=page.COLOURS[0], markersize=7)
        names = [_layout.path_str(key_path) for key_path, _ in reversed(shown)]
        ax.set_yticks(range(len(shown)), names)
        page.log_axis(ax.xaxis)
        ax.grid(axis="x", color=page.GRID, linewidth=0.8)
        ax.set_ylim(-0.6, len(shown) - 0.4)
        ax.set_position((0.26, page.BOTTOM, 0.68, page.TOP - page.BOTTOM))
        page.name_axes(ax, f"mean² / variance of the gradient (mean {float(found.mean):.3g})")


def draw_critical_batch(batch_sizes: Any, steps: Any, found: CriticalBatch, path: Any) -> None:
    """Draw steps against examples of the runs, the fitted curve, and the critical batch size.

    Args:
      batch_sizes: as given to `critical_batch`.
      steps: as given to it; runs that did not reach the target are left out.
      found: what it returned.
      path: the file to write.
    """
    sizes = np.asarray(batch_sizes, float)
    taken = np.asarray([np.nan if s is None else s for s in steps], float)
    says = "Dots: runs to the same loss, with their batch sizes. Line: the fit. Dashed: its minima."
    with page.page(path, "Critical batch size", says) as ax:
        curve = np.geomspace(sizes.min() / 2, sizes.max() * 2, 200)
        ax.plot(found.steps(curve), found.examples(curve), color=page.COLOURS[0], linewidth=2)
        ax.plot(taken, sizes * taken, "o", color=page.INK, markersize=7, zorder=3)
        for size, s in zip(sizes, taken, strict=True):
            if np.isfinite(s):
                page.note(ax, f"{size:g}", (s, size * s), (8, 6), "left")
        ax.axvline(found.min_steps, color=page.FAINT, linewidth=1.2, linestyle=(0, (5, 3)))
        ax.axhline(found.min_examples, color=page.FAINT, linewidth=1.2, linestyle=(0, (5, 3)))
        page.log_axis(ax.xaxis)
        page.log_axis(ax.yaxis)
        page.name_axes(ax, "steps to the target", "examples to the target")
        if np.isfinite(found.size) and found.size > 0:
            at = (float(found.steps(found.size)), float(found.examples(found.size)))
            ax.plot(*at, "D", color=page.COLOURS[1], markersize=10, zorder=4)
            page.beside(ax, [(f"critical batch {found.size:.4g}", at[1], page.COLOURS[1])])


def draw_lr_sensitivity(runs: Mapping[str, tuple[Any, Any]], init_loss: float, path: Any) -> None:
    """Draw final losses over learning rates, with each method's sensitivity.

    Args:
      runs: by the name of the method: learning rates and final losses, as for `lr_sensitivity`.
      init_loss: the loss at initialization, where runs that diverged are drawn.
      path: the file to write.
    """
    says = "Beside each name: its mean loss above its best one. Ring: best rate. Cross: diverged."
    with page.page(path, "Learning rate sensitivity", says) as ax:
        labels = []
        for (name, (rates, losses)), colour in zip(runs.items(), itertools.cycle(page.COLOURS)):
            found = lr_sensitivity(rates, losses, init_loss)
            raw = np.asarray([np.nan if x is None else x for x in losses], float)
            ended = np.isfinite(raw)
            drawn = np.where(ended, np.minimum(np.where(ended, raw, 0), init_loss), init_loss)
            rates = np.asarray(rates, float)
            ax.plot(rates, drawn, color=colour, linewidth=2)
            ax.plot(rates[ended], drawn[ended], "o", color=colour, markersize=5)
            ax.plot(
                rates[~ended], drawn[~ended], "x", color=colour, markersize=9, markeredgewidth=2
            )
            ax.plot(
                found.learning_rate, found.loss, "o", markersize=13, markerfacecolor="none",
                markeredgecolor=colour, markeredgewidth=2,
            )  # fmt: skip
            labels.append((f"{name}  {found.value:.3f}", float(drawn[-1]), colour))
        ax.axhline(init_loss, color=page.FAINT, linewidth=1.2, linestyle=":")
        page.log_axis(ax.xaxis)
        page.name_axes(ax, "learning rate", "final loss")
        page.beside(ax, labels)


def draw_logit_sharpness(histories: Mapping[str, History], path: Any) -> None:
    """Draw the logit sharpness of runs over their steps, with its spread over examples.

    Args:
      histories: by the name of the run: `step`, and `logit_sharpness`, a number or an array of
        examples per step.
      path: the file to write.
    """
    says = "Line: median over examples. Band: the middle 80 % of them."
    with page.page(path, "Logit sharpness", says) as ax:
        labels = []
        for (name, h), colour in zip(histories.items(), itertools.cycle(page.COLOURS)):
            values = np.asarray(h["logit_sharpness"], float).reshape(len(h["step"]), -1)
            low, mid, high = np.quantile(values, (0.1, 0.5, 0.9), axis=1)
            ax.fill_between(h["step"], low, high, color=colour, alpha=0.15, linewidth=0)
            ax.plot(h["step"], mid, color=colour, linewidth=2)
            labels.append((name, float(mid[-1]), colour))
        ax.set_ylim(bottom=0)
        page.steps_axis(ax, histories)
        page.name_axes(ax, "step", "growth of the cross-entropy, %")
        page.beside(ax, labels)
