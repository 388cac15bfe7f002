"""Which matrices go together, and what each device does with them: decided once, from shapes."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optlab import layout as _layout
from optlab._text import aligned
from optlab.distributed import buckets, cost
from optlab.distributed.shardings import by_path, placement_of
from optlab.linalg.polar import NewtonSchulz, PolarFn

# Parts of the matrices' bytes that are stacked at a time. A stack and what is computed from it take
# about twice their size: a sixth keeps the whole under 0.35 of the parameters.
_PARTS = 6
_LEAST = 16 * 2**20  # below, memory is no concern, and every group is a program to compile


class Options(NamedTuple):
    """What a plan depends on beside the leaves."""

    polar: PolarFn
    layout: _layout.Policy
    comm_dtype: DTypeLike | None = None
    chunk_bytes: int | None = None
    scheme: str = "auto"
    costs: cost.Costs = cost.Costs()

    def stack_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """Return the dtype in which leaves are stacked and travel: the narrowest that will do."""
        if self.comm_dtype is not None:
            return jnp.dtype(self.comm_dtype)
        used = self.polar.dtype if isinstance(self.polar, NewtonSchulz) else None
        narrow = used is not None and jnp.dtype(used).itemsize < jnp.dtype(dtype).itemsize
        return jnp.dtype(used if narrow else dtype)


class Planned(NamedTuple):
    """A group of leaves, and its steps."""

    group: buckets.Group
    steps: tuple[cost.Step, ...]
    chunk: int  # most matrices at a time


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` returns: print it for a table, or read its totals.

    Args:
      groups: in the order in which they run, with their steps.
    """

    groups: tuple[Planned, ...]

    @property
    def collectives(self) -> Counter[str]:
        """Number of collectives of every kind in one update."""
        return self._sum(lambda c: c.count)

    @property
    def nbytes(self) -> Counter[str]:
        """Bytes that arrive on one device in one update, by the kind of collective."""
        return self._sum(lambda c: c.nbytes)

    @property
    def flops(self) -> int:
        """FLOPs of the products of one update on one device."""
        return sum(step.flops for planned in self.groups for step in planned.steps)

    def _sum(self, of: Any) -> Counter[str]:
        found: Counter[str] = Counter()
        for planned in self.groups:
            for step in planned.steps:
                found.update({c.kind: of(c) for c in step.collectives})
        return found

    def __str__(self) -> str:
        header = ["matrices", "of", "spread over", "scheme", "GFLOP", "MiB", "collectives", "busy"]
        table = [_row(planned, step) for planned in self.groups for step in planned.steps]
        total = sum(self.nbytes.values()) / 2**20
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.collectives.items())) or "none"
        numbers = {"matrices", "GFLOP", "MiB", "busy"}
        return "\n".join(
            [
                *aligned([header, *table], numbers),
                "",
                f"on one device: {self.flops / 1e9:.4g} GFLOP, {total:.4g} MiB received; "
                f"collectives: {kinds}",
            ]
        )

    __repr__ = __str__


def _row(planned: Planned, step: cost.Step) -> list[str]:
    rows, cols, first, second = planned.group.sides
    spread = f"{_names(first)} x {_names(second)}" if first or second else "-"
    name = step.scheme
    name += f", {step.parts} to a matrix" if step.parts > 1 else ""
    name += f", {step.replicas} replicas" if step.replicas > 1 else ""
    calls = ", ".join(f"{c.count} {c.kind}" for c in step.collectives) or "-"
    return [
        str(step.stop - step.start),
        f"({rows}, {cols})",
        spread,
        name,
        f"{step.flops / 1e9:.4g}",
        f"{step.nbytes / 2**20:.4g}",
        calls,
        f"{step.busy:.0%}",
    ]


def _names(axes: tuple[str, ...]) -> str:
    return "*".join(axes) or "1"


def make(name: str, leaves: Sequence[tuple[str, Any]], shardings: Any, options: Options) -> Plan:
    """Return the plan for named leaves; those without a view, and None, have no part in it."""
    known = by_path(name, shardings)
    swap_squares = getattr(options.polar, "normalization", "") != "aol"
    blocks = []
    for index, (path, leaf) in enumerate(leaves):
        view = None if leaf is None else _layout.view_of(path, leaf, options.layout)
        if view is None or not leaf.size:
            continue
        placement = placement_of(name, path, leaf, known)
        blocks.append(buckets.block(index, path, leaf, view, placement, swap_squares=swap_squares))
    return _plan(blocks, options)


def _plan(blocks: list[buckets.Block], options: Options) -> Plan:
    itemsize = lambda dtype: options.stack_dtype(dtype).itemsize  # noqa: E731
    cap = options.chunk_bytes
    if cap is None:
        cap = max(_LEAST, sum(_bytes(b, itemsize(b.dtype)) for b in blocks) // _PARTS)
    planned = []
    for group in buckets.groups(blocks, itemsize, cap):
        work = cost.work_of(group, options.polar, itemsize(group.blocks[0].dtype))
        steps = cost.choose(work, group.count, options.scheme, options.costs)
        planned.append(Planned(group, steps, max(1, cap // max(work.size, 1))))
    return Plan(tuple(planned))


def _bytes(b: buckets.Block, itemsize: int) -> int:
    """Return the bytes of one device's part of a leaf."""
    shards = b.placement.size(b.row_axes + b.col_axes) if b.placement else 1
    return b.count * b.rows * b.cols * itemsize // shards


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return the leaves with their paths, None among them."""
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None)
    return [(_layout.path_str(path), leaf) for path, leaf in keyed]
