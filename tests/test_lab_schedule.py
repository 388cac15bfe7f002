"""`optlab schedule`: what it draws, how far, and every wrong input."""

import io
import re

import numpy as np
import optax
import pytest

from optlab import schedules
from optlab.lab import chart, cli, schedule

ARGUMENTS = {
    "branch": ("schedule=infinite(1.0, 0.4, 10, 40)", "at_step=90", "decay_steps=20"),
    "cyclic_cosine": ("peak_value=1", "cycle_steps=10", "peak_decay=0.9"),
    "damped_cosine": ("peak_value=1", "decay_steps=100"),
    "infinite": ("peak_value=1", "constant_value=.4", "warmup_steps=10", "cooldown_steps=90"),
    "inverse_power": ("init_value=1",),
    "refined": ("values=[0.5, 1, 0.25]", "total_steps=100", "interpolation=previous"),
    "slanted_triangular": ("peak_value=1", "total_steps=100"),
    "warmup_linear_decay": ("peak_value=1", "warmup_steps=10", "total_steps=100"),
    "wsd": ("peak_value=1", "warmup_steps=10", "stable_steps=70", "decay_steps=20"),
    "wsd_s": ("peak_value=1", "warmup_steps=10", "cycle_ends=50,100", "decay=linear"),
}
# The last step drawn: where it settles and a tenth more, or four times its own steps.
HORIZONS = {
    "branch": 121,
    "cyclic_cosine": 40,
    "infinite": 107,  # a cosine is within a thousandth of its end before it is there
    "inverse_power": 40_000,
    "refined": 74,
}


@pytest.mark.parametrize("name", schedules.__all__)
def test_every_schedule_is_drawn_to_where_it_stays(name):
    given = schedule.parse(ARGUMENTS[name])
    made = getattr(schedules, name)(**given)
    end = schedule.horizon(made, given)
    assert end == pytest.approx(HORIZONS.get(name, 110), abs=2)
    x, values = schedule.sample(made, end)
    assert x[-1] == end
    np.testing.assert_array_equal(values[:50], np.asarray(made(x), float)[:50])


def test_the_command_prints_a_curve_and_saves_the_picture(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["schedule", "branch", *ARGUMENTS["branch"]]) == 0
    printed = capsys.readouterr().out
    assert "⣀" in printed
    assert "0 at step 0, greatest 1 at step 10, 0 at step 121." in printed
    picture = tmp_path / "runs" / "schedule-branch.png"
    assert f"Picture: {picture.relative_to(tmp_path)}" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]


def test_without_a_name_it_lists_ours_and_optaxs(capsys):
    assert cli.main(["schedule"]) == 0
    printed = capsys.readouterr().out
    for name in (*schedules.__all__, "sgdr_schedule", "warmup_cosine_decay_schedule"):
        assert f" {name} " in printed
    assert "inject_hyperparams" not in printed


def test_a_schedule_of_optax_takes_lists_and_dicts():
    words = "key=[word, {'init_value': 0.0}, (1, two)]"
    assert schedule.parse((words,)) == {"key": ["word", {"init_value": 0.0}, [1, "two"]]}
    cycles = "[{'init_value': 0.0, 'peak_value': 1.0, 'warmup_steps': 2, 'decay_steps': 9}]"
    given = schedule.parse((f"cosine_kwargs={cycles}",))
    assert float(schedule.known()["sgdr_schedule"](**given)(2)) == 1.0


@pytest.mark.parametrize("suffix", [".npy", ".txt"])
def test_a_table_is_read_from_a_file(tmp_path, suffix):
    path = tmp_path / f"table{suffix}"
    (np.save if suffix == ".npy" else np.savetxt)(path, [0.5, 1.0, 0.25])
    np.testing.assert_array_equal(schedule.parse((f"values=@{path}",))["values"], [0.5, 1, 0.25])


WSD = ("wsd", *ARGUMENTS["wsd"])
BAD_INPUT = {
    "unknown name": (["wds"], "Did you mean 'wsd'?"),
    "unknown name inside": (["branch", "schedule=wds(1)"], "Did you mean 'wsd'?"),
    "no value": (["wsd", "peak_value"], "are written key=value"),
    "no key": (["wsd", "=1"], "are written key=value"),
    "twice": ([*WSD, "peak_value=2"], "got 'peak_value=2' twice"),
    "one missing": (["wsd", "peak_value=1"], "missing a required argument: 'warmup_steps'"),
    "not a number": ([*WSD, "end_value=low"], "end_value must be a number >= 0, got 'low'"),
    "a call of anything": ([*WSD, "end_value=print(1)"], "there is none of that name, got 'print'"),
    "refused by optax": (["polynomial_schedule"], "missing 4 required positional arguments"),
    "no file": (["refined", "values=@nowhere.npy"], "@nowhere.npy cannot be read"),
    "no steps": ([*WSD, "--steps=0"], "--steps must lie between 1 and 2**31 - 2, got 0"),
    "negative": (["constant_schedule", "value=-1"], "finite and >= 0, got -1 at step 0"),
    "not a picture": ([*WSD, "--out=a.docx"], "Write a path that ends in .png."),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, says = BAD_INPUT[name]
    assert cli.main(["schedule", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert says in printed.err
    assert not list(tmp_path.iterdir())


def test_a_straight_line_is_a_diagonal_of_dots():
    x = np.arange(9)
    lines = chart.draw(x, x / 8, width=8, height=2).split("\n")
    assert lines == ["  1 │⠀⣠⠞", "  0 │⡴⠃⠀", "    └───", "     048"]


def test_a_jump_is_a_line_over_the_whole_height():
    y = np.where(np.arange(100) < 54, 0.0, 2.0)
    rows = chart.draw(np.arange(100), y, width=23, height=4, plain=True).split("\n")
    assert [row[3:].rstrip() for row in rows[:4]] == [
        "          **********",
        "          *",
        "          *",
        "***********",
    ]
    assert "|" in rows[0]


def test_a_terminal_without_braille_gets_ascii(tmp_path, monkeypatch):
    printed = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", printed)
    assert cli.main(["schedule", *WSD, f"--out={tmp_path / 'wsd.png'}"]) == 0
    printed.seek(0)
    assert re.search(r"  1 \| +\*{8}", printed.read())  # as wide as the terminal


def test_all_zeros_are_a_line_at_the_bottom():
    x = np.arange(30)
    rows = chart.draw(x, optax.constant_schedule(0.0)(x) * x, width=30, height=3, plain=True)
    assert rows.split("\n")[2].count("*") == 25
