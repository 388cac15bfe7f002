"""The study behind `optlab race --benchmark`: its score, its budget, its runs, its targets."""

import json
import math

import numpy as np
import pytest
from lab_studies import SIZES, goal, make, record

from optlab.lab import cli, data, findings, optimizers, page_study, score, study, targets, train
from optlab.lab.config import Config
from optlab.lab.rates import RATES
from optlab.lab.workloads import WORKLOADS

INF = math.inf


def test_score_is_the_integral_of_the_profile():
    times = np.array([[10, 12, INF], [20, 6, 7], [39, 25, 7.7]])
    at = np.linspace(1, score.WORST, 300_001)
    integral = score.profile(times, at)[:, :-1].mean(1)
    np.testing.assert_allclose(score.scores(times), integral, atol=1e-5)
    assert score.scores(times)[1] == pytest.approx((2 + 3 + 3) / 9)


def test_what_nobody_reaches_helps_nobody():
    np.testing.assert_array_equal(score.scores([[INF], [INF]]), [0, 0])
    assert not score.profile([[INF], [INF]], [1, 4]).any()
    np.testing.assert_array_equal(score.ratios([[2.0], [INF]]), [[1], [INF]])


def test_time_of_a_study_is_the_median_of_its_fastest_trials():
    assert score.study_time([[3, INF], [INF, INF], [9, 5]]) == 5


def test_speed_is_told_of_those_who_finished():
    times = [[4, 4], [2, 8], [1, INF], [2, 2]]
    np.testing.assert_allclose(score.speedup(times, 0), [1, 1, 0, 2])
    np.testing.assert_array_equal(score.speedup(times, 2), [0, 0, 0, 0])


def test_everyone_has_the_same_trials_around_its_own_rate():
    ours, theirs = study.choices("muon", 5), study.choices("adamw", 5)
    assert ours[0].learning_rate == RATES["muon"]
    assert len({choice.learning_rate for choice in ours}) == 5
    for mine, other in zip(ours, theirs, strict=True):
        ratio = mine.learning_rate / RATES["muon"]
        assert ratio == pytest.approx(other.learning_rate / RATES["adamw"], rel=2e-3)
        assert 0.1 <= ratio <= 10
        assert mine[1:] == other[1:]
        assert study.WARMUP[0] <= mine.warmup <= study.WARMUP[1]
        assert study.WEIGHT_DECAY[0] <= mine.weight_decay <= study.WEIGHT_DECAY[1]
    assert all(choice.weight_decay is None for choice in study.choices("scion", 3))
    assert study.choices("muon", 3) == ours[:3]


def test_decay_is_the_recipes_own_where_none_is_asked_for():
    assert study.own_decay("sophia") == 0.2
    assert study.own_decay("sgd") == 0
    assert not study.takes_decay("sgd")
    assert study.takes_decay("lion+int8")


def test_every_control_is_of_known_optimizers():
    for name, (who, part) in study.CONTROLS.items():
        optimizers.check_names((name, who))
        assert part > 0
        assert findings.is_control(study.control_name(name))
    assert not any(map(findings.is_control, optimizers.names()))


def test_best_trial_is_the_first_at_the_target():
    low, fast = record(80) | {"held_out": [0.9] * 10}, record(40)
    fast["held_out"][-1] = 2.0  # it is there and leaves again
    records = {"low": low | {"step": list(range(90, 100))}, "fast": fast}
    assert study.best(records, 1.0) == "fast"
    assert study.best({"far": record(500), "near": record(200)}, 1.0) == "near"
    lost = record(110, diverged_at=15)
    assert study.best({"lost": lost, "slow": record(500)}, 1.0) == "slow"


def tiny():
    raw = data.digits()
    return study.config_of("digits", SIZES, raw), raw


def test_a_run_of_the_study_is_that_of_the_race():
    config, raw = tiny()
    found = study.Bench(config, raw).run("adamw", study.Choice(0.01, 0.5, 0.1), 7)
    fields = {**vars(config), "seed": 7, "learning_rates": {"adamw": 0.01}}
    other = Config(**fields)
    problem = train.make_problem(other, raw)
    schedule = optimizers.SCHEDULES[study.SCHEDULE](0.01, 2, 4)
    tx = optimizers.make("adamw", schedule, weight_decay=0.1)
    runner = train.Runner("adamw", train.Program(problem, lambda _: tx), problem.params)
    while runner.racing:
        runner.advance()
    np.testing.assert_allclose(found["train"], runner.curve.train, rtol=1e-5)
    np.testing.assert_allclose(found["held_out"], runner.curve.held_out, rtol=1e-5)
    assert found["state_bytes_per_parameter"] == runner.state_bytes
    assert found["compile_seconds"] > 0


@pytest.fixture
def frozen(tmp_path):
    """A file of targets for a network that takes no time."""
    path = tmp_path / "targets.json"
    sha = data.fingerprint(data.digits())
    found = goal(data_sha256=sha, target=2.35)
    path.write_text(json.dumps({"workloads": {"digits": found}}))
    return path


