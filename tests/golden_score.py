"""Checks the golden case of the study's scores."""

from typing import Any

import numpy as np

from optlab.lab import score

VALUES = 1e-12  # relative, float64


def algoperf_score(case: Any, arrays: Any) -> None:
    """Compare the scores of a table with misses, and the time of studies with trials."""
    unknown = case.keys() - {"method", "source", "note", "times", "scores", "trials", "study_time"}
    if unknown or arrays:
        raise NotImplementedError(f"unknown: {sorted(unknown)}, {sorted(arrays)}")
    times, trials = (np.array(case[key]) for key in ("times", "trials"))
    assert (times == -1).any(), "no target is missed: it proves nothing of misses"
    found = score.scores(np.where(times == -1, np.inf, times))
    np.testing.assert_allclose(found, case["scores"], rtol=VALUES)
    time = score.study_time(np.where(trials == -1, np.inf, trials))
    np.testing.assert_allclose(time, case["study_time"], rtol=VALUES)


CASES = {"algoperf_score": algoperf_score}
