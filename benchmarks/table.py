"""Tables of the benchmarks: plain text for people, JSON for programs, with what they depend on."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "optlab", "jax", "jaxlib", "optax", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc",
)  # fmt: skip


def _versions() -> dict[str, str]:
    installed = {name: next(iter(metadata.distributions(name=name)), None) for name in _PACKAGES}
    found = {name: dist.version for name, dist in installed.items() if dist}
    return {"python": platform.python_version(), **found}


def _commit() -> str:
    """Return the commit, marked where files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        changed = subprocess.check_output(
            [*git, "status", "--porcelain", "-uno", "--", "../optlab", "."], text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + " with changes" * bool(changed)


def about(device: str, seed: int | None = None) -> dict[str, Any]:
    """Return what a measurement depends on, apart from its rows."""
    return {
        "device": device,
        "seed": seed,
        "host": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": _commit(),
        "versions": _versions(),
    }


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def text(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table whose columns line up."""
    heads = list(rows[0])
    lines = [heads, *([_cell(row[head]) for head in heads] for row in rows)]
    wide = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    body = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, wide, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([body[0], "|" + "|".join("-" * (w + 2) for w in wide) + "|", *body[1:]])


def write(
    path: Path, title: str, facts: dict[str, Any], rows: Sequence[dict[str, Any]], notes: str
) -> None:
    """Write PATH.json and PATH.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"about": facts, "rows": list(rows)}
    path.with_suffix(".json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    seed = "" if facts["seed"] is None else f" Seed {facts['seed']}."
    path.with_suffix(".md").write_text(
        f"# {title}\n\n{text(rows)}\n\n{notes}\n\n{facts['device']}; host {facts['host']}; "
        f"{versions}; commit {facts['commit']}.{seed}\n"
    )
