"""Coordinate check: does the size of activations depend on the width, after a few steps?"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optlab import _checks, _progress
from optlab.diagnostics import page

_NAME = "coordinate_check"


class CoordinateProblem(NamedTuple):
    """A model of one width, as `coordinate_check` trains it."""

    init: Callable[[jax.Array], Any]  # key -> params
    tx: optax.GradientTransformation
    loss: Callable[[Any, jax.Array], jax.Array]  # (params, step) -> scalar
    activations: Callable[[Any], Mapping[str, jax.Array]]  # params -> by name; of one fixed batch


class Coordinates(NamedTuple):
    """What `coordinate_check` found, by the name of the activation."""

    widths: tuple[int, ...]
    size: dict[str, np.ndarray]  # (widths, 1 + steps): mean |x| at init and after each step
    change: dict[str, np.ndarray]  # (widths, 1 + steps): mean |x - x_0|

    def slopes(self, of: str = "size") -> dict[str, float]:
        """Return the power of the width with which each grows, after the last step; 0 is flat.

        Args:
          of: "size" or "change". A change of nothing has no slope: NaN.
        """
        _checks.check_choice("slopes", "of", of, ("size", "change"))
        return {name: _slope(self.widths, x[:, -1]) for name, x in getattr(self, of).items()}


def _slope(widths: Sequence[int], values: np.ndarray) -> float:
    """Return the exponent of the power law fitted to positive values."""
    if not (values > 0).all() or not np.isfinite(values).all():
        return float("nan")
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def _run(problem: CoordinateProblem, steps: int) -> Callable[[jax.Array], tuple[Any, Any]]:
    """Return key -> mean |x| and mean |x - x_0| by name, (1 + steps,) each; one program."""
    tx = optax.with_extra_args_support(problem.tx)

    def measured(params, first):
        found = {k: x.astype(jnp.float32) for k, x in problem.activations(params).items()}
        first = found if first is None else first
        sizes = {k: jnp.mean(jnp.abs(x)) for k, x in found.items()}
        changes = {k: jnp.mean(jnp.abs(x - first[k])) for k, x in found.items()}
        return found, (sizes, changes)

    @jax.jit
    def run(key):
        params = problem.init(key)
        first, start = measured(params, None)

        def step(carry, t):
            params, state = carry
            grads = jax.grad(problem.loss)(params, t)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), measured(params, first)[1]

        _, later = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), start, later)

    return run


@_checks.explain_calls
def coordinate_check(
    make: Callable[[int], CoordinateProblem],
    widths: Sequence[int],
    *,
    steps: int = 4,
    seeds: int = 1,
    progress: bool = False,
) -> Coordinates:
    """Train models of several widths for a few steps and measure their activations.

    Of every activation x: mean |x|, at init and after every step, and mean |x - x_0|, how much it
    has moved. In the maximal update parametrization both depend on the width no more than by
    chance, apart from the readout at init, which may shrink; in the standard one activations grow
    with the width once training begins. Powers of the width: `.slopes()`; a picture:
    `draw_coordinates`.

    Args:
      make: width -> CoordinateProblem(init, tx, loss, activations). Its loss and activations should
        see the same data at every width.
      widths: at least two, each once.
      steps: of training, >= 1.
      seeds: keys 0, 1, ... whose measurements are averaged.
      progress: show a bar.

    Returns:
      Coordinates(widths, size, change), arrays of the host. One program is compiled per width.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from optlab.diagnostics.coordinate_check import CoordinateProblem, coordinate_check
      >>> x = jnp.ones((4, 3))
      >>> def make(width):
      ...     layer = lambda w: x @ w
      ...     return CoordinateProblem(
      ...         lambda key: jax.random.normal(key, (3, width)), optax.sgd(width * 0.1),
      ...         lambda w, step: jnp.mean(layer(w) ** 2), lambda w: {"layer": layer(w)})
      >>> found = coordinate_check(make, (16, 64), steps=2, seeds=4)
      >>> print(found.size["layer"].shape, abs(found.slopes()["layer"]) < 0.2)
      (2, 3) True

    References:
      Yang et al., Tensor Programs V, arXiv:2203.03466, 2022 (appendix D.1).
    """
    _checks.check_callable(_NAME, make=make)
    _checks.check_steps(_NAME, 1, steps=steps, seeds=seeds)
    if isinstance(widths, int) or len(set(widths)) < max(2, len(widths)):
        must = "two or more different widths"
        raise _checks.refusal(ValueError, _NAME, "widths", must, widths)
    found = []
    with _progress.bar(progress, _NAME, len(widths)):
        for width in widths:
            run = _run(make(width), steps)
            runs = [jax.device_get(run(jax.random.key(seed))) for seed in range(seeds)]
            found.append(jax.tree.map(lambda *x: np.mean(x, axis=0), *runs))
            _progress.tick(found[-1])
    size, change = jax.tree.map(lambda *x: np.stack(x), *found)
    return Coordinates(tuple(widths), size, change)


def draw_coordinates(runs: Mapping[str, Coordinates], path: Any, of: str = "change") -> None:
    """Draw the size of activations after the last step over the width, a panel per run.

    Args:
      runs: by their names, e.g. {"muP": ..., "standard": ...}; of the same activations.
      path: the file to write.
      of: "change" since init, or "size".
    """
    _checks.check_choice("draw_coordinates", "of", of, ("change", "size"))
    what = "change of an activation since init" if of == "change" else "size of an activation"
    says = f"Mean {what}, after the last step. Beside each name: the power of the width; 0 is flat."
    values = {name: getattr(run, of) for name, run in runs.items()}
    last = np.array([x[:, -1] for tree in values.values() for x in tree.values()])
    good = np.isfinite(last) & (last > 0)
    shown = last[good] if good.any() else np.ones(1)
    with page.page(path, "Coordinate check", says, (1,) * len(runs)) as axes:
        for ax, (name, run) in zip(np.atleast_1d(axes), runs.items(), strict=True):
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_ylim(shown.min() / 1.5, shown.max() * 1.5)
            _panel(ax, run, values[name], run.slopes(of))
            page.name_axes(ax, "width" if ax is np.atleast_1d(axes)[-1] else None, name)


def _panel(ax: Any, run: Coordinates, values: Mapping[str, np.ndarray], slopes: Any) -> None:
    """Draw one line per activation."""
    labels = []
    for (label, x), colour in zip(values.items(), itertools.cycle(page.COLOURS)):
        ax.plot(run.widths, x[:, -1], "o-", color=colour, linewidth=2, markersize=5)
        if np.isfinite(x[-1, -1]):
            labels.append((f"{label}  {slopes[label]:+.2f}", float(x[-1, -1]), colour))
    ax.set_xticks(run.widths, [str(width) for width in run.widths])
    page.beside(ax, labels)
