"""Targets of the study: python -m optlab.lab.targets [FILE]

What a tuned baseline reaches in three quarters of a study's steps, written once to targets.json and
frozen there with the sizes it holds for, the trials and the seeds that made it. AdamW and SGD with
momentum search the study's own space with its own budget; the better one trains with new seeds, and
the target is the median of where they end.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optlab.lab import data, report, study
from optlab.lab.config import BadInput
from optlab.lab.workloads import WORKLOADS

FROZEN = Path(__file__).with_name("targets.json")
SETTERS = ("adamw", "sgd")
TRIALS, SEEDS = study.TRIALS, (101, 102, 103, 104, 105)
PART = 0.75
SIZES: dict[str, dict[str, int]] = {
    # Two thirds of the quick race's network: what is left fits a study into a quarter of an hour.
    "gpt": {**WORKLOADS["gpt"].presets["quick"], "layers": 2, "steps": 400},
    "digits": dict(WORKLOADS["digits"].presets["quick"]),
    "rows": dict(WORKLOADS["rows"].presets["quick"]),
}


def load(path: str | None, names: tuple[str, ...]) -> dict[str, Any]:
    """Return sizes and target of each workload, frozen or from a file."""
    source = Path(path) if path else FROZEN
    try:
        known = json.loads(source.read_text(encoding="utf-8"))["workloads"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(
            f"race: --targets cannot be read, got {str(source)!r}. "
            "Make the file with: python -m optlab.lab.targets FILE"
        ) from None
    missing = [name for name in names if name not in known]
    if missing:
        raise BadInput(
            f"race: {str(source)!r} has no target for --workload, got {missing[0]!r}. "
            f"It has {', '.join(known)}."
        )
    return {name: known[name] for name in names or known}


def _end(record: study.Record) -> float:
    return np.inf if record["diverged_at"] is not None else record["held_out"][-1]


def find(
    workload: str, sizes: Mapping[str, int], trials: int = TRIALS, seeds: tuple[int, ...] = SEEDS
) -> dict[str, Any]:
    """Tune the baselines on a workload and return its target, with all that made it."""
    raw, steps = data.read(workload, None), int(PART * sizes["steps"])
    config = study.config_of(workload, {**sizes, "steps": steps}, raw)
    bench = study.Bench(config, raw)
    tried = {}
    for name in SETTERS:
        for choice in study.choices(name, trials):
            tried[name, choice] = _end(bench.run(name, choice, study.TUNING_SEED))
            print(f"{workload} {name} {choice}: {tried[name, choice]:.4f}", flush=True)
    name, choice = min(tried, key=lambda key: tried[key])
    ends = {seed: _end(bench.run(name, choice, seed)) for seed in seeds}
    return {
        "sizes": dict(sizes),
        "target": float(np.median(list(ends.values()))),
        "measure": config.work.measure,
        "data": data.describe(config),
        "data_sha256": config.text_sha256,
        "steps": steps,
        "set_by": {"optimizer": name, **choice._asdict()},
        "seeds": ends,
        "trials": [
            {"optimizer": who, **asked._asdict(), "end": end if np.isfinite(end) else None}
            for (who, asked), end in tried.items()
        ],
    }


def main(path: Path) -> None:
    """Make the targets of all workloads; those that are there already with these sizes are kept."""
    made: dict[str, Any] = {
        "versions": report.versions(),
        "device": report.device(),
        "workloads": {},
    }
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else made
    for name, sizes in SIZES.items():
        if known["workloads"].get(name, {}).get("sizes") != sizes:
            known["workloads"][name] = find(name, sizes)
            report.write_whole(path, json.dumps(known, indent=1, allow_nan=False) + "\n")
        print(f"{name}: {known['workloads'][name]['target']:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else FROZEN)
