"""Replay of the golden cases: trajectories of the authors' code, schedules of the papers.

`pytest tests/test_golden.py --golden-dir DIR` replays any other directory of the same format. A
case whose method or hyperparameter is unknown fails by name.
"""

import itertools

import golden_aggregate
import golden_blocks
import golden_cases
import golden_coat
import golden_combine
import golden_constrained
import golden_controllers
import golden_curvature
import golden_diagnostics
import golden_low_rank
import golden_orthogonal
import golden_random_subspace
import golden_rates
import golden_schedules
import golden_score
import golden_stable
import golden_weights
import jax
import jax.numpy as jnp
import numpy as np

from optlab.linalg.polar import svd_polar

# Absolute, float32, on trajectories of 8 to 10 steps; the bounds of the cases' own notes, the
# second one for methods that orthogonalize, the third for matrices short of rank.
TOLERANCE, ORTHOGONAL_TOLERANCE, DEFICIENT_TOLERANCE = 2e-6, 1e-5, 1e-4
# With injected bases; ours of an SVD come as close.
LOW_RANK_TOLERANCE = 5e-6
# Of an iteration in bfloat16, on the whole move: error over the largest move, and cosine.
BFLOAT16_ERROR, BFLOAT16_COSINE = 2e-2, 0.9995
# Relative to the peak, float32.
SCHEDULE_TOLERANCE = 1e-5
# Methods whose cases record more than a trajectory.
CHECKED = (
    golden_aggregate.CASES
    | golden_blocks.CASES
    | golden_coat.CASES
    | golden_combine.CASES
    | golden_constrained.CASES
    | golden_controllers.CASES
    | golden_curvature.CASES
    | golden_diagnostics.CASES
    | golden_random_subspace.CASES
    | golden_rates.CASES
    | golden_schedules.CASES
    | golden_score.CASES
)
# Absolute, on polar factors.
POLAR_TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def pytest_generate_tests(metafunc):
    directory = metafunc.config.getoption("--golden-dir")
    cases = sorted(directory.glob("*.json"))
    assert cases, f"--golden-dir {directory}: no cases there"
    metafunc.parametrize("path", cases, ids=[c.stem for c in cases])


def test_case_is_reproduced(path):
    case, arrays = golden_cases.load(path)
    if case["method"] in golden_cases.ITERATIONS:
        _check_polar_factors(case, arrays)
    elif case["method"] in CHECKED:
        CHECKED[case["method"]](case, arrays)
    elif case["method"] == "frugal" and "block_order" in case["hyperparameters"]:
        golden_blocks.frugal_blocks(case, arrays)
    elif case["method"] == "qgalore" and not case["steps"]:
        golden_weights.CASES["qgalore"](case, arrays)
    elif case["method"] == "scion_lmo":
        _check_directions(case, arrays)
    elif "bfloat16" in case.get("variant", ""):
        _check_whole_move(case, arrays)
    elif arrays:
        _check_trajectory(case, arrays)
    else:
        _check_schedule(case)


def _check_trajectory(case, arrays):
    found, state = golden_cases.replay(case, arrays)
    start = golden_cases.group(arrays, "param.")
    orthogonal = case["method"] in golden_orthogonal.TRAJECTORIES
    low_rank = case["method"] in golden_low_rank.TRAJECTORIES
    bound = ORTHOGONAL_TOLERANCE if orthogonal else LOW_RANK_TOLERANCE if low_rank else TOLERANCE
    for t, params in enumerate(found):
        expected = golden_cases.group(arrays, f"out.{t}.")
        assert params.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(
                params[name], expected[name], rtol=0, atol=bound, err_msg=f"step {t}, {name}"
            )
    moved = max(np.abs(found[-1][name] - start[name]).max() for name in start)
    assert moved > 100 * bound, "the case does not move: it proves nothing"
    _check_snr(arrays, state, list(start))
    _check_noise(case, arrays, state)
    golden_low_rank.check_internals(case, arrays, state)
    if case["method"] in golden_stable.TRAJECTORIES:
        golden_stable.check_internals(case, arrays, state)


