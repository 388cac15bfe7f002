"""Functions of whole matrices applied to trees of sharded leaves, as a plan says."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import PartitionSpec

from optlab.distributed import buckets, cost, plan, schemes
from optlab.distributed.shardings import everywhere
from optlab.layout.apply import close_leaf, open_leaf

Leaves = list[Any]


def map_matrices(
    name: str, leaves: Sequence[tuple[str, Any]], shardings: Any, options: plan.Options
) -> Leaves:
    """Return the leaves with `options.polar` applied to every matrix; others as they are.

    The function sees stacks (L, m, n) of whole matrices, wherever their parts lie. It must treat
    each by itself, whatever the order of its rows and columns, and satisfy f(X^T) = f(X)^T.
    """
    out = [leaf for _, leaf in leaves]
    tokens: list[jax.Array] = []
    for planned in plan.make(name, leaves, shardings, options).groups:
        # One group at a time, so that its stack is gone when the next one is built; on a mesh two,
        # so that the exchange of one can overlap the products of the other.
        ahead = 1 if planned.group.placement is None else 2
        before = tokens[-ahead : len(tokens) - ahead + 1] if len(tokens) >= ahead else []
        held = [out[b.index] for b in planned.group.blocks]
        token, *results = _run(planned, before, held, options)
        tokens.append(token)
        for b, leaf in zip(planned.group.blocks, results, strict=True):
            out[b.index] = leaf
    return out


def _run(planned: plan.Planned, before: Leaves, leaves: Leaves, options: plan.Options) -> Leaves:
    """Return a number per device that is there when the group is done, and its leaves.

    `before` holds such numbers of groups to wait for. The stack waits, not the leaves: what makes
    them, as a momentum does, can then be fused with the stacking.
    """
    group = planned.group
    dtype = options.stack_dtype(group.blocks[0].dtype)
    team = schemes.team_of(group)

    def body(before, *parts):
        stack, close_all = _stacked(group, parts, dtype)
        stack = _after(before, stack, alone=group.placement is None) if before else stack
        done = [schemes.run(s, stack, options.polar, team, planned.chunk) for s in planned.steps]
        done = done[0] if len(done) == 1 else jnp.concatenate(done)
        return done[:1, 0, 0], *close_all(done)

    specs = [_partition(b) for b in group.blocks]
    each = PartitionSpec(group.placement.axes if group.placement else None)
    return list(
        _mapped(group, body, [[each] * len(before), *specs], [each, *specs])(before, *leaves)
    )


def _after(before: Leaves, stack: jax.Array, *, alone: bool) -> jax.Array:
    """Return the stack, once `before` is there.

    A GPU's compiler takes barriers out before it schedules, and on a mesh it would build the stacks
    of all groups first. A condition that never holds, in the kernel that stacks, makes it wait: 64
    matrices on 8 devices then take 1.3 instead of 2.1 times their bytes. On one device it takes
    them one by one anyway.
    """

    def on_gpu(stack, before):
        return jnp.where(jnp.isnan(before[0]) & (before[0] == 0), 0, stack)

    stack, before = jax.lax.optimization_barrier((stack, before))
    if alone:
        return stack
    return jax.lax.platform_dependent(
        stack, before, cuda=on_gpu, rocm=on_gpu, default=lambda stack, _: stack
    )


def matrix_values(
    name: str,
    fn: Callable[[jax.Array], jax.Array],
    leaves: Sequence[tuple[str, Any]],
    shardings: Any,
    options: plan.Options,
) -> Leaves:
    """Return a number for every matrix, by fn of stacks (..., m, n): arrays of a leaf's batch axes.

    None stands for a leaf without a view.
    """
    out: Leaves = [None] * len(leaves)
    for planned in plan.make(name, leaves, shardings, options).groups:
        group = planned.group
        itemsize = options.stack_dtype(group.blocks[0].dtype).itemsize
        work = cost.work_of(group, options.polar, itemsize, returns_matrices=False)
        steps = cost.choose(work, group.count, options.scheme, options.costs)
        held = [leaves[b.index][1] for b in group.blocks]
        done = _measure(group, steps, held, fn, options, planned.chunk)
        for b, values in zip(group.blocks, done, strict=True):
            out[b.index] = values
    return out


def _measure(
    group: buckets.Group,
    steps: tuple[cost.Step, ...],
    leaves: Leaves,
    fn: Callable,
    options: plan.Options,
    chunk: int,
) -> Leaves:
    dtype, team = options.stack_dtype(group.blocks[0].dtype), schemes.team_of(group)

    def body(*parts):
        stack, _ = _stacked(group, parts, dtype)
        done = jnp.concatenate([schemes.measure(s, stack, fn, team, chunk) for s in steps])
        values, start = [], 0
        for b, part in zip(group.blocks, parts, strict=True):
            shape = tuple(part.shape[axis] for axis in b.groups[0])
            values.append(done[start : start + b.count].reshape(shape))
            start += b.count
        return tuple(values)

    in_specs = [_partition(b) for b in group.blocks]
    out_specs = [_batch_partition(b) for b in group.blocks]
    return [everywhere(v) for v in _mapped(group, body, in_specs, out_specs)(*leaves)]


def _stacked(
    group: buckets.Group, parts: Sequence[jax.Array], dtype: Any
) -> tuple[jax.Array, Callable]:
    """Stack one device's parts of the leaves; return what takes a stack apart again, too."""
    pieces, matrices = [], []
    for b, part in zip(group.blocks, parts, strict=True):
        piece = open_leaf(part, b.groups)
        pieces.append(piece)
        x = piece.matrices.astype(dtype)
        matrices.append(x.mT if b.swapped and not group.tall else x)

    def close_all(stack):
        for b, piece, x in zip(group.blocks, pieces, _apart(stack, group), strict=True):
            x = x.mT if b.swapped and not group.tall else x
            yield close_leaf(x.astype(piece.leaf.dtype), piece)

    return (matrices[0] if len(matrices) == 1 else jnp.concatenate(matrices)), close_all


