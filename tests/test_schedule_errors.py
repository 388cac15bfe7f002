"""Every wrong argument of a schedule is refused at construction, with the fix."""

import numpy as np
import pytest

from optlab import schedules

HALF = {"constant_value": 0.5, "warmup_steps": 1, "cooldown_steps": 1}
WRONG = {
    "wsd_too_long": (lambda: schedules.wsd(1.0, 10, 2**31 - 1, 10), "must end by step 2**31 - 1"),
    "no_cycles": (lambda: schedules.wsd_s(1.0, 0, []), "cycle_ends must be a list of steps"),
    "one_cycle_end": (lambda: schedules.wsd_s(1.0, 0, 100), "Write [1000, 2000]"),
    "falling_cycles": (lambda: schedules.wsd_s(1.0, 0, [200, 100]), "must be increasing steps"),
    "cycles_in_warmup": (lambda: schedules.wsd_s(1.0, 50, [40]), "after warmup_steps, 50"),
    "cycle_too_short": (lambda: schedules.wsd_s(1.0, 0, [100, 105]), "the decay of cycle 1"),
    "no_decay": (lambda: schedules.wsd_s(1.0, 0, [5]), "got 0. Give other decay_steps"),
    "two_lengths": (lambda: schedules.wsd_s(1.0, 0, [9], decay_steps=[1, 1]), "each of the 1"),
    "share": (lambda: schedules.wsd_s(1.0, 0, [9], decay_fraction=0), "a number in (0, 1]"),
    "wsd_s_to_0": (lambda: schedules.wsd_s(1.0, 0, [90], end_value=0.0), "a number > 0"),
    "constant_above": (
        lambda: schedules.infinite(1.0, 2.0, 1, 1),
        "constant_value must be at most peak_value, 1.0",
    ),
    "anneal_of_what": (lambda: schedules.infinite(1.0, **HALF, anneal_steps=5), "constant_steps"),
    "anneal_to_what": (
        lambda: schedules.infinite(1.0, **HALF, constant_steps=5, anneal_steps=5),
        "anneal_steps needs end_value",
    ),
    "anneal_to_0": (
        lambda: schedules.infinite(
            1.0, **HALF, constant_steps=5, anneal_steps=5, end_value=0.0
        ),
        "end_value must be a number > 0",
    ),
    "anneal_up": (
        lambda: schedules.infinite(1.0, **HALF, constant_steps=5, anneal_steps=5, end_value=0.6),
        "end_value must be at most constant_value, 0.5",
    ),
    "cooldown": (lambda: schedules.infinite(1.0, **HALF, cooldown="cosin"), "mean 'cosine'"),
    "total_in_warmup": (
        lambda: schedules.warmup_linear_decay(1.0, 10, 9),
        "total_steps must be a whole number >= 10",
    ),
    "linear_peak": (
        lambda: schedules.warmup_linear_decay(0.0, 1, 9),
        "warmup_linear_decay: peak_value must be",
    ),
    "damped_out": (
        lambda: schedules.damped_cosine(1.0, 9, damping=0.1, end_value=0.2),
        "at most damping * peak_value",
    ),
    "half_a_cycle": (lambda: schedules.damped_cosine(1.0, 9, num_cycles=1.5), "a whole number"),
    "shrinking_cycles": (lambda: schedules.cyclic_cosine(1.0, 9, cycle_mult=0.5), "number >= 1"),
    "countless_cycles": (
        lambda: schedules.cyclic_cosine(1.0, 9, cycle_mult=1 + 1e-9),
        "Write cycle_mult=1.",
    ),
    "cycles_upside_down": (
        lambda: schedules.cyclic_cosine(1.0, 9, end_value=2.0),
        "end_value must be at most peak_value",
    ),
    "growing_peaks": (lambda: schedules.cyclic_cosine(1.0, 9, peak_decay=1.1), "in (0, 1]"),
    "no_cut": (lambda: schedules.slanted_triangular(1.0, 9), "Give a larger cut_frac."),
    "all_cut": (lambda: schedules.slanted_triangular(1.0, 9, cut_frac=1.0), "in (0, 1)"),
    "negative_power": (lambda: schedules.inverse_power(1.0, power=-1.0), "a number >= 0"),
    "empty_table": (lambda: schedules.refined([]), "values must be a list of numbers, got []"),
    "words": (lambda: schedules.refined("words"), "values must be a list of numbers"),
    "matrix": (lambda: schedules.refined(np.ones((2, 2))), "an array of shape (2, 2)"),
    "hole_in_table": (lambda: schedules.refined([1.0, np.nan]), "got nan at 1"),
    "spline": (lambda: schedules.refined([1.0], interpolation="spline"), "'linear', 'previous'"),
    "branch_of_number": (lambda: schedules.branch(0.1, 9, 9), "optax.constant_schedule"),
    "branch_of_pair": (lambda: schedules.branch(lambda a, b: a, 9, 9), "Write it as lambda step"),
    "branch_shape": (lambda: schedules.branch(lambda t: 1.0, 9, 9, "sqrt"), "'one_minus_sqrt'"),
    "branch_to_0": (lambda: schedules.branch(lambda t: 1.0, 9, 9, "exponential"), "number > 0"),
    "branch_of_0": (
        lambda: schedules.branch(lambda t: 0.0, 9, 9, "exponential", end_value=0.1),
        "schedule(9) must be > 0",
    ),
    "branch_of_list": (lambda: schedules.branch(lambda t: np.ones(2), 9, 9), "got [1. 1.]"),
    "branch_of_nan": (lambda: schedules.branch(lambda t: float("nan"), 9, 9), "must be a finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_refused_with_the_fix(name):
    call, says = WRONG[name]
    with pytest.raises((TypeError, ValueError)) as found:
        call()
    assert says in str(found.value)
    assert str(found.value).split("(")[0].split(":")[0] in schedules.__all__