def _check_snr(arrays, state, names):
    recorded = golden_cases.group(arrays, "extra.gsnr.")
    if recorded:
        np.testing.assert_allclose(
            state[0].snr, [recorded[name] for name in sorted(names)], rtol=1e-5
        )


def _check_noise(case, arrays, state):
    """LANTON's noise and its factors after the last step."""
    last = f".{case['steps'] - 1}."
    recorded = {key: golden_cases.group(arrays, f"extra.{key}{last}") for key in ("H", "mult")}
    if recorded["H"]:
        found = golden_orthogonal.noise_of(case, state)
        for key, leaves in recorded.items():
            assert leaves.keys() == found[key].keys()
            for name, value in leaves.items():
                np.testing.assert_allclose(found[key][name], value, rtol=1e-5, err_msg=name)


def _check_directions(case, arrays):
    found = golden_orthogonal.scion_lmos(case["hyperparameters"], arrays)
    assert found.keys() == {key for key in arrays if key.startswith("out.")}
    for key, direction in found.items():
        bound = DEFICIENT_TOLERANCE if key.endswith(".rank2") else ORTHOGONAL_TOLERANCE
        np.testing.assert_allclose(direction, arrays[key], rtol=0, atol=bound, err_msg=key)


def _check_whole_move(case, arrays):
    found, _ = golden_cases.replay(case, arrays)
    start, last = (
        golden_cases.group(arrays, prefix) for prefix in ("param.", f"out.{case['steps'] - 1}.")
    )
    error, cosine = golden_orthogonal.apart(start, found[-1], last)
    assert error < BFLOAT16_ERROR
    assert cosine > BFLOAT16_COSINE


def _check_schedule(case):
    schedule = golden_cases.schedule(case)
    steps, values = np.asarray(case["steps"]), np.asarray(case["values"])
    bound = SCHEDULE_TOLERANCE * np.abs(values).max()
    np.testing.assert_allclose(schedule(steps), values, rtol=0, atol=bound)
    np.testing.assert_allclose([schedule(int(t)) for t in steps], values, rtol=0, atol=bound)


def _check_polar_factors(case, arrays):
    inputs, expected, exact = (_cut(arrays, prefix) for prefix in ("in.", "out.", "svd."))
    schedules = case["hyperparameters"]
    assert expected.keys() == {f"{schedule}.{name}" for schedule in schedules for name in inputs}
    for form, dtype in itertools.product(("direct", "gram"), POLAR_TOLERANCE):
        with jax.enable_x64(dtype == "float64"):
            for schedule, polar in golden_cases.iterations(case, form).items():
                for name, x in inputs.items():
                    found, label = polar(jnp.asarray(x, dtype)), f"{schedule}.{name}"
                    assert found.dtype == dtype
                    bound, what = _polar_tolerance(x, polar.table, dtype), f"{label}, {form}"
                    np.testing.assert_allclose(
                        found, expected[label], rtol=0, atol=bound, err_msg=f"{what}, {dtype}"
                    )
    for name in exact.keys() - {"rank1"}:  # a null space has no polar factor of its own
        with jax.enable_x64(True):
            found = svd_polar(jnp.asarray(inputs[name], "float64"))
        np.testing.assert_allclose(found, exact[name], rtol=0, atol=POLAR_TOLERANCE["float64"])


def _cut(arrays, prefix):
    return {name[len(prefix) :]: x for name, x in arrays.items() if name.startswith(prefix)}


def _polar_tolerance(x, table, dtype):
    """A rank-deficient float32 input: rounding puts noise where nothing was, and steps raise it.

    By the slope at zero, the product of the rows' a. Of the size of a rounding of the largest
    entry this is 3e-5 for five steps; twelve (slope 78649) make it 2.5e-3.
    """
    values = np.linalg.svd(x, compute_uv=False)
    if not values.any():
        return 0.0
    if dtype == "float64" or values[..., -1].min() > 1e-6 * values.max():
        return POLAR_TOLERANCE[dtype]
    slope = np.prod([a for a, _, _ in table])
    noise = np.finfo("float32").eps * np.abs(x).max() / np.linalg.norm(x)
    return slope * noise if slope > 1e4 else 1e-4
