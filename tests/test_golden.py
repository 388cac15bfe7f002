"""Replay of the golden cases: trajectories of the authors' code, schedules of the papers.

`pytest tests/test_golden.py --golden-dir DIR` replays any other directory of the same format. A
case whose method or hyperparameter is unknown fails by name.
"""

import golden_cases
import numpy as np

# Absolute, float32, on trajectories of 8 steps; the elementwise bound of the cases' own notes.
TOLERANCE = 2e-6
# Relative to the peak, float32.
SCHEDULE_TOLERANCE = 1e-5


def pytest_generate_tests(metafunc):
    directory = metafunc.config.getoption("--golden-dir")
    cases = sorted(directory.glob("*.json"))
    assert cases, f"--golden-dir {directory}: no cases there"
    metafunc.parametrize("path", cases, ids=[c.stem for c in cases])


def test_case_is_reproduced(path):
    case, arrays = golden_cases.load(path)
    if arrays:
        _check_trajectory(case, arrays)
    else:
        _check_schedule(case)


def _check_trajectory(case, arrays):
    found, state = golden_cases.replay(case, arrays)
    start = golden_cases.group(arrays, "param.")
    for t, params in enumerate(found):
        expected = golden_cases.group(arrays, f"out.{t}.")
        assert params.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(
                params[name], expected[name], rtol=0, atol=TOLERANCE, err_msg=f"step {t}, {name}"
            )
    moved = max(np.abs(found[-1][name] - start[name]).max() for name in start)
    assert moved > 100 * TOLERANCE, "the case does not move: it proves nothing"
    _check_snr(arrays, state, list(start))


def _check_snr(arrays, state, names):
    recorded = golden_cases.group(arrays, "extra.gsnr.")
    if recorded:
        np.testing.assert_allclose(
            state[0].snr, [recorded[name] for name in sorted(names)], rtol=1e-5
        )


def _check_schedule(case):
    schedule = golden_cases.schedule(case)
    steps, values = np.asarray(case["steps"]), np.asarray(case["values"])
    bound = SCHEDULE_TOLERANCE * np.abs(values).max()
    np.testing.assert_allclose(schedule(steps), values, rtol=0, atol=bound)
    np.testing.assert_allclose([schedule(int(t)) for t in steps], values, rtol=0, atol=bound)
