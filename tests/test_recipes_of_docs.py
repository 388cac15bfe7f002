"""The guide's recipes of optax do what the papers say: each block is run, then measured."""

import json
import pathlib
import re

import golden_schedules
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

HERE = pathlib.Path(__file__).parent
README = HERE.parent / "notebooks" / "README.md"


@pytest.fixture(scope="module")
def blocks():
    """The names that each block leaves behind, by the variable of its recipe."""
    text = README.read_text()
    section = text.partition("\n## Recipes that optax has\n")[2].partition("\n## ")[0]
    found = {}
    with jax.numpy_rank_promotion("allow"):  # as a reader's JAX is set
        for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            names = {}
            exec(compile(code, str(README), "exec"), names)
            found |= {key: names for key in ("rewarmed", "reptile", "noise", "sam") if key in names}
    assert len(found) == 4
    return found


def _golden(name):
    return json.loads((HERE / "golden" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["rewarm_cosine", "slow_start_fast_decay"])
def test_the_schedule_is_the_recorded_one(blocks, name):
    ours = {"rewarm_cosine": "rewarmed", "slow_start_fast_decay": "slow_start"}[name]
    case = _golden(f"schedule__{name}")
    found = blocks["rewarmed"][ours](np.asarray(case["steps"]))
    np.testing.assert_allclose(found, case["values"], rtol=0, atol=1e-5 * max(case["values"]))


def test_reptile_goes_where_the_recorded_one_went(blocks):
    golden_schedules.follow(blocks["reptile"]["reptile"], _golden("reptile"))


def test_reptile_synchronizes_in_its_third_step(blocks):
    params = blocks["reptile"]["params"]
    np.testing.assert_array_equal(params.fast["w"], params.slow["w"])
    # Each step takes 0.6 of the distance of x @ w from 1; 0.4 of the way from the anchor is gone.
    distance = 2 * (0.4 * (1 - 0.6) ** 3 + 0.6)
    np.testing.assert_allclose(jnp.sum(params.fast["w"]) - 1, distance, rtol=1e-5)


def test_noise_has_the_variance_of_the_paper_at_every_step(blocks):
    noise, zeros = blocks["noise"]["noise"], jnp.zeros((400, 400))
    state, step = noise.init(zeros), jax.jit(noise.update)
    for t in range(10):
        updates, state = step(zeros, state)
        np.testing.assert_allclose(jnp.var(updates), 0.3 / (1 + t) ** 0.55, rtol=0.02)


def test_noise_comes_after_the_clip_and_is_no_step_of_its_own(blocks):
    tx, params = blocks["noise"]["tx"], blocks["noise"]["params"]
    huge = jax.tree.map(lambda p: 1e6 * p, params)
    updates, _ = tx.update(huge, tx.init(params), params, value=1.0)
    signs = np.sign(updates["w"])
    assert len(np.unique(signs)) == 2, "the clipped gradient drowned the noise"


def test_the_rate_is_halved_when_the_loss_has_stopped_falling(blocks):
    tx = optax.chain(optax.sgd(1.0), blocks["noise"]["plateau"])
    params, step = jnp.zeros(2), jax.jit(tx.update)
    state, rates = tx.init(params), []
    for loss in [3.0, 2.0, *[1.0] * 12]:
        updates, state = step(jnp.ones(2), state, params, value=loss)
        rates.append(-float(updates[0]))
    assert rates == [1.0] * 7 + [0.5] * 5 + [0.25] * 2


def test_sam_steps_by_the_gradient_at_the_worst_point_within_rho(blocks):
    names = blocks["sam"]
    inner = optax.sgd(lambda step: 1.0 + step)
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(names["rho"]))
    tx = optax.contrib.sam(inner, ascent, opaque_mode=True)
    at, matrix = jnp.array([3.0, -4.0]), jnp.array([2.0, 0.5])
    slope = lambda p: matrix * p  # noqa: E731
    call = lambda state: tx.update(slope(at), state, at, grad_fn=lambda p, _: slope(p))  # noqa: E731
    updates, state = call(tx.init(at))
    twice, _ = call(state)  # its schedule has counted one step
    gradient = np.array([6.0, -2.0])
    worst = np.array([3.0, -4.0]) + names["rho"] * gradient / np.linalg.norm(gradient)
    np.testing.assert_allclose(updates, -np.array([2.0, 0.5]) * worst, rtol=1e-6)
    np.testing.assert_allclose(twice, 2 * updates, rtol=1e-6)


def test_sam_of_the_readme_takes_one_step_of_lion(blocks):
    names = blocks["sam"]
    # Lion moves every entry by its rate, and decays by a tenth of it.
    np.testing.assert_allclose(names["params"]["w"], 1 - 1e-3 * (1 + 0.1), rtol=1e-6)