def _apart(stack: jax.Array, group: buckets.Group) -> Sequence[jax.Array]:
    """Return each leaf's part of the stack.

    For a CPU every part is a kernel of its own to compile, 6 ms, as it knows its place: there they
    are calls of one function, which gets the place at run time.
    """
    sizes = [b.count for b in group.blocks]
    stops = np.cumsum(sizes)
    if len(sizes) == 1:
        return [stack]

    def called(stack):
        # Unsigned: a signed place may be negative, which is five more instructions to a leaf.
        starts = jax.lax.optimization_barrier([jnp.uint32(at) for at in stops - sizes])
        with set_xla_metadata(inlineable="false"):
            return [_part(stack, at, size) for at, size in zip(starts, sizes, strict=True)]

    cut = lambda stack: list(jnp.split(stack, stops[:-1]))  # noqa: E731
    return jax.lax.platform_dependent(stack, cpu=called, default=cut)


@partial(jax.jit, static_argnums=2)
def _part(stack: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(stack, start, size)


def _mapped(group: buckets.Group, body: Callable, in_specs: list, out_specs: list) -> Callable:
    where = group.placement
    if where is None:
        return body
    return jax.shard_map(
        body,
        mesh=where.mesh,
        in_specs=tuple(in_specs),
        out_specs=tuple(out_specs),
        axis_names=set(where.axes),
        check_vma=False,  # sums over teams of an axis have no rule
    )


def _partition(b: buckets.Block) -> PartitionSpec:
    return b.placement.partition if b.placement else PartitionSpec()


def _batch_partition(b: buckets.Block) -> PartitionSpec:
    spec = _partition(b)
    return PartitionSpec(*(spec[axis] for axis in b.groups[0])) if b.placement else spec
