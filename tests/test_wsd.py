"""The shape of `wsd` at every kind of step: joints, far ends, traces, batches, slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optlab

DECAYS = ["linear", "cosine", "one_minus_sqrt", "exponential", "inverse_proportional"]
WARMUP, STABLE, LENGTH = 5, 9, 12
JOINTS = np.array([0, 1, WARMUP, WARMUP + STABLE, WARMUP + STABLE + LENGTH])


def _wsd(decay, scale=1):
    lengths = (WARMUP * scale, STABLE * scale, LENGTH * scale)
    return optlab.wsd(2.0, *lengths, init_value=0.1, end_value=0.01, decay=decay)


@pytest.mark.parametrize("decay", DECAYS)
def test_wsd_of_an_int_an_array_a_trace_and_a_batch_agree(decay):
    schedule = _wsd(decay)
    steps_ = np.arange(40, dtype=np.int32)
    batch = schedule(jnp.asarray(steps_))
    np.testing.assert_allclose([schedule(int(t)) for t in steps_], batch, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(schedule)(steps_), batch, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedule)(steps_), batch, rtol=1e-6)


@pytest.mark.parametrize("decay", DECAYS)
def test_wsd_is_finite_monotone_after_warmup_and_ends_where_it_says(decay):
    far = np.array([0, 1, 25, 26, 27, 2**24 + 1, 2**31 - 2, 2**31 - 1], np.int32)
    values = np.asarray(_wsd(decay)(far))
    assert np.all(np.isfinite(values))
    np.testing.assert_array_equal(values[3:], np.float32(0.01))
    falling = np.asarray(_wsd(decay)(np.arange(WARMUP, 40)))
    assert np.all(np.diff(falling) <= 0)
    assert falling[0] == falling[STABLE] == 2.0


@pytest.mark.parametrize("decay", DECAYS)
def test_wsd_has_no_jump_at_a_joint(decay):
    fine = 2**14
    joints = JOINTS * fine
    schedule = _wsd(decay, fine)
    beside = [np.asarray(schedule(np.maximum(joints + d, 0))) for d in (-1, 0, 1)]
    # 1 - sqrt falls by sqrt(1/D) in its first step, the steepest of all.
    bound = 2.0 / np.sqrt(LENGTH * fine) + 1e-6
    assert max(np.abs(np.diff(beside, axis=0)).max(), 0) <= bound


@pytest.mark.parametrize("decay", DECAYS)
def test_wsd_is_differentiable_in_the_step(decay):
    slopes = jax.vmap(jax.grad(_wsd(decay)))(np.arange(0, 40, 0.5, dtype=np.float32))
    assert np.all(np.isfinite(slopes))
    assert np.any(np.asarray(slopes) < 0)


@pytest.mark.parametrize("decay", ["linear", "one_minus_sqrt"])
def test_wsd_without_warmup_or_decay_begins_at_the_peak_and_drops(decay):
    schedule = optlab.wsd(1.0, 0, 3, 0, end_value=0.5, decay=decay)
    np.testing.assert_array_equal(schedule(np.arange(6)), [1, 1, 1, 0.5, 0.5, 0.5])