def test_a_stopped_study_goes_on_where_it_was(frozen, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    argv = ["race", "--benchmark", "--workload=digits", "--optimizers=diffgrad", "--trials=2"]
    argv += ["--seeds=2", f"--targets={frozen}", f"--out={out}"]
    train_once, calls = study.Bench.run, []

    def stop_at_the_fourth(self, name, choice, seed):
        calls.append((name, choice, seed))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_once(self, name, choice, seed)

    monkeypatch.setattr(study.Bench, "run", stop_at_the_fourth)
    monkeypatch.setattr(page_study, "write", lambda of_study: f"{len(of_study['runs'])} runs")
    assert cli.main(argv) == 130
    assert "To go on: optlab race --benchmark" in capsys.readouterr().err
    kept = study.read(out)["runs"]
    assert len(kept) == 3

    assert cli.main(argv) == 2
    assert "Add --resume" in capsys.readouterr().err
    assert cli.main([*argv, "--resume", "--seeds=3"]) == 2
    assert "another seeds" in capsys.readouterr().err

    assert cli.main([*argv, "--resume"]) == 0
    found = study.read(out)
    assert {key: found["runs"][key] for key in kept} == kept
    names = {key.split("/")[1] for key in found["runs"]}
    assert names == {"diffgrad", "adamw at 0.5 of diffgrad's rate"}
    assert len(found["runs"]) == 2 + 2 * 2 + 2
    control, tuned = (found["runs"][f"digits/{name}/tuned/1"]["choice"] for name in sorted(names))
    assert control["learning_rate"] == tuned["learning_rate"] / 2
    assert control["warmup"] == tuned["warmup"]
    assert calls[-1][0] == "adamw"
    printed = capsys.readouterr().out
    assert "8 runs" in printed
    assert "Control of diffgrad" in printed
    assert "score B" in printed
    assert (out / "report.html").read_text() == "8 runs"


def test_times_are_read_off_the_curves():
    found = findings.find(make({"a": {"adamw": [50, 60, 400], "lion": [40, 40, 45]}}), ["lion"])
    assert found.steps.shape == (3, 1, 1)
    np.testing.assert_allclose(found.steps[:, 0, 0], [40, 40, 45])
    np.testing.assert_allclose(found.seconds, found.steps / 100)
    np.testing.assert_allclose(found.with_compile, found.seconds + 2)


def test_who_is_told_apart_and_who_is_not():
    reaches = {"a": {"adamw": [50, 60, 70], "lion": [40, 42, 44], "muon": [43, 45, 47],
                     "sgd": [400, 400, 400]}}  # fmt: skip
    found = findings.find(make(reaches), list(reaches["a"]))
    assert findings.winner(found, 0) == ("lion", ["muon"])
    missed = findings.find(make({"a": {"adamw": [400] * 3}}), ["adamw"])
    assert findings.winner(missed, 0) == (None, [])
    middle, least, most = found.scores(found.steps)
    assert middle[1] == 1
    assert (least <= most).all()
    assert middle[3] == 0


def test_what_is_not_finished_is_not_compared():
    half = make({"a": {"adamw": [50] * 3, "lion": [40] * 3}, "b": {"adamw": [50] * 3}})
    assert findings.complete(half) == ["adamw"]


def test_frozen_targets_are_those_of_the_sizes_and_of_their_seeds():
    known = json.loads(targets.FROZEN.read_text())
    assert {"versions", "device"} <= set(known)
    assert set(known["workloads"]) == set(targets.SIZES) == set(WORKLOADS)
    for name, found in known["workloads"].items():
        assert found["sizes"] == targets.SIZES[name]
        assert found["steps"] == targets.PART * found["sizes"]["steps"]
        assert found["measure"] == WORKLOADS[name].measure
        assert list(map(int, found["seeds"])) == list(targets.SEEDS)
        assert found["target"] == float(np.median(list(found["seeds"].values())))
        ends = [trial["end"] for trial in found["trials"] if trial["end"] is not None]
        assert len(found["trials"]) == len(targets.SETTERS) * targets.TRIALS
        best = next(trial for trial in found["trials"] if trial["end"] == min(ends))
        assert found["set_by"] == {key: best[key] for key in found["set_by"]}


def test_targets_of_other_data_are_said_to_be():
    same = goal(data_sha256=data.fingerprint(data.digits()))
    plan = study.Plan(("adamw",), ("digits", "rows"), 1, 1, {"digits": same, "rows": goal()})
    (note,) = study.other_data(plan)
    assert note.startswith("rows: the target was set on handwritten digits, which is not")


def test_a_target_is_the_median_of_the_best_baselines_seeds(monkeypatch):
    class Fake:
        def __init__(self, config, raw):
            assert config.steps == 3

        def run(self, name, choice, seed):
            loss = {"adamw": 2.0, "sgd": 1.0}[name] + seed / 10
            lost = name == "sgd" and choice == study.choices("sgd", 2)[0]
            return {"held_out": [loss], "diverged_at": 1 if lost else None}

    monkeypatch.setattr(study, "Bench", Fake)
    found = targets.find("digits", SIZES, 2, (1, 3, 2))
    assert found["target"] == pytest.approx(1.2)
    assert found["set_by"]["optimizer"] == "sgd"
    assert [trial["end"] for trial in found["trials"]] == [2, 2, None, 1]


BAD_INPUT = {
    "no file": (["--targets=nowhere.json"], "--targets cannot be read"),
    "no trials": (["--trials=0"], "--trials must be at least 1, got 0"),
    "no seeds": (["--seeds=-1"], "--seeds must be at least 1, got -1"),
    "unknown workload": (["--workload=gpt,mnist"], "no target for --workload, got 'mnist'"),
    "unknown optimizer": (["--optimizers=lionn"], "Did you mean 'lion'?"),
    "sizes of a race": (["--steps=5"], "--steps is fixed in a study"),
    "rates of a race": (["--lr=lion=1"], "--lr is fixed in a study"),
    "nothing to resume": (["--resume", "--out=nowhere"], "found no study to go on with"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, says = BAD_INPUT[name]
    assert cli.main(["race", "--benchmark", *argv]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert says in message
    assert not list(tmp_path.iterdir())


def test_options_of_a_study_need_it(capsys):
    assert cli.main(["race", "--trials=3"]) == 2
    assert "--trials needs --benchmark" in capsys.readouterr().err
