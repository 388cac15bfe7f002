"""`optlab race` and `optlab list` from the command line: whole runs, and every wrong input."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

import optlab
from optlab.lab import catalog, cli, figure, live, optimizers, race, report
from optlab.lab.checkpoint import FOLDER

TEXT = "".join(f"def f{i}(x):\n    return x * {i} + {i * i}\n\n" for i in range(200))
SIZES = ["--layers=1", "--width=16", "--heads=2", "--context=16", "--batch-size=4", "--seed=3"]
PAIR = ["--optimizers=adamw,lion", "--lr=adamw=1e-2", "--lr=lion=3e-3", "--steps=60"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "functions.py"
    path.write_text(TEXT)
    return f"--text={path}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """The folder of a race that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["race", text, *SIZES, *PAIR, f"--out={out}"]) == 0
    (out / "printed.txt").write_text(printed.getvalue())
    return out


def read(out):
    return json.loads((out / "results.json").read_text())


def test_race_learns_and_says_so(whole):
    results = read(whole)
    assert list(results["losses"]) == ["adamw", "lion"]
    for name, losses in results["losses"].items():
        assert losses["step"] == list(range(3, 61, 3))
        assert losses["final"] == losses["held_out"][-1] < losses["held_out"][0] - 1
        assert results["timings"][name]["seconds"] == sorted(results["timings"][name]["seconds"])
        assert 0 < results["timings"][name]["optimizer_share"] < 1
        # Counters add some bytes to AdamW's two moments and Lion's one.
        moments = {"adamw": 8, "lion": 4}[name]
        assert moments <= losses["state_bytes_per_parameter"] < moments + 0.01
    assert results["losses"]["adamw"]["steps_to_adamw"] <= 60
    assert results["config"]["learning_rates"] == {"adamw": 1e-2, "lion": 3e-3}
    assert results["seed"] == 3
    assert {"optlab", "jax", "flax"} <= set(results["versions"])


def test_race_writes_picture_and_summary(whole):
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = (whole / "summary.md").read_text()
    assert "| adamw | 0.01 |" in summary
    assert "functions.py" in summary
    assert not list(whole.glob("*part*"))


def test_plain_lines_without_a_terminal(whole):
    printed = (whole / "printed.txt").read_text()
    lines = printed.splitlines()
    assert sum(line.startswith("step ") for line in lines) == 20
    assert any(line.startswith("step 60/60  adamw ") for line in lines)
    assert "\x1b" not in printed


