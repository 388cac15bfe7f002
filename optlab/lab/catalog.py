"""The catalogue, read from the code: nothing here is kept by hand."""

import re
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optlab
from optlab import diagnostics, recipes

if TYPE_CHECKING:
    from rich.table import Table

_ARXIV = re.compile(r"\b\d{4}\.\d{4,5}\b")
HEADINGS = ("family", "name", "what it does", "state bytes/param", "arXiv")
PART_HEADINGS = ("room", "name", "what it does", "arXiv")


class Row(NamedTuple):
    """One recipe of the catalogue."""

    family: str
    name: str
    summary: str
    state_bytes: float
    arxiv: str | None


class Part(NamedTuple):
    """Something public that is no recipe, and the subpackage it lives in."""

    room: str
    name: str
    summary: str
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
    summary, arxiv = _read(make)
    family = make.__module__.split(".")[2].replace("_", " ")
    return Row(family, name, summary, _state_bytes(make), arxiv)


def _read(thing: Any) -> tuple[str, str | None]:
    """Return the first line of a docstring and its first arXiv number."""
    text = thing.__doc__ or ""
    found = _ARXIV.search(text.partition("References:")[2])
    return text.strip().partition("\n")[0], found.group() if found else None


def rows() -> list[Row]:
    """Return one row for each recipe, family by family."""
    return sorted((_row(name) for name in recipes.__all__), key=lambda row: row[:2])


def parts() -> list[Part]:
    """Return one row for everything public that is no recipe, room by room."""
    public = {name: getattr(optlab, name) for name in optlab.__all__ if name not in recipes.__all__}
    del public["diagnostics"]  # a room of functions, each of which gets its row
    public |= {f"diagnostics.{name}": getattr(diagnostics, name) for name in diagnostics.__all__}
    return sorted(Part(_room(thing), name, *_read(thing)) for name, thing in public.items())


def _room(thing: Any) -> str:
    path = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
    return path.split(".")[1]


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
    """Print the catalogue: optimizers, and below them what they and others are made with."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(_table("Optimizers", HEADINGS, map(_cells, rows())))
    console.print()
    found = ((part.room, part.name, part.summary, part.arxiv or "-") for part in parts())
    console.print(_table("Everything else", PART_HEADINGS, found))


def _table(title: str, headings: Iterable[str], lines: Iterable[tuple[str, ...]]) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        right = heading == "state bytes/param"
        table.add_column(heading, justify="right" if right else "left", no_wrap=heading == "name")
    for line in lines:
        table.add_row(*line)
    return table
