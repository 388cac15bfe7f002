"""What the runs of a study say: times to the targets, their spread over seeds, scores."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from optlab.lab import report, score

Record = dict[str, Any]
Runs = dict[str, dict[str, dict[str, list[Record]]]]  # workload, optimizer, kind


class Findings(NamedTuple):
    """Times (seeds, optimizers, workloads), inf where the target was missed."""

    names: list[str]
    workloads: list[str]
    steps: np.ndarray
    seconds: np.ndarray  # of training alone
    with_compile: np.ndarray

    def medians(self, times: np.ndarray) -> np.ndarray:
        """Return the median over seeds, (optimizers, workloads)."""
        return np.median(times, axis=0)

    def scores(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return AlgoPerf's B of the medians, and the least and largest of any one seed."""
        each = np.array([score.scores(of_seed) for of_seed in times])
        return score.scores(self.medians(times)), each.min(0), each.max(0)


def group(study: dict[str, Any]) -> Runs:
    """Return the runs of study.json by workload, optimizer and kind: trial, tuned or default."""
    found: Runs = {}
    for key, record in study["runs"].items():
        workload, name, kind, _ = key.split("/")
        found.setdefault(workload, {}).setdefault(name, {}).setdefault(kind, []).append(record)
    return found


def target(study: dict[str, Any], workload: str) -> float:
    """Return the target of a workload."""
    return study["about"]["targets"][workload]["target"]


def complete(study: dict[str, Any], kind: str = "tuned") -> list[str]:
    """Return the optimizers that every workload has all seeds of, controls included."""
    runs, seeds = group(study), study["about"]["seeds"]
    names = list(dict.fromkeys(name for of in runs.values() for name in of))
    whole = lambda name: all(  # noqa: E731
        len(of.get(name, {}).get(kind, ())) == seeds for of in runs.values()
    )
    return [name for name in names if whole(name)]


def is_control(name: str) -> bool:
    """Whether it is no optimizer of its own; such names are sentences."""
    return " " in name


def find(study: dict[str, Any], names: Iterable[str], kind: str = "tuned") -> Findings:
    """Return the times of these optimizers."""
    runs, names = group(study), list(names)
    steps, seconds, compiling = [], [], []
    for workload, of in runs.items():
        goal = target(study, workload)
        records = [of[name][kind] for name in names]
        steps.append([[time(r, "step", goal) for r in each] for each in records])
        seconds.append([[time(r, "seconds", goal) for r in each] for each in records])
        compiling.append([compile_seconds(of[name]) for name in names])
    of_steps, of_seconds = (np.moveaxis(np.array(t, float), -1, 0) for t in (steps, seconds))
    # (seeds, workloads, optimizers) so far
    both = of_seconds + np.array(compiling)
    turned = (np.swapaxes(times, 1, 2) for times in (of_steps, of_seconds, both))
    return Findings(names, list(runs), *turned)


def time(record: Record, clock: str, goal: float) -> float:
    """Return the steps or the seconds to the target; inf for a miss."""
    found = report.crossing([float(t) for t in record[clock]], record["held_out"], goal)
    return np.inf if found is None else found


def compile_seconds(kinds: dict[str, list[Record]]) -> float:
    """Return what compiling an optimizer took; its other runs shared that."""
    return max(record["compile_seconds"] for records in kinds.values() for record in records)


def ends(records: list[Record]) -> list[float]:
    """Return where the curves end; inf where they diverged."""
    return [r["held_out"][-1] if r["diverged_at"] is None else np.inf for r in records]


def winner(found: Findings, workload: int) -> tuple[str | None, list[str]]:
    """Return who is first by the median of steps, and whom the seeds do not tell apart from it.

    Two are told apart where every seed of one is faster than every seed of the other.
    """
    times = found.steps[:, :, workload]
    order = np.argsort(np.median(times, axis=0), kind="stable")
    first = order[0]
    if not np.isfinite(np.median(times[:, first])):
        return None, []
    slowest = times[:, first].max()
    fastest = times.min(0)
    alike = [found.names[i] for i in order[1:] if np.isfinite(fastest[i]) and fastest[i] <= slowest]
    return found.names[first], alike
