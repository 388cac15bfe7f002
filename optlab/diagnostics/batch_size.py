"""Critical batch size: where larger batches stop saving steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optlab import _checks


class CriticalBatch(NamedTuple):
    """What `critical_batch` found; float64 numbers of the host."""

    min_steps: float  # S_min: steps with an infinite batch
    min_examples: float  # E_min: examples with batches of one
    size: float  # B_crit = E_min / S_min
    error: float  # root of the mean square relative error of the fit
    left_out: tuple[float, ...]  # batch sizes that did not reach the target

    def steps(self, batch_size: Any) -> Any:
        """Return the steps that a batch size takes, S_min + E_min / B."""
        return self.min_steps + self.min_examples / np.asarray(batch_size)

    def examples(self, batch_size: Any) -> Any:
        """Return the examples that a batch size takes, E_min + S_min B."""
        return self.min_examples + self.min_steps * np.asarray(batch_size)


def _least_squares(inverse: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """Fit S = a + c / B in relative error, with a, c >= 0."""
    columns = np.stack([1 / steps, inverse / steps], 1)
    (a, c), *_ = np.linalg.lstsq(columns, np.ones_like(steps))
    if a >= 0 and c >= 0:
        return float(a), float(c)
    alone = [x.sum() / (x @ x) for x in columns.T]
    misses = [np.sum((x * y - 1) ** 2) for x, y in zip(columns.T, alone, strict=True)]
    return (float(alone[0]), 0.0) if misses[0] <= misses[1] else (0.0, float(alone[1]))


@_checks.explain_calls
def critical_batch(batch_sizes: Any, steps: Any) -> CriticalBatch:
    """Fit the critical batch size from the steps that runs of several batch sizes took to a loss.

    (S / S_min - 1) (E / E_min - 1) = 1 with E = B S, that is S = S_min + E_min / B
    B_crit = E_min / S_min: there a run takes twice the least steps and twice the least examples.
    Least squares of the relative error, both minima >= 0; on the host, in float64.

    Args:
      batch_sizes: examples per step of each run, > 0.
      steps: steps each run took to the same loss; infinite, NaN or None if it never came there.

    Returns:
      CriticalBatch: min_steps, min_examples, size (infinite where steps only fall as 1 / B), error,
      left_out; and steps(B), examples(B) of the fit.

    Raises:
      ValueError: fewer than two batch sizes reached the target.

    Example:
      >>> from optlab.diagnostics import critical_batch
      >>> print(round(critical_batch([10, 100, 1000], [1100.0, 200.0, 110.0]).size))
      100

    Deviations:
      None.

    References:
      McCandlish et al., arXiv:1812.06162, 2018, eq. 5.1 (from memory); Zhang et al.,
      arXiv:2403.06563, 2024.
    """
    name = "critical_batch"
    sizes = np.asarray(batch_sizes, np.float64)
    taken = np.asarray([np.nan if s is None else s for s in steps], np.float64)
    if sizes.ndim != 1 or sizes.shape != taken.shape or not (sizes > 0).all():
        raise ValueError(
            f"{name}: batch_sizes must be positive, one per entry of steps, got shapes "
            f"{sizes.shape} and {taken.shape}. Write critical_batch([32, 256], [9000, 2000])."
        )
    there = np.isfinite(taken) & (taken > 0)
    sizes, taken, missed = sizes[there], taken[there], sizes[~there]
    if len(set(sizes)) < 2:
        raise ValueError(
            f"{name}: two batch sizes that reached the target are needed, got {len(set(sizes))} of "
            f"{there.size} runs. Add runs, or take a higher loss as the target."
        )
    a, c = _least_squares(1 / sizes, taken)
    error = float(np.sqrt(np.mean(((a + c / sizes) / taken - 1) ** 2)))
    return CriticalBatch(a, c, c / a if a else float("inf"), error, tuple(map(float, missed)))


@_checks.explain_calls
def critical_batch_of_loss(loss: ArrayLike, *, scale: float, exponent: float) -> jax.Array:
    """Return the critical batch size at a loss, B_crit = scale / loss^(1 / exponent).

    The lower the loss, the larger the batch that is worth it.

    Args:
      loss: > 0.
      scale: B*, in the unit of the result: 2e8 tokens for language models.
      exponent: alpha_B, 0.21 for language models.

    Returns:
      float32, of the loss's shape.

    Raises:
      ValueError: a scale or an exponent that is not positive.

    Example:
      >>> from optlab.diagnostics import critical_batch_of_loss
      >>> print(critical_batch_of_loss(2.0, scale=16.0, exponent=0.5))
      4.0

    Deviations:
      None.

    References:
      Kaplan et al., arXiv:2001.08361, 2020; the numbers named here are of that paper, from memory.
    """
    name = "critical_batch_of_loss"
    _checks.check_positive(name, scale=scale, exponent=exponent)
    # In logarithms: loss^(1 / 0.21) leaves float32 early.
    return jnp.exp(jnp.log(scale) - jnp.log(jnp.asarray(loss, jnp.float32)) / exponent)
