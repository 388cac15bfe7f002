"""AutoLRS: search the learning rate of the next steps, then take them."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from optlab import _checks, _progress
from optlab.controllers._host import Resumable
from optlab.controllers.forecast import LEAST, forecast_exponential

RunSteps = Callable[[Any, float, int], tuple[Any, Any]]
"""`(state, learning_rate, n) -> (state after n steps, their n losses)`"""

NAME = "AutoLRS"
_SHARE = 10  # a trial runs a tenth of the steps it decides about
_PIECES = 2  # calls of run_steps in the shortest trial
_CANDIDATES = 257  # rates in the bounds, evenly spaced in the logarithm


class Stage(NamedTuple):
    """One stage of `AutoLRS`: what was tried, what was chosen, and the steps taken with it."""

    learning_rate: float
    steps: int
    tried: list[float]  # rates, in the order of trial
    forecasts: list[float]  # losses, of each; infinite where it diverged
    losses: np.ndarray  # float64, of the steps taken


class AutoLRS(Resumable):
    """Choose the learning rate stage by stage by Bayesian optimization.

    A stage of tau steps tries `trials` rates for tau/10 steps each, always from the state it began
    with, forecasts from their losses the loss after tau steps by `forecast_exponential`, and takes
    the tau steps with the best rate. Losses that do not fall are not extrapolated: where one of
    the last three quarters of a trial is on average not below the first quarter and the first loss
    (one validation loss, not below that before the trial), the mean of the last quarter counts.
    tau doubles from stage to stage. With 10 trials the search takes as many steps as training
    itself: twice the time in all. A Gaussian process
    (scikit-learn's, Matern 5/2, on the logarithm of the rate) says which rate to try next: the one
    of the least mean minus `exploration` standard deviations.

    `run_steps(state, learning_rate, n)` takes n steps and returns the new state and n losses; state
    is any tree of arrays: parameters, optimizer state, position in the data. Make the rate an
    argument of the jitted step (`optax.inject_hyperparams`, or build the optimizer inside jit), so
    that no rate compiles anything. n is always tau_min/20, apart from a last piece where `run` is
    given steps that are no multiple of it. States are copied: `run_steps` may donate.

    Args:
      run_steps: see above.
      bounds: least and largest rate.
      tau_min: steps of the first stage, a multiple of 20; 1000 is the code's.
      tau_max: the last doubling is the last that stays within it.
      trials: rates tried in each stage, >= 2.
      exploration: standard deviations below the mean; the code's 1e6 spaces the rates out and
        hardly looks at what it has found.
      lookahead: how far to forecast, in lengths of a trial, counted from its beginning: 10 is the
        end of the stage. Less for trials of few steps, whose noise says nothing of so far ahead.
      evaluate: `state -> loss` on validation data. Once tau no longer doubles, trials are judged by
        it every tau_min/20 steps. None: by training losses throughout.
      seed: of the first rate of every stage.
      progress: show a bar for every stage.

    Attributes:
      learning_rates: the rate of every stage so far; with `tau`, all that `state_dict` saves. Save
        at the end of a stage, beside the state.

    Raises:
      ImportError: scikit-learn is not installed: pip install "optlab[controllers]".
      ValueError: bounds that are no interval of positive numbers; losses of another number than n.

    Example:
      >>> import jax, jax.numpy as jnp, optlab
      >>> @jax.jit
      ... def step(p, rate):
      ...     return p - rate * p, jnp.sum(p * p)
      >>> def run_steps(p, rate, n):
      ...     losses = []
      ...     for _ in range(n):
      ...         p, loss = step(p, rate)
      ...         losses.append(float(loss))
      ...     return p, losses
      >>> search = optlab.AutoLRS(run_steps, (1e-3, 10.0), tau_min=40, tau_max=40, trials=5)
      >>> p, stage = search.stage(jnp.ones(2))
      >>> print(len(stage.tried), 0.05 < stage.learning_rate < 2)
      5 True

    Deviations:
      The forecast is fitted without the spline that biases the code's. A trial that diverges counts
      as the worst of the others for the Gaussian process, not as a loss of 1e6, beside which they
      would all be alike. The code extrapolates training losses that rise as well, and compares
      validation losses with the run's first.

    References:
      Jin, Zhou, Zhao, Zhu, Guo, Canini and Krishnamurthy, AutoLRS: automatic learning-rate schedule
      by Bayesian optimization on the fly, arXiv:2105.10762, 2021.
    """

    _saved = ("learning_rates", "tau")

    def __init__(
        self,
        run_steps: RunSteps,
        bounds: tuple[float, float],
        *,
        tau_min: int = 1000,
        tau_max: int = 8000,
        trials: int = 10,
        exploration: float = 1e6,
        lookahead: float = 10.0,
        evaluate: Callable[[Any], float] | None = None,
        seed: int = 0,
        progress: bool = False,
    ):
        _gaussian_process()
        _checks.check_callable(NAME, run_steps=run_steps, evaluate=evaluate)
        _checks.check_steps(NAME, 2, trials=trials)
        _checks.check_steps(NAME, seed=seed)
        _checks.check_nonnegative(NAME, exploration=exploration)
        _checks.check_range(NAME, "a number >= 1", lambda x: 1 <= x < math.inf, lookahead=lookahead)
        _checks.check_steps(NAME, _SHARE * _PIECES, tau_min=tau_min)
        _checks.check_steps(NAME, tau_min, tau_max=tau_max)
        if tau_min % (_SHARE * _PIECES):
            must = f"a multiple of {_SHARE * _PIECES}"
            raise _checks.refusal(ValueError, NAME, "tau_min", must, tau_min)
        self._rates = _candidates(bounds)
        self._run_steps, self._evaluate, self._seed = run_steps, evaluate, seed
        self._tau_max, self._piece = tau_max, tau_min // (_SHARE * _PIECES)
        self._trials, self._exploration, self._show = trials, exploration, progress
        self._lookahead = lookahead
        self.learning_rates: list[float] = []
        self.tau = tau_min

    def stage(self, state: Any, steps: int | None = None) -> tuple[Any, Stage]:
        """Search, then take tau steps, or `steps` if these are fewer; return the state and a Stage.

        tau is doubled for the next stage.
        """
        taken = self.tau if steps is None else min(steps, self.tau)
        pieces = self._trials * (self.tau // _SHARE // self._piece) + math.ceil(taken / self._piece)
        number = len(self.learning_rates)
        with _progress.bar(self._show, f"{NAME} stage {number}", pieces):
            tried, forecasts = self._search(state, np.random.default_rng([self._seed, number]))
            best = tried[int(np.argmin(forecasts))] if np.isfinite(forecasts).any() else min(tried)
            state, losses = self._take(_copy(state), best, taken)
        self.learning_rates.append(best)
        if 2 * self.tau <= self._tau_max:
            self.tau *= 2
        return state, Stage(best, taken, tried, forecasts, losses)

    def run(self, state: Any, steps: int) -> tuple[Any, list[Stage]]:
        """Take so many steps in as many stages as they need; return the state and the stages."""
        stages = []
        while steps > 0:
            state, stage = self.stage(state, steps)
            stages.append(stage)
            steps -= stage.steps
        return state, stages

    def _search(self, state: Any, rng: np.random.Generator) -> tuple[list[float], list[float]]:
        """Return the rates tried and their forecasts."""
        places = [int(rng.integers(_CANDIDATES))]
        forecasts = [self._try(state, places[0])]
        while len(places) < self._trials:
            places.append(_next(places, forecasts, self._exploration))
            forecasts.append(self._try(state, places[-1]))
        return [float(self._rates[place]) for place in places], forecasts

    def _try(self, state: Any, place: int) -> float:
        """Return the loss that a rate leads to, infinite where it diverges."""
        steps, rate = self.tau // _SHARE, float(self._rates[place])
        # Only then is a trial long enough for validation to tell rates apart.
        if self._evaluate is not None and 2 * self.tau > self._tau_max:
            first, *rest = self._validated(self._evaluate, state, rate, steps)
            losses, before = np.asarray(rest), first
        else:
            _, losses = self._take(_copy(state), rate, steps)
            before = None
        if not np.isfinite(losses).all():
            return math.inf
        if not _falls(losses, before) or len(losses) < LEAST:
            return float(losses[-max(1, len(losses) // 4) :].mean())
        return forecast_exponential(losses, self._lookahead * len(losses))

    def _validated(
        self, evaluate: Callable[[Any], float], state: Any, rate: float, steps: int
    ) -> list[float]:
        """Return validation losses before a trial and after each piece of it."""
        losses, state = [float(evaluate(state))], _copy(state)
        for _ in range(steps // self._piece):
            state, _ = self._take(state, rate, self._piece)
            losses.append(float(evaluate(state)))
        return losses

    def _take(self, state: Any, rate: float, steps: int) -> tuple[Any, np.ndarray]:
        """Take steps piece by piece, so that `run_steps` sees one n."""
        found = [np.zeros(0)]
        for begin in range(0, steps, self._piece):
            n = min(self._piece, steps - begin)
            state, losses = self._run_steps(state, rate, n)
            found.append(np.asarray(losses, np.float64))
            if found[-1].shape != (n,):
                must = f"a function that returns (state, losses) with {n} losses"
                raise _checks.refusal(ValueError, NAME, "run_steps", must, found[-1])
            _progress.tick(found[-1])
        return state, np.concatenate(found)


def _candidates(bounds: tuple[float, float]) -> np.ndarray:
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 < low < high < math.inf:
        must, fix = "two numbers 0 < low < high", " Write for example (1e-5, 1e-1)."
        raise _checks.refusal(ValueError, NAME, "bounds", must, bounds, fix)
    return np.geomspace(low, high, _CANDIDATES)


def _copy(state: Any) -> Any:
    arrays = (jax.Array, np.ndarray)
    return jax.tree.map(lambda x: x.copy() if isinstance(x, arrays) else x, state)


def _falls(losses: np.ndarray, before: float | None) -> bool:
    """Tell whether losses stay below the one before, or quarters of them below the first.

    The first of them is the one before where none is given: a rate that is too large makes them
    jump within a step or two, and fall from there.
    """
    if before is not None:
        return bool((losses < before).all())
    first, *later = (part.mean() for part in np.array_split(losses, 4) if part.size)
    return all(quarter < min(first, losses[0]) for quarter in later)


def _gaussian_process() -> Any:
    try:
        from sklearn import gaussian_process
    except ImportError:
        raise ImportError(
            f"{NAME}: scikit-learn is needed for its Gaussian process, got none installed. "
            "Install it with pip install 'optlab[controllers]'."
        ) from None
    return gaussian_process


def _next(places: list[int], forecasts: list[float], exploration: float) -> int:
    """Return the place, among those not tried, of the least mean minus standard deviations."""
    gp = _gaussian_process()
    x = np.linspace(0, 1, _CANDIDATES)[:, None]
    # Forecasts are normalized: of an amplitude of their own a few points say too little, and one
    # near 0 would make the deviation the same everywhere.
    kernel = gp.kernels.Matern(0.3, (0.1, 1.0), nu=2.5)
    kernel += gp.kernels.WhiteKernel(1e-2, (1e-4, 1e-1))
    model = gp.GaussianProcessRegressor(kernel, normalize_y=True)
    with warnings.catch_warnings():
        # A few points often put a kernel's parameter on the edge of what is sensible.
        warnings.simplefilter("ignore")
        model.fit(x[places], _comparable(forecasts))
    mean, deviation = model.predict(x, return_std=True)
    bound = mean - exploration * deviation
    bound[places] = np.inf
    return int(np.argmin(bound))


def _comparable(forecasts: list[float]) -> np.ndarray:
    """Return the forecasts without what would hide the differences between good ones."""
    y = np.asarray(forecasts)
    finite = y[np.isfinite(y)]
    if not finite.size:
        return np.zeros(len(y))
    best, middle = finite.min(), np.median(finite)
    most = best + 4 * (middle - best) if middle > best else finite.max()
    return np.minimum(y, most)
