"""AutoLRS: its forecast, its search, and what it does to the run it controls."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optlab.controllers import autolrs
from optlab.controllers.autolrs import AutoLRS
from optlab.controllers.forecast import forecast_exponential

T = np.arange(100.0)
# Of the steepest direction 1 and the flattest 1/10; rates above 2 diverge.
CURVATURE = np.array([1.0, 0.3, 0.1])


class Quadratic:
    """Descent on sum h x^2/2 in NumPy, which counts what it was asked for."""

    def __init__(self, noise=0.0):
        self.sizes, self.steps, self.noise = set(), 0, noise

    def run_steps(self, x, rate, n):
        self.sizes.add(n)
        self.steps += n
        losses = []
        with np.errstate(over="ignore", invalid="ignore"):
            for _ in range(n):
                losses.append(self.loss(x))
                x = x - rate * CURVATURE * x
        return x, losses

    @staticmethod
    def loss(x):
        with np.errstate(over="ignore", invalid="ignore"):
            return float((CURVATURE * x * x).sum() / 2)


def search(problem, bounds=(1e-3, 10.0), **given):
    given = {"tau_min": 40, "tau_max": 160, **given}
    return AutoLRS(problem.run_steps, bounds, **given)


def noisy(a, constant, c, noise, seed, n=100):
    t = np.arange(n)
    return a * np.exp(-t / constant) + c + noise * np.random.default_rng(seed).normal(size=n)


@pytest.mark.parametrize(("a", "constant"), [(2.0, 33.0), (-0.5, 50.0), (1.0, 3.0), (4.0, 180.0)])
def test_an_exponential_is_forecast_exactly(a, constant):
    losses = a * np.exp(-T / constant) + 0.5
    want = a * np.exp(-1000 / constant) + 0.5
    assert forecast_exponential(losses, 1000) == pytest.approx(want, abs=1e-5)


def test_the_forecast_moves_with_the_losses():
    losses = noisy(1.5, 30, 1.0, 0.05, seed=0)
    plain, moved = (forecast_exponential(y, 500) for y in (losses, 3 * losses - 7))
    assert moved == pytest.approx(3 * plain - 7, rel=1e-6)


def test_noise_of_a_size_moves_the_forecast_by_about_that_size():
    for constant in (10, 30, 60):
        off = [forecast_exponential(noisy(2, constant, 1, 0.02, s), 1000) - 1 for s in range(20)]
        assert abs(np.mean(off)) < 0.02
        assert np.std(off) < 0.03


def test_single_spikes_do_not_count_unless_asked():
    losses = noisy(2, 30, 1, 0.01, seed=0)
    losses[[5, 40, 90]] += (3, 2, 4)
    assert abs(forecast_exponential(losses, 1000) - 1) < 0.02
    assert abs(forecast_exponential(losses, 1000, robust=False) - 1) > 0.05


def test_equal_losses_stay_where_they_are():
    assert forecast_exponential(np.full(20, 2.5), 200) == pytest.approx(2.5)


def test_a_straight_line_is_followed_for_two_windows_only():
    found = forecast_exponential(10 - 0.01 * T, 10_000)
    assert 10 - 0.01 * 300 < found < 9


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ([1.0, 2.0, 3.0], "4 values or more"),
        (np.ones((4, 2)), "one-dimensional"),
        ([1.0, 1.0, np.nan, 1.0], "not nan at 2"),
    ],
)
def test_what_cannot_be_forecast_is_refused(losses, says):
    with pytest.raises(ValueError, match=f"forecast_exponential: losses must be .*{says}"):
        forecast_exponential(losses, 10)


def test_the_best_rate_is_found_among_diverging_ones():
    problem = Quadratic()
    x, stage = search(problem).stage(np.ones(3))
    # 2/(1 + 1/10) is the best for all directions together.
    assert 0.3 < stage.learning_rate < 2
    assert len(stage.tried) == len(set(stage.tried)) == 10
    assert np.isinf(stage.forecasts).any() or max(stage.forecasts) > 1e3
    assert len(stage.losses) == stage.steps == 40
    assert problem.loss(x) < 1e-2 * problem.loss(np.ones(3))


def test_every_trial_starts_from_the_state_of_the_stage():
    starts = []

    def run_steps(x, rate, n):
        starts.append(x.copy())
        x -= rate  # in place, as a donated buffer would be
        return x, np.arange(n, 0, -1.0)

    begin = np.zeros(2)
    AutoLRS(run_steps, (0.1, 1.0), tau_min=20, tau_max=20, trials=3).stage(begin)
    assert not begin.any()
    # Two pieces a trial; the last 20 are the stage's own steps.
    assert [not x.any() for x in starts[:6]] == [True, False] * 3


def test_a_trial_takes_a_tenth_of_the_stage_and_all_pieces_have_one_length():
    problem = Quadratic()
    _, stages = search(problem, trials=5).run(np.ones(3), 120)
    assert [stage.steps for stage in stages] == [40, 80]
    assert problem.steps == 120 + 5 * 120 / 10
    assert problem.sizes == {2}


def test_the_last_stage_takes_what_is_left():
    problem = Quadratic()
    _, stages = search(problem, tau_max=40, trials=2).run(np.ones(3), 71)
    assert [stage.steps for stage in stages] == [40, 31]
    assert problem.sizes == {2, 1}


def test_a_resumed_search_goes_on_with_the_same_rates():
    whole = search(Quadratic(), trials=3)
    _, stages = whole.run(np.ones(3), 280)
    first = search(Quadratic(), trials=3)
    x, _ = first.stage(np.ones(3))
    again = search(Quadratic(), trials=3)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    _, rest = again.run(x, 240)
    assert again.learning_rates == whole.learning_rates
    assert [s.tried for s in rest] == [s.tried for s in stages[1:]]


def test_seeds_differ_and_repeat():
    tried = [search(Quadratic(), seed=s, trials=2).stage(np.ones(3))[1].tried for s in (0, 0, 1)]
    assert tried[0] == tried[1] != tried[2]


def test_no_rate_compiles_anything_and_states_may_be_donated():
    traces = []

    def piece(x, rate):
        traces.append(rate)

        def one(x, _):
            return x - rate * CURVATURE.astype(np.float32) * x, jnp.sum(x * x)

        return jax.lax.scan(one, x, length=2)

    donating = jax.jit(piece, donate_argnums=0)

    def run_steps(x, rate, n):
        assert n == 2
        return donating(x, rate)

    x = jnp.ones(3)
    after, _ = AutoLRS(run_steps, (1e-3, 10.0), tau_min=40, tau_max=80, trials=3).run(x, 120)
    assert len(traces) == 1
    assert float(jnp.sum(after)) < 1 < float(jnp.sum(x))


def test_validation_decides_once_tau_no_longer_doubles():
    seen = []

    def evaluate(x):
        seen.append(x)
        return Quadratic.loss(x)

    tuned = search(Quadratic(), evaluate=evaluate, trials=4)
    x, _ = tuned.stage(np.ones(3))
    x, _ = tuned.stage(x)
    assert not seen
    tuned.stage(x)
    # Before each trial of 16 steps, and after each piece of 2.
    assert len(seen) == 4 * 9


def test_a_validation_loss_that_rises_is_taken_as_it_is():
    losses = iter([1.0, 0.9, 0.8, 1.2, 0.7] * 10)
    run = search(Quadratic(), tau_max=40, evaluate=lambda x: next(losses), trials=2)
    run._piece = 1  # four pieces a trial
    assert run._try(np.ones(3), 0) == 0.7


def test_a_jump_that_decays_is_not_taken_for_progress():
    t = np.arange(40.0)
    trials = {
        "falls": 3 - 0.01 * t,
        "jumps": np.where(t < 12, 3.0, 3 + 2 * np.exp(-(t - 12) / 8)),
        "jumps at once": np.where(t < 1, 3.0, 3 + 2 * np.exp(-t / 16)),
    }
    found = {}
    for name, losses in trials.items():
        given = iter([losses[i : i + 20] for i in (0, 20)])
        run = AutoLRS(lambda x, r, n, g=given: (x, next(g)), (0.1, 1.0), tau_min=400, tau_max=400)
        found[name] = run._try(np.ones(1), 0)
    assert forecast_exponential(trials["jumps"][12:], 400) == pytest.approx(3, abs=0.01)
    assert forecast_exponential(trials["jumps at once"][1:], 400) == pytest.approx(3, abs=0.01)
    for name in ("jumps", "jumps at once"):
        assert found[name] == pytest.approx(trials[name][-10:].mean())
    assert found["falls"] < 2.6


def test_it_looks_no_further_ahead_than_asked():
    losses = 3 - 0.01 * np.arange(40)
    near, far = (
        AutoLRS(lambda x, r, n: (x, losses), (0.1, 1.0), tau_min=400, tau_max=400, lookahead=ahead)
        for ahead in (1.0, 10.0)
    )
    for run in (near, far):
        run._piece = 40
    assert near._try(np.ones(1), 0) == pytest.approx(2.6, abs=0.03)
    assert far._try(np.ones(1), 0) < 2.3


def test_if_every_rate_diverges_the_smallest_is_taken():
    def run_steps(x, rate, n):
        return x, [np.nan] * n

    _, stage = AutoLRS(run_steps, (0.1, 1.0), tau_min=20, tau_max=20, trials=4).stage(np.ones(2))
    assert stage.learning_rate == min(stage.tried)
    assert np.isinf(stage.forecasts).all()


def test_exploring_spaces_the_rates_out_and_exploiting_comes_back_to_the_best():
    places = [128]
    for _ in range(6):
        places.append(autolrs._next(places, [0.0] * len(places), 1e6))
    assert np.diff(sorted([0, *places, 256])).max() <= 72
    known = [0, 60, 90, 120, 200, 256]
    losses = [((p - 100) / 100) ** 2 for p in known]
    assert 90 < autolrs._next(known, losses, 0.0) < 120


def test_the_search_is_silent_and_shows_a_bar_if_asked(capsys):
    search(Quadratic(), trials=2).stage(np.ones(3))
    assert capsys.readouterr() == ("", "")
    search(Quadratic(), trials=2, progress=True).stage(np.ones(3))
    assert "AutoLRS stage 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"bounds": (1.0, 0.1)}, "bounds must be two numbers 0 < low < high"),
        ({"bounds": 0.1}, "bounds must be two numbers"),
        ({"tau_min": 30}, "tau_min must be a multiple of 20"),
        ({"tau_max": 20}, "tau_max must be a whole number >= 40"),
        ({"trials": 1}, "trials must be a whole number >= 2"),
        ({"exploration": -1.0}, "exploration must be a number >= 0"),
        ({"lookahead": 0.5}, "lookahead must be a number >= 1"),
        ({"evaluate": 1}, "evaluate must be a function or None"),
    ],
)
def test_wrong_arguments_are_refused(given, says):
    with pytest.raises((ValueError, TypeError), match=f"AutoLRS: {says}"):
        search(Quadratic(), **given)


def test_wrong_losses_and_wrong_memories_are_refused():
    wrong = AutoLRS(lambda x, rate, n: (x, 1.0), (0.1, 1.0), tau_min=20, tau_max=20)
    with pytest.raises(ValueError, match=r"AutoLRS: run_steps must be .* with 1 losses"):
        wrong.stage(np.ones(2))
    with pytest.raises(ValueError, match=r"AutoLRS: load_state_dict needs the keys"):
        wrong.load_state_dict({"tau": 20})


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"optlab\[controllers\]"):
        search(Quadratic())
