"""What is seen while the race runs: a live table on a terminal, plain lines anywhere else."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from optlab.lab import data, report
from optlab.lab.train import Problem, Runner


def make_console() -> Console:
    """Return where everything is printed."""
    return Console(highlight=False, soft_wrap=True)


def announce(problem: Problem) -> None:
    """Say what is about to be trained, on what, where."""
    config, corpus, work = problem.config, problem.corpus, problem.config.work
    make_console().print(
        f"{work.network}, {report.millions(problem.size)} parameters "
        f"({config.layers} layers, width {config.width}), on "
        f"{data.describe(config)} ({report.size_of(corpus)}). "
        f"{config.steps} steps of {config.tokens_per_step} {work.token}, "
        f"{config.schedule} schedule, seed {config.seed}, {report.device()}."
    )


def announce_resume(values: dict[str, Any], runners: list[Runner]) -> None:
    """Say where the race goes on, and whether the numbers may differ."""
    console = make_console()
    console.print("Resuming at " + ", ".join(f"{r.name} step {r.step}" for r in runners) + ".")
    for name, version in report.versions().items():
        before = values["versions"].get(name)
        if before != version:
            console.print(
                f"Note: {name} was {before} and is now {version}: the last bits may differ."
            )


class _Plain:
    """One line a round."""

    def __init__(self, console: Console, problem: Problem, runners: list[Runner]):
        self._console, self._runners = console, runners
        self._steps = problem.config.steps
        measure = problem.config.work.measure
        console.print(f"{measure[0].upper()}{measure[1:]}:")

    def turn(self, runner: Runner) -> None:
        """Say once that a runner has diverged."""
        if runner.diverged_at is not None:
            self._console.print(
                f"{runner.name} diverged at step {runner.diverged_at} "
                "(its loss is not finite); the others go on."
            )

    def round(self, step: int) -> None:
        """Print where everybody stands."""
        parts = [
            f"{r.name} {r.curve.held_out[-1]:.4f}" for r in self._runners if r.diverged_at is None
        ]
        self._console.print(
            f"step {step:>{len(str(self._steps))}}/{self._steps}  {'  '.join(parts)}"
        )


class _Table:
    """A table redrawn at every turn."""

    def __init__(self, live: Live, problem: Problem, runners: list[Runner]):
        self._live, self._runners = live, runners
        self._steps = problem.config.steps
        live.update(self._draw())

    def turn(self, runner: Runner) -> None:
        """Redraw."""
        self._live.update(self._draw(), refresh=True)

    def round(self, step: int) -> None:
        """Nothing more: the table is up to date."""

    def _draw(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in report.LIVE_HEADINGS:
            table.add_column(heading, justify="left" if heading == "optimizer" else "right")
        alive = [r for r in self._runners if r.curve.held_out and r.diverged_at is None]
        best = min((r.curve.held_out[-1] for r in alive), default=None)
        for runner in self._runners:
            leads = runner in alive and runner.curve.held_out[-1] == best
            style = "bold green" if leads else "red" if runner.diverged_at is not None else ""
            table.add_row(*report.live_row(runner, self._steps), style=style)
        return table


@contextmanager
def display(problem: Problem, runners: list[Runner]) -> Generator[_Plain | _Table]:
    """Open the display that suits where the output goes."""
    console = make_console()
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Plain(console, problem, runners)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield _Table(live, problem, runners)


def conclude(results: dict[str, Any], out: Path) -> None:
    """Print the final table and where the files are."""
    console = make_console()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in report.HEADINGS:
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for place, row in enumerate(report.rows(results)):
        table.add_row(*row, style="bold green" if place == 0 and console.is_terminal else "")
    console.print()
    Console(highlight=False, width=None if console.is_terminal else 120).print(table)
    console.print(f"\nWritten to {out}: curves.png, results.json, summary.md")
