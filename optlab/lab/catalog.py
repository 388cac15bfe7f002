"""The catalogue of optimizers, read from the code: nothing here is kept by hand."""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import recipes

_ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")
HEADINGS = ("family", "name", "what it does", "state bytes/param", "arXiv")


class Row(NamedTuple):
    """One recipe of the catalogue."""

    family: str
    name: str
    summary: str
    state_bytes: float
    arxiv: str | None


def _tree() -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Return a layer large enough that counters and scalars do not show."""
    shapes = {"kernel": (1024, 1024), "bias": (1024,)}
    return {"dense": {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}}


def _state_bytes(make: Callable[..., optax.GradientTransformation]) -> float:
    params = _tree()
    state = jax.tree.leaves(jax.eval_shape(make(1e-3).init, params))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return round(sum(leaf.size * leaf.dtype.itemsize for leaf in state) / size, 2)


def _row(name: str) -> Row:
    make = getattr(recipes, name)
    text = make.__doc__ or ""
    found = _ARXIV.search(text.partition("References:")[2])
    return Row(
        family=make.__module__.split(".")[2].replace("_", " "),
        name=name,
        summary=text.strip().partition("\n")[0],
        state_bytes=_state_bytes(make),
        arxiv=found.group() if found else None,
    )


def rows() -> list[Row]:
    """Return one row for each recipe, family by family."""
    return sorted((_row(name) for name in recipes.__all__), key=lambda row: row[:2])


def _cells(row: Row) -> tuple[str, ...]:
    return row.family, row.name, row.summary, f"{row.state_bytes:g}", row.arxiv or "-"


def markdown() -> str:
    """Return the catalogue as a Markdown table, names as code and papers as links."""
    lines = [HEADINGS, ("---", "---", "---", "---:", "---")]
    for row in rows():
        family, name, summary, state, arxiv = _cells(row)
        link = f"[{arxiv}](https://arxiv.org/abs/{arxiv})" if row.arxiv else arxiv
        lines.append((family, f"`{name}`", summary, state, link))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def show() -> None:
    """Print the catalogue."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in HEADINGS:
        right = heading == "state bytes/param"
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading == "name")
    for row in rows():
        table.add_row(*_cells(row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table)
