"""Schedules from gradient norms, and the measure that records them."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from optlab.controllers.refine import refine_schedule
from optlab.state.metrics import metrics
from optlab.transforms import measures
from optlab.transforms.watch import watch

NORMS = st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=40)
POWERS = {"sgd": 2, "adam": 1}


def by_definition(norms, power):
    """Return eta_t of algorithm 1, without smoothing, sum by sum."""
    w = [g**-power for g in norms]
    return np.array([w[t] * sum(w[t + 1 :]) / sum(w) for t in range(len(w))])


@hypothesis.given(NORMS, st.sampled_from(sorted(POWERS)))
@hypothesis.settings(max_examples=50)
def test_it_is_the_papers_formula(norms, optimizer):
    want = by_definition(norms, POWERS[optimizer])
    found = refine_schedule(norms, optimizer, smoothing=0.0, normalize=False)
    np.testing.assert_allclose(found, want, rtol=1e-9)
    shape = refine_schedule(norms, optimizer, smoothing=0.0)
    np.testing.assert_allclose(shape, want / want.max(), rtol=1e-9)


@hypothesis.given(NORMS, st.floats(0, 0.99), st.floats(1e-3, 1e3))
@hypothesis.settings(max_examples=50)
def test_any_record_gives_a_schedule_that_no_unit_changes(norms, smoothing, unit):
    found = refine_schedule(norms, smoothing=smoothing)
    assert found.shape == (len(norms),)
    assert found.max() == 1
    assert found[-1] == 0
    assert (found >= 0).all()
    other = refine_schedule(unit * np.asarray(norms), smoothing=smoothing)
    np.testing.assert_allclose(other, found, rtol=1e-9)


@pytest.mark.parametrize("optimizer", POWERS)
def test_equal_norms_give_linear_decay(optimizer):
    found = refine_schedule(np.full(50, 7.0), optimizer, normalize=False)
    scale = 7.0 ** -POWERS[optimizer]
    np.testing.assert_allclose(found, scale * (1 - np.arange(1, 51) / 50), rtol=0, atol=1e-12)


def test_large_norms_at_first_give_a_warm_up():
    found = refine_schedule(1 + 4 * np.exp(-np.arange(200) / 20))
    top = found.argmax()
    assert 20 < top < 80
    assert (np.diff(found[:top]) >= 0).all()
    assert found[0] < 0.2


def test_rising_norms_give_a_faster_end_and_falling_ones_a_slower_one():
    linear = refine_schedule(np.ones(200))
    rising = np.linspace(1, 2, 200)
    assert (refine_schedule(rising)[20:-1] < linear[20:-1]).all()
    assert (refine_schedule(rising[::-1])[100:-1] > linear[100:-1]).all()


def test_single_steps_do_not_show_where_the_median_looks_further():
    norms = np.full(100, 2.0)
    norms[[20, 50, 98]] = (50.0, 0.1, 30.0)
    plain = refine_schedule(np.full(100, 2.0))
    np.testing.assert_array_equal(refine_schedule(norms), plain)
    assert not np.allclose(refine_schedule(norms, smoothing=0.0), plain)


def test_the_median_repeats_the_first_value_and_mirrors_the_end():
    norms = np.array([9.0, 1.0, 2.0, 3.0, 8.0, 4.0])
    # Windows of 3: (9 9 1) (9 1 2) (1 2 3) (2 3 8) (3 8 4) (8 4 8).
    smooth = [9.0, 2.0, 2.0, 3.0, 4.0, 8.0]
    found = refine_schedule(norms, "adam", smoothing=0.5, normalize=False)
    np.testing.assert_allclose(found, by_definition(smooth, 1), rtol=1e-12)


@pytest.mark.parametrize(
    ("norms", "says"),
    [
        ([1.0, 0.0, 1.0], "not 0.0 at 1"),
        ([1.0, 1.0, np.nan], "not nan at 2"),
        ([-1.0, 1.0], "not -1.0 at 0"),
        ([1.0], "2 values or more"),
        (np.ones((3, 2)), "one-dimensional"),
    ],
)
def test_norms_that_say_nothing_are_refused(norms, says):
    with pytest.raises(ValueError, match=f"refine_schedule: grad_norms must be .*{says}"):
        refine_schedule(norms)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="refine_schedule: optimizer must be one of"):
        refine_schedule([1.0, 2.0], "adamw")
    with pytest.raises(ValueError, match=r"refine_schedule: smoothing must be a number in \[0, 1"):
        refine_schedule([1.0, 2.0], smoothing=1.0)


def test_the_l1_measure_is_the_mean_of_what_is_there():
    grads = {"a": jnp.array([1.0, -2.0]), "b": None, "c": jnp.array([[3.0, 0.0, -4.0]])}
    assert float(measures.gradient_mean_abs(grads, None, None)) == pytest.approx(2.0)
    assert float(measures.gradient_mean_abs({}, None, None)) == 0
    huge = {"a": jnp.full(1000, 3e38)}
    assert float(measures.gradient_mean_abs(huge, None, None)) == pytest.approx(3e38, rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "measure", "order"),
    [("sgd", measures.gradient_rms, 2), ("adam", measures.gradient_mean_abs, 1)],
)
def test_what_watch_records_is_the_norm_up_to_a_factor(optimizer, measure, order):
    tx = watch(optax.sgd(0.1), [measure])
    grads = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    state, found = tx.init(jnp.zeros(5)), []
    for g in grads:
        _, state = tx.update(jnp.asarray(g), state)
        found.append(float(metrics(state)[measure.__name__]))
    want = by_definition(np.linalg.norm(grads, order, axis=1), POWERS[optimizer])
    shape = refine_schedule(found, optimizer, smoothing=0.0)
    np.testing.assert_allclose(shape, want / want.max(), rtol=1e-5)
