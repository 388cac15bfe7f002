"""The Adam that the low-rank family's released codes share: corrections late, decay last."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.recipes import routing
from optlab.transforms.adaptive import scale_by_moments
from optlab.transforms.decay import decay_after_update
from optlab.transforms.momentum import correction

ScalarOrSchedule = optax.ScalarOrSchedule


@dataclasses.dataclass(frozen=True)
class PlainAdam:
    """Moments with bias corrections, links, decoupled decay, the learning rate."""

    name: str
    learning_rate: ScalarOrSchedule
    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    weight_decay: ArrayLike
    weight_decay_mask: _leafwise.Mask
    mu_dtype: DTypeLike | None
    layout: _layout.Policy
    fallback: optax.GradientTransformation | None
    fallback_learning_rate: ScalarOrSchedule | None

    def moments(self) -> optax.GradientTransformationExtraArgs:
        """Return mu_hat/(sqrt(nu_hat) + eps)."""
        return scale_by_moments(self.b1, self.b2, self.eps, mu_dtype=self.mu_dtype)

    def finish(
        self, *links: optax.GradientTransformation, rate: ScalarOrSchedule
    ) -> optax.GradientTransformationExtraArgs:
        """Return the links with what comes after them."""
        decay = routing.decay(self.name, self.weight_decay, self.weight_decay_mask)
        return optax.chain(*links, decay, optax.scale_by_learning_rate(rate))

    def route(self, *links: optax.GradientTransformation) -> Any:
        """Return the links, finished, for matrices, and the same Adam for other leaves."""
        _checks.check_nonnegative(self.name, learning_rate=self.learning_rate, schedule=True)
        return self.beside(self.finish(*links, rate=self.learning_rate))

    def beside(self, matrices: optax.GradientTransformation) -> Any:
        """Return an optimizer for matrices, and the same Adam for other leaves."""
        rate = routing.rate_of_fallback(
            self.name, self.learning_rate, self.fallback_learning_rate, 1.0
        )
        fallback = self.fallback or self.finish(self.moments(), rate=rate)
        return routing.by_role(self.name, {"matrix": matrices}, fallback, self.layout)


@dataclasses.dataclass(frozen=True)
class LateAdam(PlainAdam):
    """Raw moments, links, then sqrt(1 - b2^t)/(1 - b1^t), the learning rate, and decay of p + u.

    What stands between the moments and the corrections, eps and limits on norms, sees moments
    without them, as in the released codes.
    """

    def moments(self) -> optax.GradientTransformationExtraArgs:
        """Return mu/(sqrt(nu) + eps)."""
        return scale_by_moments(
            self.b1, self.b2, self.eps, bias_correction=False, mu_dtype=self.mu_dtype
        )

    def finish(
        self, *links: optax.GradientTransformation, rate: ScalarOrSchedule
    ) -> optax.GradientTransformationExtraArgs:
        """Return the links with what comes after them."""
        _checks.check_nonnegative(self.name, weight_decay=self.weight_decay)
        corrections = optax.scale_by_schedule(self._correction)
        links = (*links, corrections, optax.scale_by_learning_rate(rate))
        if isinstance(self.weight_decay, int | float) and self.weight_decay == 0:
            return optax.chain(*links)
        decay = decay_after_update(rate, self.weight_decay, self.weight_decay_mask)
        return optax.chain(*links, decay)

    def _correction(self, count: Any) -> Any:
        return jnp.sqrt(correction(self.b2, count + 1)) / correction(self.b1, count + 1)
