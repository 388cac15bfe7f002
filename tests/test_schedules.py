"""Every schedule at every kind of step: joints, far ends, traces, batches, slopes, references."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import schedules as reference

from optlab import schedules

STEPS = np.arange(60, dtype=np.int32)  # all arrays are of this shape: it is compiled for once
FAR = np.resize([0, 1, 26, 27, 2**24 + 1, 2**31 - 2, 2**31 - 1], STEPS.shape).astype(np.int32)
DECAYS = ["linear", "cosine", "one_minus_sqrt", "exponential", "inverse_proportional"]
TABLE = [0.5, 2.0, 1.0, 0.25]


def _wsd(decay, s):
    return schedules.wsd(2.0, 5 * s, 9 * s, 12 * s, init_value=0.1, end_value=0.01, decay=decay)


def _wsd_s(s):
    given = {"init_value": 0.1, "end_value": 0.01, "decay_steps": [4 * s, 10 * s]}
    return schedules.wsd_s(2.0, 5 * s, [14 * s, 26 * s], decay="cosine", **given)


def _infinite(cooldown, s):
    given = {"constant_steps": 6 * s, "anneal_steps": 5 * s, "end_value": 0.01}
    return schedules.infinite(
        2.0, 0.5, 5 * s, 10 * s, init_value=0.1, cooldown=cooldown, timescale=4.0, **given
    )


def _damped(s):
    given = {"num_cycles": 3, "damping": 0.25, "end_value": 0.01, "valley_fraction": 0.3}
    return schedules.damped_cosine(2.0, 26 * s, init_value=0.1, warmup_steps=5 * s, **given)


def _cyclic(mult, decay, s):
    given = {"end_value": 0.01, "cycle_mult": mult, "peak_decay": decay, "init_value": 0.1}
    return schedules.cyclic_cosine(2.0, 9 * s, warmup_steps=5 * s, **given)


def _refined(interpolation, s):
    return schedules.refined(TABLE, interpolation=interpolation, total_steps=26 * s)


def _branch(s):
    base = schedules.cyclic_cosine(2.0, 9 * s)
    return schedules.branch(base, 13 * s, 12 * s, end_value=0.01)


# Each made from one number that stretches it, with its joints and its last value, if it has one.
MADE = {
    **{f"wsd-{decay}": (partial(_wsd, decay), (0, 5, 14, 26), 0.01) for decay in DECAYS},
    "wsd_s": (_wsd_s, (0, 5, 10, 16, 26), 0.01),
    **{
        f"infinite-{cooldown}": (partial(_infinite, cooldown), (0, 5, 15, 21, 26), 0.01)
        for cooldown in ("cosine", "inv_sqrt", "linear")
    },
    "infinite-never": (lambda s: schedules.infinite(2.0, 0.5, 5 * s, 10 * s), (0, 5, 15), 0.5),
    "warmup_linear_decay": (
        lambda s: schedules.warmup_linear_decay(2.0, 5 * s, 26 * s, end_value=0.01),
        (0, 5, 26),
        0.01,
    ),
    "damped_cosine": (_damped, (0, 5, 26), 0.01),
    "cyclic_cosine": (partial(_cyclic, 1, 1.0), (0, 5), None),
    "cyclic_cosine-table": (partial(_cyclic, 1.5, 0.7), (0, 5), None),
    "slanted_triangular": (
        lambda s: schedules.slanted_triangular(2.0, 26 * s, cut_frac=0.2, ratio=8.0),
        (0, 5, 25, 26),
        0.25,
    ),
    "inverse_power": (lambda s: schedules.inverse_power(2.0, gamma=0.1 / s), (0,), None),
    "refined-linear": (partial(_refined, "linear"), (0, 13, 26), 0.25),
    "refined-previous": (partial(_refined, "previous"), (0,), 0.25),
    "branch": (_branch, (0, 13, 25, 26), 0.01),
}


@pytest.mark.parametrize("name", MADE)
def test_an_int_an_array_a_trace_and_a_batch_agree(name):
    schedule = MADE[name][0](1)
    batch = schedule(STEPS)
    assert batch.shape == STEPS.shape
    ints = [schedule(int(t)) for t in STEPS[::3]]
    np.testing.assert_allclose(ints, batch[::3], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(schedule)(STEPS), batch, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedule)(STEPS), batch, rtol=1e-6)


def test_a_batch_may_have_any_shape():
    for name in ("wsd_s", "cyclic_cosine-table", "refined-linear", "branch"):
        schedule = MADE[name][0](1)
        found = jax.jit(schedule)(STEPS.reshape(5, 2, 6))
        np.testing.assert_allclose(found.ravel(), schedule(STEPS), rtol=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_it_is_finite_to_the_last_int32_and_ends_where_it_says(name):
    make, _, last = MADE[name]
    values = np.asarray(make(1)(FAR))
    assert np.all(np.isfinite(values))
    assert np.all(values >= 0)
    if last is not None:
        np.testing.assert_array_equal(values[FAR > 2**30], np.float32(last))


@pytest.mark.parametrize("name", MADE)
def test_it_has_no_jump_at_a_joint(name):
    make, joints, _ = MADE[name]
    fine = 2**14
    schedule, joints = make(fine), np.resize(joints, STEPS.shape).astype(np.int32) * fine
    beside = [np.asarray(schedule(np.maximum(joints + d, 0))) for d in (-1, 0, 1)]
    # 1 - sqrt falls by sqrt(1/D) in its first step, the steepest of all.
    assert np.abs(np.diff(beside, axis=0)).max() <= 2.0 / np.sqrt(12 * fine) + 1e-6


@pytest.mark.parametrize("name", MADE)
def test_it_is_differentiable_in_the_step(name):
    schedule = MADE[name][0](1)
    slopes = np.asarray(jax.vmap(jax.grad(schedule))(STEPS.astype(np.float32) / 2))
    assert np.all(np.isfinite(slopes))
    assert np.any(slopes < 0) == (name != "refined-previous")


def test_wsd_falls_without_a_bump_from_the_last_step_of_the_plateau():
    falling = np.asarray([_wsd(decay, 1)(STEPS + 5) for decay in DECAYS])
    assert np.all(np.diff(falling) <= 0)
    assert np.all(falling[:, [0, 9]] == 2.0)


@pytest.mark.parametrize("decay", ["linear", "one_minus_sqrt"])
def test_wsd_without_warmup_or_decay_begins_at_the_peak_and_drops(decay):
    schedule = schedules.wsd(1.0, 0, 3, 0, end_value=0.5, decay=decay)
    np.testing.assert_array_equal(schedule(STEPS), np.where(STEPS < 3, 1, 0.5))


def _infinite_reference(shape):
    given = {"constant": 0.5, "warmup": 5, "cooldown": 10, "stay": 6, "anneal": 5, "end": 0.01}
    return partial(reference.infinite, peak=2.0, shape=shape, init=0.1, a=4.0, **given)


def _cyclic_reference(mult, decay):
    given = {"peak": 2.0, "low": 0.01, "steps": 9, "warmup": 5, "init": 0.1}
    return partial(reference.cyclic_cosine, mult=mult, decay=decay, **given)


REFERENCES = {
    **{
        f"infinite-{shape}": (partial(_infinite, shape, 1), _infinite_reference(shape))
        for shape in ("cosine", "inv_sqrt", "linear")
    },
    "wsd_s": (
        lambda: schedules.wsd_s(2.0, 5, [20, 30, 55], decay_fraction=0.2, init_value=0.3),
        partial(
            reference.wsd_s, peak=2.0, warmup=5, ends=[20, 30, 55], lengths=[4, 6, 11], low=0.2,
            init=0.3,
        ),
    ),
    "cyclic_cosine": (partial(_cyclic, 1, 1.0, 1), _cyclic_reference(1, 1.0)),
    "cyclic_cosine-table": (partial(_cyclic, 1.3, 0.7, 1), _cyclic_reference(1.3, 0.7)),
    "damped_cosine": (
        partial(_damped, 1),
        partial(
            reference.damped_cosine, peak=2.0, total=26, cycles=3, damping=0.25, end=0.01,
            valley=0.3, warmup=5, init=0.1,
        ),
    ),
    "slanted_triangular": (
        lambda: schedules.slanted_triangular(2.0, 37, cut_frac=0.3, ratio=8.0),
        partial(reference.slanted_triangular, peak=2.0, total=37, cut_frac=0.3, ratio=8.0),
    ),
    **{
        f"refined-{total}-{how}": (
            partial(schedules.refined, TABLE, interpolation=how, total_steps=total),
            partial(reference.refined, values=TABLE, total=total, linear=how == "linear"),
        )
        for total in (3, 4, 26)
        for how in ("linear", "previous")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFERENCES)
def test_it_follows_its_reference(name):
    make, theirs = REFERENCES[name]
    expected = [theirs(int(t)) for t in STEPS]
    np.testing.assert_allclose(make()(STEPS), expected, rtol=1e-5, atol=2e-6)
    with jax.enable_x64(True):
        exact = make()(STEPS.astype(np.int64))
        np.testing.assert_allclose(exact, expected, rtol=1e-12, atol=1e-14)


def test_one_cycle_of_wsd_s_is_wsd():
    ours = schedules.wsd_s(2.0, 5, [26], decay_steps=12, end_value=0.01, decay="linear")
    wsd = schedules.wsd(2.0, 5, 9, 12, end_value=0.01, decay="linear")
    np.testing.assert_allclose(ours(STEPS), wsd(STEPS), rtol=1e-6)


def test_wsd_s_is_back_at_the_peak_at_once():
    schedule = schedules.wsd_s(1.0, 0, [1000, 2000], end_value=0.0, decay="linear")
    steps = [900, 950, 999, 1000, 1800, 1900, 2000, 3000]
    found = [schedule(step) for step in steps]
    np.testing.assert_allclose(found, [1, 0.5, 0.01, 1, 1, 0.5, 0, 0], rtol=1e-4)


def test_a_branch_of_a_constant_is_wsd_and_does_not_ask_beyond_its_step():
    asked = []

    def constant(step):
        asked.append(np.max(step))
        return 2.0

    cooled = schedules.branch(constant, 14, 12, "cosine", end_value=0.01)
    wsd = schedules.wsd(2.0, 0, 14, 12, end_value=0.01, decay="cosine")
    np.testing.assert_array_equal(cooled(STEPS), wsd(STEPS))
    assert max(asked) == 14


def test_a_branch_can_be_made_inside_jit_and_late():
    def rate(step):
        base = schedules.infinite(1.0, 0.5, 10, 20)
        return schedules.branch(base, 2**24 + 3, 4, "linear")(step)

    steps = 2**24 + 3 + np.arange(-1, 6)
    np.testing.assert_allclose(jax.jit(rate)(steps), [0.5, 0.5, 0.375, 0.25, 0.125, 0, 0])


def test_doubling_cycles_are_optax_sgdr_in_full():
    cycles = [
        {"init_value": 1.0, "peak_value": 1.0, "warmup_steps": 0, "decay_steps": 7 * 2**i}
        for i in range(4)
    ]
    ours, theirs = schedules.cyclic_cosine(1.0, 7, cycle_mult=2.0), optax.sgdr_schedule(cycles)
    np.testing.assert_allclose(ours(STEPS), jax.jit(theirs)(STEPS), atol=1e-6)


@pytest.mark.parametrize("mult", [1, 1.1, 2.0, 1e200])
def test_every_cycle_to_the_last_int32_begins_at_its_crest(mult):
    starts, size = [0], 10.0
    while starts[-1] + round(min(size, 2**31)) < 2**31 and len(starts) < 400:
        starts.append(starts[-1] + round(size))
        size *= mult
    starts = np.array(starts if mult > 1 else [0, 10 * (2**31 // 10)], np.int32)
    starts = starts[np.linspace(0, len(starts) - 1, len(STEPS)).astype(int)]
    schedule = schedules.cyclic_cosine(1.0, 10, cycle_mult=mult)
    np.testing.assert_array_equal(schedule(starts), 1.0)
    assert np.all(np.asarray(schedule(np.maximum(starts - 1, 0)))[starts > 0] < 0.1)


def test_the_program_does_not_grow_with_the_cycles():
    def size(schedule):
        return len(jax.make_jaxpr(schedule)(jnp.int32(0)).eqns)

    many = schedules.wsd_s(1.0, 0, np.arange(100, 30_100, 100), decay_steps=10)
    few = schedules.wsd_s(1.0, 0, [100, 200], decay_steps=10)
    assert size(many) == size(few)
    grown = [schedules.cyclic_cosine(1.0, 10, cycle_mult=mult) for mult in (1.01, 4.0)]
    assert size(grown[0]) == size(grown[1])


def test_a_table_of_a_schedule_replays_it():
    values = np.array(_damped(1)(STEPS))
    replay, before = schedules.refined(values), values.copy()
    values[:] = 0  # it has a copy
    np.testing.assert_array_equal(replay(STEPS), before)


def test_a_schedule_drives_an_optimizer_under_jit():
    tx = optax.sgd(_wsd_s(1))
    params, state = jnp.ones(3), tx.init(jnp.ones(3))
    step = jax.jit(tx.update)
    for t in range(16):
        updates, state = step(jnp.ones(3), state, params)
        np.testing.assert_allclose(updates, -_wsd_s(1)(t), rtol=1e-6)


def test_the_peak_may_be_injected():
    made = {
        "infinite": lambda peak: schedules.infinite(peak, 0.5, 0, 9),
        "cyclic_cosine": lambda peak: schedules.cyclic_cosine(peak, 9),
        "damped_cosine": lambda peak: schedules.damped_cosine(peak, 9),
        "wsd_s": lambda peak: schedules.wsd_s(peak, 0, [9], decay_steps=2),
    }
    rates = jax.jit(lambda peak: [make(peak)(0) for make in made.values()])(2.5)
    np.testing.assert_array_equal(rates, 2.5)
