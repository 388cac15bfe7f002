"""The race: optimizers take turns on the same problem, and can be stopped and resumed."""

import dataclasses
import signal
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from optlab.lab import config as configs
from optlab.lab import data, figure, live, optimizers, report
from optlab.lab.checkpoint import Checkpoints
from optlab.lab.config import BadInput, Config
from optlab.lab.train import Problem, Program, Runner, make_problem

# One of each family beside the baseline.
DEFAULT_OPTIMIZERS = ("adamw", "muon", "normuon", "signum", "nap", "lars")
DEFAULT_SCHEDULE = "wsd"


class Interrupted(Exception):
    """Ctrl-C was pressed and the race is saved."""


def folder(out: str | None, preset: str | None, workload: str | None = None) -> Path:
    """Return the folder of a race."""
    of = "" if workload in (None, "gpt") else f"{workload}-"
    return Path(out) if out else Path("runs") / f"race-{of}{preset or 'quick'}"


def new_config(asked: Mapping[str, Any], text: bytes) -> Config:
    """Return the race that the command line asks for; what it does not say is the preset's."""
    workload = asked.get("workload", "gpt")
    configs.refuse_strangers(asked, workload)
    fields: dict[str, Any] = {
        "preset": "quick",
        "optimizers": DEFAULT_OPTIMIZERS,
        "schedule": DEFAULT_SCHEDULE,
        "text": None,
        "text_sha256": data.fingerprint(text),
        "seed": 0,
        **configs.preset(asked.get("preset", "quick"), workload),
        **asked,
    }
    rates = asked.get("learning_rates", {})
    optimizers.check_names(fields["optimizers"])
    optimizers.check_names(tuple(rates), "--lr")
    optimizers.check_schedule(fields["schedule"])
    fields["learning_rates"] = optimizers.learning_rates(fields["optimizers"], rates)
    return configs.check(Config(**fields))


def saved_config(values: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[Config, bytes]:
    """Return the saved race and its text, or refuse what differs from it."""
    saved = Config.from_json(values["config"])
    configs.refuse_changes(saved, asked)
    text = data.read(saved.workload, saved.text)
    if data.fingerprint(text) != saved.text_sha256:
        raise BadInput(
            "race: --resume needs the text the race began with, got another one in "
            f"{saved.text or data.describe(saved)}. Start another race with another --out."
        )
    return saved, text


@contextmanager
def _interrupt() -> Generator[list[bool]]:
    """Turn the first Ctrl-C into a flag read between turns; the second stops at once."""
    pressed: list[bool] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        print("\nrace: stopping after this turn (again: at once) ...", file=sys.stderr)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def save(checkpoints: Checkpoints, config: Config, runners: list[Runner]) -> None:
    """Write one checkpoint of all runners."""
    saved = {runner.name: runner.save() for runner in runners}
    checkpoints.save(
        {name: arrays for name, (arrays, _) in saved.items()},
        {
            "config": dataclasses.asdict(config),
            "versions": report.versions(),
            "runners": {name: values for name, (_, values) in saved.items()},
        },
    )


def restore(checkpoints: Checkpoints, values: dict[str, Any], runners: list[Runner]) -> None:
    """Bring all runners to where the checkpoint left them."""
    like = {runner.name: runner.save()[0] for runner in runners}
    arrays = checkpoints.read_arrays(like)
    for runner in runners:
        runner.restore(arrays[runner.name], values["runners"][runner.name])


def new_runner(name: str, problem: Problem) -> Runner:
    """Return an optimizer at the start, with the race's rate and schedule."""
    program = Program(problem, lambda setting: optimizers.build(name, problem.config))
    return Runner(name, program, problem.params)


def take_turns(problem: Problem, runners: list[Runner], checkpoints: Checkpoints) -> None:
    """Advance the runner that is furthest behind until all have arrived, saving every round."""
    config = problem.config
    with _interrupt() as pressed, live.display(problem, runners) as show:
        done = min(runner.step for runner in runners)
        while racing := [runner for runner in runners if runner.racing]:
            runner = min(racing, key=lambda runner: runner.step)
            runner.advance()
            show.turn(runner)
            behind = min((r.step for r in runners if r.racing), default=config.steps)
            if pressed or behind > done:
                save(checkpoints, config, runners)
            if pressed:
                raise Interrupted
            if behind > done:
                done = behind
                show.round(done)


def _open(
    checkpoints: Checkpoints, asked: Mapping[str, Any], resume: bool
) -> tuple[Config, bytes, dict[str, Any] | None]:
    if resume:
        values = checkpoints.read_values()
        return *saved_config(values, asked), values
    text = data.read(asked.get("workload", "gpt"), asked.get("text"))
    config = new_config(asked, text)
    if checkpoints.exists() and _unfinished(checkpoints.read_values()):
        raise BadInput(
            f"race: the folder holds an unfinished race, got {str(checkpoints.folder.parent)!r}. "
            "Add --resume to continue it, or choose another --out, or delete that folder."
        )
    return config, text, None


def _unfinished(values: dict[str, Any]) -> bool:
    steps = values["config"]["steps"]
    return any(r["step"] < steps and r["diverged_at"] is None for r in values["runners"].values())


def run(asked: Mapping[str, Any], *, out: str | None = None, resume: bool = False) -> Path:
    """Run a race, or what is left of it, and return the folder with its results."""
    target = folder(out, asked.get("preset"), asked.get("workload"))
    checkpoints = Checkpoints(target)
    config, text, values = _open(checkpoints, asked, resume)
    problem = make_problem(config, text)
    live.announce(problem)
    runners = [new_runner(name, problem) for name in config.optimizers]
    if values:
        restore(checkpoints, values, runners)
        live.announce_resume(values, runners)
    else:
        checkpoints.clear()
    take_turns(problem, runners, checkpoints)
    results = report.results(problem, runners)
    report.write(results, target)
    figure.write(results, target / "curves.png")
    live.conclude(results, target)
    return target
