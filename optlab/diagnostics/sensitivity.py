"""What a run reacts to: its learning rate, and small changes of its logits."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optlab import _checks


class LrSensitivity(NamedTuple):
    """What `lr_sensitivity` found; numbers of the host."""

    value: float  # mean loss above the best one
    learning_rate: float  # the best one; NaN if no run was better than the start
    loss: float  # the lowest
    diverged: tuple[float, ...]  # learning rates that ended without a finite loss


class LogitStats(NamedTuple):
    """What `logit_stats` found."""

    largest: jax.Array  # float32, (): max |logit|
    rms: jax.Array  # float32, (): root of the mean square
    log_z: jax.Array  # float32, (): mean of log Z = logsumexp(logits)
    log_z_sq: jax.Array  # float32, (): mean of (log Z)^2, the z-loss without its factor


def _losses(losses: Any) -> np.ndarray:
    return np.asarray([np.nan if x is None else x for x in losses], np.float64)


@_checks.explain_calls
def lr_sensitivity(
    learning_rates: Any, losses: Any, init_loss: float, *, weights: Any = None
) -> LrSensitivity:
    """Measure how much loss a wrong learning rate costs.

    value = mean over learning rates of min(loss, init_loss), minus the lowest of these
    A run that diverged counts as `init_loss`. Compare methods only over the same range and grid;
    the paper's is 3e-4, 1e-3, 3e-3, ..., 3e-1.

    Args:
      learning_rates: of the runs, spaced evenly in the logarithm.
      losses: their final losses; None, NaN or infinite where a run diverged.
      init_loss: the loss at initialization; for a classifier log(number of classes).
      weights: of the learning rates in the mean, >= 0, for grids that are not even; equal by
        default.

    Returns:
      LrSensitivity: value, learning_rate and loss of the best run, learning rates that diverged.

    Raises:
      ValueError: lists of different lengths, or an init_loss that is not finite.

    Example:
      >>> from optlab.diagnostics import lr_sensitivity
      >>> print(round(lr_sensitivity([0.01, 0.1, 1.0], [2.0, 1.0, None], 4.0).value, 3))
      1.333

    Deviations:
      None.

    References:
      Wortsman et al., "Small-scale proxies for large-scale Transformer training instabilities",
      arXiv:2309.14322, 2023, section 2.2.
    """
    name = "lr_sensitivity"
    rates, found = np.asarray(learning_rates, np.float64), _losses(losses)
    shares = np.ones_like(rates) if weights is None else np.asarray(weights, np.float64)
    if not rates.size or rates.ndim != 1 or not rates.shape == found.shape == shares.shape:
        raise ValueError(
            f"{name}: learning_rates, losses and weights must be lists of one length, got "
            f"{rates.shape}, {found.shape} and {shares.shape}. Give every run's final loss."
        )
    if not math.isfinite(init_loss):
        fix = " Write math.log(number_of_classes)."
        raise _checks.refusal(ValueError, name, "init_loss", "a finite number", init_loss, fix)
    finite = np.isfinite(found)
    capped = np.where(finite, np.minimum(np.where(finite, found, 0), init_loss), init_loss)
    best = int(np.argmin(capped))
    value = float(np.average(capped, weights=shares) - capped[best])
    rate = float(rates[best]) if capped[best] < init_loss else math.nan
    return LrSensitivity(value, rate, float(capped[best]), tuple(map(float, rates[~finite])))


def _wide(logits: ArrayLike) -> jax.Array:
    x = jnp.asarray(logits)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@_checks.explain_calls
def logit_sharpness(logits: ArrayLike, labels: ArrayLike, *, eps: ArrayLike = 5e-4) -> jax.Array:
    """Measure in percent how much the cross-entropy can grow by small changes of the logits.

    100 (max over |d_i| <= eps (|z_i| + 1) of CE(z + d, y) - CE(z, y)) / (1 + CE(z, y))
    The cross-entropy rises with every logit but the label's, so the maximum is at a corner of the
    box: a closed form, one evaluation. For language models take the last token's logits.

    Args:
      logits: (..., classes).
      labels: integers, (...).
      eps: half the width of the box, relative to |z| + 1.

    Returns:
      Percent, (...), float32.

    Raises:
      ValueError: labels of another shape than the logits without their last axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from optlab.diagnostics import logit_sharpness
      >>> print(logit_sharpness(jnp.array([2.0, 0.0]), 0).round(4))
      0.0212

    Deviations:
      That sharpness of the last token's logits in Keskar's form is meant is known from reviews of
      the paper; the box, the normaliser and eps are ours: no primary source confirmed them.

    References:
      arXiv:2405.18710, 2024 (unconfirmed); Keskar et al., arXiv:1609.04836, 2017.
    """
    name = "logit_sharpness"
    z, y = _wide(logits), jnp.asarray(labels)
    if z.shape[:-1] != y.shape or not z.ndim:
        raise ValueError(
            f"{name}: labels must have shape {z.shape[:-1]} for logits {z.shape}, got {y.shape}. "
            "Pass one integer per row of logits."
        )
    return _keskar(z, y, jnp.asarray(eps, z.dtype))


@jax.jit
def _keskar(z, y, eps):
    log_p = jax.nn.log_softmax(z)
    own = jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)
    box = eps * (jnp.abs(z) + 1)
    corner = jnp.where(own > 0, -box, box)
    # The difference of two cross-entropies in one: log(sum p e^d) - d_y, without cancellation.
    growth = jnp.log1p(jnp.sum(jnp.exp(log_p) * jnp.expm1(corner), -1))
    growth = growth + jnp.sum(own * box, -1)
    return 100 * growth / (1 - jnp.sum(own * log_p, -1))


@_checks.explain_calls
def logit_stats(logits: ArrayLike) -> LogitStats:
    """Measure how far logits have grown: their size, and how far log Z is from 0.

    Of an output layer, log Z that drifts from 0 is what the z-loss 1e-4 (log Z)^2 holds back. Of
    attention, a largest logit near 1e4 came before failure in the paper; normalised queries and
    keys hold it back. For the sizes of gradients and updates see `optlab.measures`.

    Args:
      logits: (..., classes), or attention's logits before the mask.

    Returns:
      LogitStats: largest, rms, log_z, log_z_sq. float32, () each.

    Example:
      >>> import jax.numpy as jnp
      >>> from optlab.diagnostics import logit_stats
      >>> print(logit_stats(jnp.array([[3.0, -4.0]])).largest)
      4.0

    Deviations:
      None.

    References:
      Wortsman et al., arXiv:2309.14322, 2023, sections 3.1 and 3.2 (numbers from memory).
    """
    return _stats(_wide(logits))


@jax.jit
def _stats(z):
    log_z = jax.nn.logsumexp(z, -1)
    rms = jnp.sqrt(jnp.mean(z * z))
    return LogitStats(jnp.max(jnp.abs(z)), rms, jnp.mean(log_z), jnp.mean(log_z**2))
