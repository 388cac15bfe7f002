"""Noise of gradients against their size: which batch a run can use."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab.linalg.norms import safe_divide, sum_of_squares


class NoiseScale(NamedTuple):
    """What gradients of two batch sizes tell of the noise."""

    gradient_sq: jax.Array  # estimate of |G|^2 of the true gradient; unbiased, can be negative
    trace: jax.Array  # estimate of tr(Sigma), the variance of one example's gradient
    scale: jax.Array  # trace / gradient_sq in examples; NaN where either is not positive


class NoiseScaleState(NamedTuple):
    """State of `noise_scale_tracker`."""

    count: jax.Array  # int32, (): measurements seen
    gradient_sq: jax.Array  # float32, (): their average, starting at 0
    trace: jax.Array  # float32, (): as well

    def metrics(self) -> dict[str, jax.Array]:
        """Return the ratio of the averages, whose bias towards the start cancels; NaN at first."""
        return {"noise_scale": _ratio(self.trace, self.gradient_sq)}


class NoiseScaleTracker(NamedTuple):
    """Pure functions of `noise_scale_tracker`."""

    init: Callable[[], NoiseScaleState]
    update: Callable[[NoiseScaleState, ArrayLike, ArrayLike], NoiseScaleState]


class Gsnr(NamedTuple):
    """What `gsnr` found."""

    coordinates: Any  # a tree like one gradient: mean^2 / variance
    mean: jax.Array  # float32, (): over all coordinates
    batch: jax.Array  # float32, (): |mean|^2 / (sum of variances / B), of the whole batch


def _ratio(trace: jax.Array, gradient_sq: jax.Array) -> jax.Array:
    known = (trace > 0) & (gradient_sq > 0)
    return jnp.where(known, trace / jnp.where(known, gradient_sq, 1), jnp.nan)


def _check_sizes(name: str, b_small: Any, b_big: Any) -> None:
    _checks.check_positive(name, b_small=b_small, b_big=b_big)
    if not b_small < b_big:
        raise _checks.refusal(ValueError, name, "b_big", f"above b_small={b_small!r}", b_big)


@_checks.explain_calls
def gradient_noise_scale(
    small: ArrayLike, big: ArrayLike, *, b_small: float, b_big: float
) -> NoiseScale:
    """Estimate the simple noise scale from gradient norms of two batch sizes b < B.

    |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b),  tr = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)
    scale = tr / |G|^2: batches well below it lose nothing, batches well above it gain nothing.
    One measurement is noisy: average `gradient_sq` and `trace`, never the ratio; that is
    `noise_scale_tracker`.

    Args:
      small: |g_b|^2, the squared norm of a gradient of `b_small` examples, or the mean of several.
      big: |g_B|^2 of `b_big` examples.
      b_small: examples in the small batch.
      b_big: examples in the big one.

    Returns:
      NoiseScale: gradient_sq, trace, scale. float32, of the arguments' shape.

    Raises:
      ValueError: b_big is not above b_small.

    Example:
      >>> from optlab.diagnostics import gradient_noise_scale
      >>> print(gradient_noise_scale(5.0, 2.0, b_small=1, b_big=4).scale)
      4.0

    Deviations:
      A scale that is not positive is NaN: early estimates of |G|^2 are often negative.

    References:
      McCandlish et al., "An Empirical Model of Large-Batch Training", arXiv:1812.06162, 2018,
      appendix A.1.
    """
    _check_sizes("gradient_noise_scale", b_small, b_big)
    small, big = (jnp.asarray(x, jnp.float32) for x in (small, big))
    gradient_sq = (b_big * big - b_small * small) / (b_big - b_small)
    trace = (small - big) / (1 / b_small - 1 / b_big)
    return NoiseScale(gradient_sq, trace, _ratio(trace, gradient_sq))


@_checks.explain_calls
def noise_scale_tracker(b_small: float, b_big: float, *, decay: float = 0.99) -> NoiseScaleTracker:
    """Average the noise scale's numerator and denominator over steps, each by itself.

    x = decay x + (1 - decay) new, for |G|^2 and for tr; scale = tr / |G|^2
    `state = init()`, then `state = update(state, small, big)` at every step, inside jit or out.

    Args:
      b_small: examples in the small batch.
      b_big: examples in the big one.
      decay: of the averages, in [0, 1).

    Returns:
      NoiseScaleTracker: init, update. `state.metrics()` has the `noise_scale`.

    Raises:
      ValueError: b_big is not above b_small.

    Example:
      >>> from optlab.diagnostics import noise_scale_tracker
      >>> tracker = noise_scale_tracker(1, 4)
      >>> state = tracker.update(tracker.init(), 5.0, 2.0)
      >>> print(state.metrics()["noise_scale"].round(3))
      4.0

    Deviations:
      None.

    References:
      McCandlish et al., arXiv:1812.06162, 2018, appendix A.1.
    """
    name = "noise_scale_tracker"
    _check_sizes(name, b_small, b_big)
    _checks.check_decay(name, decay=decay)

    def init():
        return NoiseScaleState(jnp.zeros([], jnp.int32), *jnp.zeros([2], jnp.float32))

    def update(state, small, big):
        new = gradient_noise_scale(small, big, b_small=b_small, b_big=b_big)
        averages = (
            decay * old + (1 - decay) * x
            for old, x in ((state.gradient_sq, new.gradient_sq), (state.trace, new.trace))
        )
        return NoiseScaleState(_leafwise.increment(state.count), *averages)

    return NoiseScaleTracker(init, update)


def _stacked(name: str, gradients: Any, least: int) -> None:
    """Refuse leaves that do not share a leading axis of that length or more."""
    _leafwise.check_tree(name, gradients)
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(gradients)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"{name}: every leaf needs a leading axis of the same size, got {sorted(sizes)}. "
            "Take gradients under jax.vmap over examples or micro-batches."
        )
    ((count,),) = sizes
    if count < least:
        raise ValueError(f"{name}: at least {least} gradients are needed, got {count}. Stack more.")


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(_leafwise.widen(x.dtype)), tree)


@_checks.explain_calls
def micro_batch_norms(gradients: Any) -> tuple[jax.Array, jax.Array]:
    """Return the squared norms that the noise scale needs, from k micro-batches of one step.

    small = mean over micro-batches of |g_i|^2,  big = |mean of g_i|^2
    For micro-batches of b examples they are of batch sizes b and k b.

    Args:
      gradients: a tree with a leading axis of k >= 2 micro-batches or examples.

    Returns:
      small, big: float32, ().

    Raises:
      ValueError: leaves without a common leading axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from optlab.diagnostics import micro_batch_norms
      >>> print(*micro_batch_norms(jnp.array([[3.0], [1.0]])))
      5.0 4.0
    """
    _stacked("micro_batch_norms", gradients, 2)
    return _two_norms(gradients)


@jax.jit
def _two_norms(gradients):
    leaves = jax.tree.leaves(_wide(gradients))
    small = sum(sum_of_squares(g) / g.shape[0] for g in leaves)
    big = sum(sum_of_squares(jnp.mean(g, 0)) for g in leaves)
    return jnp.asarray(small), jnp.asarray(big)


@_checks.explain_calls
def gsnr(gradients: Any) -> Gsnr:
    """Measure each coordinate's gradient signal-to-noise ratio over the examples of a batch.

    r = mean(g)^2 / var(g), the variance with B - 1; batch: |mean|^2 / (sum of var / B)
    High where examples agree on a direction.

    Args:
      gradients: a tree with a leading axis of B >= 2 examples.

    Returns:
      Gsnr: coordinates, mean over them, batch. A coordinate without noise is infinite, one without
      gradient 0.

    Raises:
      ValueError: leaves without a common leading axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from optlab.diagnostics import gsnr
      >>> print(gsnr(jnp.array([[3.0, 1.0], [1.0, -1.0]])).coordinates)
      [2. 0.]

    Deviations:
      None.

    References:
      Liu et al., "Understanding Why Neural Networks Generalize Well Through GSNR of Parameters",
      arXiv:2001.07384, 2020.
    """
    _stacked("gsnr", gradients, 2)
    return _ratios(gradients)


@jax.jit
def _ratios(gradients):
    count = jax.tree.leaves(gradients)[0].shape[0]
    wide = _wide(gradients)
    mean_sq = jax.tree.map(lambda g: jnp.mean(g, 0) ** 2, wide)
    variance = jax.tree.map(lambda g: jnp.var(g, 0, ddof=1), wide)
    whole = jax.tree.map(_signal_to_noise, mean_sq, variance)
    total, entries = jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, whole)), _entries(whole)
    signal, noise = (sum(map(jnp.sum, jax.tree.leaves(t))) for t in (mean_sq, variance))
    return Gsnr(whole, total / entries, _signal_to_noise(signal, jnp.asarray(noise) / count))


def _entries(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def _signal_to_noise(signal: Any, noise: jax.Array) -> jax.Array:
    return safe_divide(signal, noise, jnp.where(signal > 0, jnp.inf, 0.0))
