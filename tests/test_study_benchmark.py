"""What benchmarks/study.py says of a study that was run again."""

import lab_studies

from benchmarks import study

BEFORE = {"gpt": {"adamw": [60, 70, 80], "muon": [30, 40, 50]}}


def test_the_same_study_is_within_its_own_range():
    of_study = lab_studies.make(BEFORE)
    assert study.differences(of_study, of_study) == ["2 of 2 medians are within the range before."]


def test_a_median_outside_of_the_range_is_named():
    now = lab_studies.make({"gpt": {"adamw": [60, 70, 80], "muon": [50, 60, 65]}})
    found = study.differences(lab_studies.make(BEFORE), now)
    assert found[0] == "1 of 2 medians are within the range before."
    assert found[1:] == ["muon on gpt: 60 steps, before 30 to 50."]


def test_a_target_that_is_missed_now_is_named():
    now = lab_studies.make({"gpt": {"adamw": [60, 70, 80], "muon": [200, 200, 40]}})
    found = study.differences(lab_studies.make(BEFORE), now)
    assert found[1:] == ["muon on gpt: endless steps, before 30 to 50."]


def test_other_workloads_are_not_compared():
    now = lab_studies.make({"rows": BEFORE["gpt"]})
    assert len(study.differences(lab_studies.make(BEFORE), now)) == 1
