"""Rate and momentum from the ends of the Hessian's spectrum."""

from collections.abc import Callable
from typing import Any

from optlab import _checks
from optlab.controllers._host import Resumable
from optlab.schedules.rates import HeavyBall, heavy_ball_optimal


class SpectralRate(Resumable):
    """Set rate and momentum to the heavy ball's optimum for a measured spectrum.

    Every `observe` measures the largest and the smallest eigenvalue L, m of the Hessian of a batch,
    averages each over the measurements, and returns
      rate = (2/(sqrt L + sqrt m))^2,  momentum = ((sqrt L - sqrt m)/(sqrt L + sqrt m))^2,
    as `optlab.heavy_ball_optimal` does.
    Hand both to the step as arguments, or through `optax.inject_hyperparams`: nothing recompiles.

    UNCONFIRMED: the paper calls its learner preliminary and its code does not hold it; how often it
    measures and how it averages is ours.

    Args:
      spectrum: `(params, batch) -> (largest, smallest)` eigenvalue, such as the ends of the Ritz
        values of a few Lanczos steps.
      smoothing: share of the average that a new measurement leaves in place, in [0, 1).
      floor: least m/L, in (0, 1]: the Hessian of a network has m <= 0.

    Attributes:
      largest, smallest: the averages, None before the first measurement.

    Raises:
      ValueError: a largest eigenvalue that is not above 0.

    Example:
      >>> import optlab
      >>> learner = optlab.SpectralRate(lambda params, batch: (4.0, 1.0))
      >>> rate, momentum = learner.observe(None, None)
      >>> print(f"{rate:.4f} {momentum:.4f}")
      0.4444 0.1111

    References:
      Granziol, Zohren and Roberts, Learning rates as a function of batch size: a random matrix
      theory approach to neural network training, arXiv:2006.09092, 2020.
    """

    _saved = ("largest", "smallest", "count")

    def __init__(
        self,
        spectrum: Callable[[Any, Any], tuple[Any, Any]],
        *,
        smoothing: float = 0.9,
        floor: float = 1e-6,
    ):
        name = "SpectralRate"
        _checks.check_decay(name, smoothing=smoothing)
        _checks.check_range(name, "a number in (0, 1]", lambda x: 0 < x <= 1, floor=floor)
        if not callable(spectrum):
            must = "a function (params, batch) -> (largest, smallest)"
            raise _checks.refusal(TypeError, name, "spectrum", must, spectrum)
        self._spectrum, self._smoothing, self._floor = spectrum, smoothing, floor
        self.largest: float | None = None
        self.smallest: float | None = None
        self.count = 0

    def observe(self, params: Any, batch: Any) -> HeavyBall:
        """Measure, and return the rate and momentum to go on with."""
        largest, smallest = (float(x) for x in self._spectrum(params, batch))
        if not 0 < largest < float("inf"):
            raise ValueError(
                f"SpectralRate: the largest eigenvalue must be > 0, got {largest}. "
                "Measure with more Lanczos steps or on a larger batch."
            )
        self.count += 1
        # Bias corrected: the first measurement counts in full.
        share = (1 - self._smoothing) / (1 - self._smoothing**self.count)
        self.largest = (1 - share) * (self.largest or 0.0) + share * largest
        self.smallest = (1 - share) * (self.smallest or 0.0) + share * smallest
        return heavy_ball_optimal(self.largest, self.smallest, floor=self._floor)
