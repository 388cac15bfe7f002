"""`optlab race --benchmark` and `--report`: a study from the command line, and the page of it."""

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from optlab.lab import live, optimizers, page_race, page_study, race, report, study, targets
from optlab.lab.config import BadInput
from optlab.lab.workloads import WORKLOADS

PAGE = "report.html"


def folder(out: str | None) -> Path:
    """Return the folder of a study."""
    return Path(out) if out else Path("runs") / "benchmark"


def new_plan(
    names: tuple[str, ...],
    workloads: tuple[str, ...],
    *,
    trials: int | None,
    seeds: int | None,
    path: str | None,
) -> study.Plan:
    """Return the study that the command line asks for."""
    names = names or study.DEFAULT_OPTIMIZERS
    optimizers.check_names(names)
    optimizers.learning_rates(names, {})
    for name, value in (("trials", trials), ("seeds", seeds)):
        if value is not None and value < 1:
            raise BadInput(f"race: --{name} must be at least 1, got {value}.")
    return study.Plan(
        names, workloads or tuple(WORKLOADS), trials or study.TRIALS, seeds or study.SEEDS,
        targets.load(path, workloads or tuple(WORKLOADS)),
    )  # fmt: skip


def run(plan: study.Plan, *, out: str | None = None, resume: bool = False) -> Path:
    """Run a study, or what is left of it, and return the folder with its page."""
    target, notes = folder(out), study.other_data(plan)
    store = study.Store(target, {**plan.about(), "notes": notes})
    if resume:
        store.resume()
    elif store.path.exists():
        raise BadInput(
            f"race: the folder holds a study, got {str(target)!r}. "
            "Add --resume to go on with it, or choose another --out, or delete that folder."
        )
    _announce(plan, notes)
    try:
        with _progress(plan.size()) as show:
            for key, record in study.work(plan, store):
                show(key, record)
    except KeyboardInterrupt:
        raise race.Interrupted from None
    _conclude(write_page(target), study.read(target))
    return target


def _announce(plan: study.Plan, notes: list[str]) -> None:
    console = live.make_console()
    console.print(
        f"{len(plan.optimizers)} optimizers, {plan.trials} trials and {plan.seeds} seeds each on "
        f"{', '.join(plan.workloads)}: {plan.size()} runs on {report.device()}."
    )
    for name, who, part in plan.controls():
        console.print(f"Control of {name}: {who} at {part:g} of its rate.")
    for note in notes:
        console.print(f"Note: {note}")


@contextmanager
def _progress(runs: int) -> Generator[Callable[[str, Mapping[str, Any]], None]]:
    """Open a bar on a terminal, and print a line a run anywhere else."""
    console = live.make_console()
    if not console.is_terminal or console.is_dumb_terminal:
        yield lambda key, record: console.print(f"{key}: {_end(record)}")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("starting", total=runs)
        yield lambda key, record: bar.update(task, advance=1, description=f"{key} {_end(record)}")


def _end(record: Mapping[str, Any]) -> str:
    if record["diverged_at"] is not None:
        return f"diverged at step {record['diverged_at']}"
    return f"{record['held_out'][-1]:.4f}"


def _conclude(path: Path, of_study: dict[str, Any]) -> None:
    headings, rows = page_study.standing(of_study)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for row in rows:
        table.add_row(*row)
    console = live.make_console()
    console.print()
    Console(highlight=False, width=None if console.is_terminal else 160).print(table)
    console.print(f"\nMedian steps to the target, range over seeds. Written to {path}")


def write_page(where: Path) -> Path:
    """Write the page of what is in a folder, a study or a race, and return its path."""
    path = where / PAGE
    if (where / study.STORE).exists():
        report.write_whole(path, page_study.write(study.read(where)))
        return path
    try:
        results = json.loads((where / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise BadInput(
            f"race: --report finds neither a finished race nor a study, got {str(where)!r}. "
            "Name the folder with --out."
        ) from None
    report.write_whole(path, page_race.write(results))
    return path
