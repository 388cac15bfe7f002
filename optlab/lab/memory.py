"""What each optimizer's state costs for a model, from shapes; with what the numbers assume."""

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from optlab import (
    compressed_bytes,
    describe,
    layout,
    state_bytes,
    state_fields,
)
from optlab.lab import models, optimizers, shape_files
from optlab.lab.config import BadInput

LAYOUTS = {
    "flax": layout.flax,
    "per_head": layout.per_head,
    "by_ndim": layout.by_ndim,
    "output_first": layout.output_first,
}
BITS = (16, 8, 4)
HEADINGS = ("optimizer", "GB", "GiB", "bytes/param", *(f"{bits}-bit GB" for bits in BITS))
BASIS = (
    "State bytes of whole arrays, not per device; GB = 10^9 bytes, GiB = 2^30. Gradients, weights "
    "and activations are not in them. 16-bit: if every float array of state with at least 4096 "
    "elements were bfloat16. 8-bit, 4-bit: with optlab.quantize_state around it, which keeps its "
    "large moments as int8 or int4 and a float32 scale for each 128."
)
_SHOWN = 0.005  # share of the state from which on a field is named


class Subject(NamedTuple):
    """The parameters whose optimizer state is asked for, and what to say of them."""

    title: str
    params: Any
    policy: layout.Policy
    rank: int | None  # None: each recipe's own default


class Row(NamedTuple):
    """One optimizer."""

    name: str
    plain: int
    predicted: tuple[int, ...]  # at `BITS`
    assumptions: str


def of_model(name: str, *, dtype: str | None, stacked: bool, rank: int | None) -> Subject:
    """Return a model by name; its rank, unless given, is a quarter of its width."""
    shapes = models.model(name)
    params = models.tree(shapes, dtype or "float32", stacked=stacked)
    policy = models.STACKED if stacked else layout.flax
    return Subject(_title(name, params), params, policy, rank or shapes.width // 4)


def of_file(
    path: str, *, dtype: str | None, subtree: str | None, policy: str | None, rank: int | None
) -> Subject:
    """Return the parameters in a file, read with the layout of that name."""
    policy = policy or "flax"
    if policy not in LAYOUTS:
        raise BadInput(f"memory: --layout must be one of {', '.join(LAYOUTS)}, got {policy!r}.")
    if dtype is not None:
        models.check_dtype(dtype)
    params, others = shape_files.read(path, subtree=subtree, dtype=dtype)
    try:
        describe(params, layout=LAYOUTS[policy])
    except ValueError as error:
        raise BadInput(
            f"memory: {path!r}: {error} On the command line, write --layout by_ndim: stacks of "
            "(in, out); or output_first: PyTorch's convolutions."
        ) from None
    title = _title(path, params)
    if others:
        title += f" (left out: {others} that {'is' if others == 1 else 'are'} no array of floats)"
    return Subject(title, params, LAYOUTS[policy], rank)


def _title(name: str, params: Any) -> str:
    leaves = jax.tree.leaves(params)
    size = sum(leaf.size for leaf in leaves)
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
    giga = _short(nbytes / 1e9)
    return f"{name}: {size:,} parameters in {len(leaves)} leaves, {dtypes}, {giga} GB"


def row(name: str, subject: Subject) -> Row:
    """Return one optimizer's bytes; it gets `rank` and `layout` where it has such keywords."""
    recipe = optimizers.recipe(name)
    known = inspect.signature(recipe).parameters
    given: dict[str, Any] = {"layout": subject.policy} if "layout" in known else {}
    rank = known["rank"].default if "rank" in known else None
    # A default that is no number, such as Conda's "full", is what the method is.
    if subject.rank is not None and isinstance(rank, int | float):
        rank = given["rank"] = subject.rank
    try:
        tx = recipe(1e-3, **given)
        routing = describe(subject.params, tx, layout=subject.policy)
    except ValueError as error:
        raise BadInput(f"memory: {name}: {error}") from None
    shown = "" if rank is None else f"rank {rank}; "
    fields = ", ".join(_what(state_fields(tx, subject.params))) or "No state"
    return Row(
        name,
        state_bytes(tx, subject.params),
        tuple(compressed_bytes(tx, subject.params, bits) for bits in BITS),
        f"{shown}{'; '.join(_who(routing))}. {fields}.",
    )


def _who(routing: layout.Routing) -> Iterator[str]:
    """Say which leaves are in which branch and state, by role."""
    groups: dict[Any, Counter[str]] = {}
    for leaf in routing.leaves:
        groups.setdefault((leaf.methods, leaf.states), Counter())[leaf.role] += 1
    for (methods, states), roles in groups.items():
        branch = f"{'+'.join(methods)}: " if methods else ""
        leaves = ", ".join(f"{count} {role}" for role, count in roles.most_common())
        leaves = leaves if len(groups) > 1 else "all leaves"
        yield f"{branch}{leaves} in {' + '.join(states) or 'no state of their own'}"


def _what(fields: tuple[Any, ...]) -> Iterator[str]:
    """Say what the bytes are, the large fields first; counters and scalars are not worth a word."""
    total = sum(part.nbytes for part in fields)
    for part in sorted(fields, key=lambda part: -part.nbytes):
        if part.nbytes > _SHOWN * total:
            yield f"{part.owner}.{part.field} {_short(part.nbytes / 1e9)} GB {part.dtype}"


def rows(subject: Subject, asked: tuple[str, ...]) -> list[Row]:
    """Return the rows asked for, in that order; without a name all, the largest state first."""
    optimizers.check_names(asked, command="memory")
    if asked:
        return [row(name, subject) for name in asked]
    every = [row(name, subject) for name in optimizers.names()]
    return sorted(every, key=lambda one: -one.plain)


def show(subject: Subject, asked: tuple[str, ...]) -> None:
    """Print the table and what each row assumes."""
    from rich.console import Console
    from rich.table import Table

    found = rows(subject, asked)
    size = sum(leaf.size for leaf in jax.tree.leaves(subject.params))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for one in found:
        table.add_row(one.name, *_cells(one, size))
    console = Console(highlight=False, soft_wrap=True)
    console.print(subject.title, markup=False)
    console.print(table)
    for line in (BASIS, *(f"{one.name}: {one.assumptions}" for one in found)):
        console.print(line, markup=False)


def _short(number: float) -> str:
    return f"{number:.2f}" if number >= 0.1 else f"{number:.2g}"


def _cells(one: Row, size: int) -> tuple[str, ...]:
    predicted = (nbytes / 1e9 for nbytes in one.predicted)
    return tuple(map(_short, (one.plain / 1e9, one.plain / 2**30, one.plain / size, *predicted)))