def test_alone_on_a_terminal_the_numbers_are_the_same(whole, text, tmp_path, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    monkeypatch.setattr(live, "make_console", lambda: terminal)
    argv = ["race", text, *SIZES, "--optimizers=lion", "--lr=lion=3e-3", "--steps=60"]
    assert cli.main([*argv, f"--out={tmp_path}"]) == 0
    for heading in ("train loss", "held-out loss", "tokens/s", "optimizer's share", "60/60"):
        assert heading in screen.getvalue()
    alone, beside = read(tmp_path)["losses"]["lion"], read(whole)["losses"]["lion"]
    assert alone["held_out"] == beside["held_out"]
    assert alone["steps_to_adamw"] is None


def start(argv):
    code = "import sys; from optlab.lab.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, *argv], stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(process, out, after):
    """Wait until a checkpoint with a number above `after` is there; return its number."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        names = os.listdir(out / FOLDER) if (out / FOLDER).is_dir() else []
        number = max((int(name) for name in names if name.isdigit()), default=0)
        if number > after:
            return number
        time.sleep(0.005)
    pytest.fail(f"no checkpoint: {process.communicate()[1]}")


def test_killed_and_resumed_equals_uninterrupted(whole, text, tmp_path, capsys):
    argv = ["race", text, *SIZES, *PAIR, f"--out={tmp_path}"]
    first = start(argv)
    number = wait_for_checkpoint(first, tmp_path, 0)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL

    assert cli.main(argv) == 2
    assert "Add --resume" in capsys.readouterr().err

    second = start([*argv, "--resume"])
    wait_for_checkpoint(second, tmp_path, number)
    second.send_signal(signal.SIGINT)
    message = second.communicate(timeout=60)[1]
    assert second.returncode == 130
    assert f"To go on: optlab race {text}" in message
    assert message.rstrip().endswith("--resume")
    assert not (tmp_path / "results.json").exists()

    assert cli.main([*argv, "--resume"]) == 0
    assert read(tmp_path)["losses"] == read(whole)["losses"]
    # What the command line leaves out is taken from the checkpoint.
    assert cli.main(["race", f"--out={tmp_path}", "--resume"]) == 0
    assert read(tmp_path) == read(whole) | {"timings": read(tmp_path)["timings"]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("--seed=4", "seed was 3, got 4"),
        ("--steps=61", "steps was 60, got 61"),
        ("--optimizers=lion", "optimizers was adamw,lion, got lion"),
        ("--lr=lion=1", "learning_rates was lion=0.003, got lion=1"),
        ("--lr=lamb=1", "learning_rates was no lamb, got lamb=1"),
    ],
)
def test_resume_refuses_another_race(whole, change, says, capsys):
    assert cli.main(["race", f"--out={whole}", "--resume", change]) == 2
    assert says in only_line(capsys)


def test_resume_refuses_another_text(text, tmp_path, capsys):
    copy = tmp_path / "text.py"
    copy.write_text(TEXT)
    argv = ["race", f"--text={copy}", *SIZES, "--optimizers=sgd", "--steps=2"]
    assert cli.main([*argv, f"--out={tmp_path}"]) == 0
    copy.write_text(TEXT.replace("return", "RETURN"))
    capsys.readouterr()
    assert cli.main(["race", f"--out={tmp_path}", "--resume"]) == 2
    assert "needs the text the race began with" in only_line(capsys)


def only_line(capsys):
    """What stderr says: one line, and no traceback."""
    message = capsys.readouterr().err
    assert message.endswith("\n")
    assert message.count("\n") == 1
    return message


def test_diverged_is_said_and_the_others_go_on(text, tmp_path, capsys):
    argv = ["race", text, *SIZES, "--optimizers=sgd,adamw", "--lr=sgd=1e30", "--steps=20"]
    assert cli.main([*argv, "--schedule=constant", f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "sgd diverged at step" in printed
    losses = read(tmp_path)["losses"]
    assert losses["sgd"]["final"] is None
    assert losses["sgd"]["diverged_at"] < 20
    assert losses["adamw"]["step"][-1] == 20
    assert "diverged at step" in (tmp_path / "summary.md").read_text()
    # It stays diverged when the finished race is opened again.
    assert cli.main(["race", f"--out={tmp_path}", "--resume"]) == 0
    assert read(tmp_path)["losses"] == losses


def test_all_diverged_still_has_a_report(whole, tmp_path):
    results = read(whole)
    for name, losses in results["losses"].items():
        for key in ("step", "train", "held_out"):
            losses[key] = losses[key][: 1 if name == "lion" else 0]
        results["timings"][name]["seconds"] = results["timings"][name]["seconds"][:1]
        losses.update(final=None, diverged_at=4, steps_to_adamw=None)
    results["timings"]["adamw"]["seconds"] = []
    figure.write(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()
    assert report.summary(results).count("diverged at step 4") == 2


BAD_INPUT = {
    "missing file": (["--text=nowhere.txt"], "--text cannot be read"),
    "folder as text": (["--text=."], "--text cannot be read"),
    "unknown optimizer": (["--optimizers=adamw,lionn"], "Did you mean 'lion'?"),
    "no optimizer": (["--optimizers=,"], "--optimizers is empty"),
    "twice the same": (["--optimizers=lion,lion"], "got 'lion' twice"),
    "unknown preset": (["--preset=huge"], "quick, small, medium, got 'huge'"),
    "unknown schedule": (["--schedule=wds"], "Did you mean 'wsd'?"),
    "rate without a value": (["--lr=lion"], "NAME=RATE"),
    "rate without a name": (["--lr==1"], "NAME=RATE"),
    "rate not a number": (["--lr=lion=fast"], "NAME=RATE"),
    "negative rate": (["--lr=lion=-1"], "NAME=RATE"),
    "infinite rate": (["--lr=lion=inf"], "NAME=RATE"),
    "rate of a stranger": (["--lr=nobody=1"], "--lr has no optimizer of that name"),
    "rate of one not racing": (["--optimizers=sgd", "--lr=lion=1"], "does not race, got 'lion'"),
    "no steps": (["--steps=0"], "--steps must be at least 1, got 0"),
    "no windows": (["--batch-size=0"], "--batch-size must be at least 1"),
    "negative seed": (["--seed=-1"], "--seed must lie between 0 and 2**31 - 1, got -1"),
    "heads that do not divide": (["--width=30"], "multiple of --heads"),
    "nothing to resume": (["--resume", "--out=nowhere"], "found no checkpoint"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, says = BAD_INPUT[name]
    assert cli.main(["race", *argv]) == 2
    message = only_line(capsys)
    assert message.startswith("race: ")
    assert says in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "says"), [("", "is empty"), ("short", "is too short, got 5")])
def test_bad_text_is_one_line(content, says, capsys, tmp_path):
    path = tmp_path / "text"
    path.write_text(content)
    assert cli.main(["race", f"--text={path}", f"--out={tmp_path}"]) == 2
    assert says in only_line(capsys)


def test_missing_extra_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["race"]) == 2
    message = only_line(capsys)
    assert "needs tyro" in message
    assert 'pip install "optlab[race]"' in message


def test_the_library_does_not_import_the_lab():
    code = (
        "import sys, optlab; extras = {'flax', 'orbax', 'rich', 'matplotlib', 'tyro', 'optlab.lab'}"
        "; print(sorted(extras & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_list_prints_everything_public(capsys):
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    rows = [*catalog.rows(), *catalog.parts()]
    names = {row.name for row in rows}
    assert set(optlab.__all__) - {"diagnostics"} <= names
    assert {f"diagnostics.{name}" for name in optlab.diagnostics.__all__} <= names
    for row in rows:
        assert re.search(
            rf"^{row[0]} +{re.escape(row.name)} +{re.escape(row.summary)}", printed, re.M
        )


def test_default_race_is_known_and_has_rates():
    optimizers.check_names(race.DEFAULT_OPTIMIZERS)
    optimizers.check_schedule(race.DEFAULT_SCHEDULE)
    assert {"adamw", "muon", "normuon"} <= set(race.DEFAULT_OPTIMIZERS)
