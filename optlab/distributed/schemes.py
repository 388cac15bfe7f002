"""The bodies of the schemes: functions of one device's part of a stack, inside `jax.shard_map`.

A matrix may come back together with its rows and columns in another order, the same for all devices
and undone on the way back. So what is applied has to satisfy f(P X Q) = P f(X) Q for permutations.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optlab.distributed.buckets import Axes, Group
from optlab.distributed.cost import Step
from optlab.linalg.polar import NewtonSchulz, PolarFn


class Team(NamedTuple):
    """The devices that a stack (L, rows, cols) is spread over, in teams of `parts`."""

    first: Axes  # mesh axes along the rows
    second: Axes  # along the columns
    sizes: tuple[int, int]  # devices along each
    replicated: Axes
    replicas: int

    @property
    def axes(self) -> Axes:
        """All of them; the rank of a device runs over the rows first."""
        return self.first + self.second

    @property
    def size(self) -> int:
        """The number of devices."""
        return self.sizes[0] * self.sizes[1]

    def members(self, parts: int) -> list[list[int]] | None:
        """Return the ranks of each team of `parts` devices; None: one team."""
        if parts == self.size:
            return None
        return [[i + j for j in range(parts)] for i in range(0, self.size, parts)]


def team_of(group: Group) -> Team:
    """Return the devices of a group."""
    _, _, first, second = group.sides
    where = group.placement
    if where is None:
        return Team((), (), (1, 1), (), 1)
    sizes = where.size(first), where.size(second)
    return Team(first, second, sizes, where.replicated, group.replicas)


def run(step: Step, x: jax.Array, polar: PolarFn, team: Team, chunk: int) -> jax.Array:
    """Return the polar factors of the matrices [start, stop) of a stack."""
    x = x[step.start : step.stop]
    if step.parts > 1:
        return _in_parts(step, x, polar, team)
    return _whole(step, x, lambda stack: in_chunks(polar, stack, chunk), team)


def measure(step: Step, x: jax.Array, fn: Callable, team: Team, chunk: int) -> jax.Array:
    """Return fn of each of the matrices [start, stop), on every device; `chunk` at a time."""
    x, count = x[step.start : step.stop], step.stop - step.start
    x = _my_share(_padded(x, team.size * step.replicas), step, team)
    x = _exchange(x, team, 1) if team.size > 1 else x

    def at_a_time(most: int) -> Callable:
        return fn if len(x) <= most else partial(jax.lax.map, fn, batch_size=_divisor(len(x), most))

    # On a TPU fewer, as in `in_chunks`.
    values = jax.lax.platform_dependent(
        x, tpu=at_a_time(max(1, chunk // 2)), default=at_a_time(chunk)
    )
    if team.size > 1:
        values = jax.lax.all_gather(values, team.axes, axis=0, tiled=True)
    if step.replicas > 1:
        values = jax.lax.all_gather(values, team.replicated, axis=0, tiled=True)
    return values[:count]


def _whole(step: Step, x: jax.Array, fn: PolarFn, team: Team) -> jax.Array:
    """Bring whole matrices to their owners, and the results back."""
    count = len(x)
    x = _my_share(_padded(x, team.size * step.replicas), step, team)
    x = _restore(fn(_exchange(x, team, 1)), x.shape, team, 1) if team.size > 1 else fn(x)
    if step.replicas > 1:
        x = jax.lax.all_gather(x, team.replicated, axis=0, tiled=True)
    return x[:count]


def _my_share(x: jax.Array, step: Step, team: Team) -> jax.Array:
    """Return the matrices of this replica."""
    if step.replicas == 1:
        return x
    each = len(x) // step.replicas
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(team.replicated) * each, each)


def _in_parts(step: Step, x: jax.Array, polar: PolarFn, team: Team) -> jax.Array:
    """Spread the long side of every matrix over a team; only Gram matrices are summed."""
    assert isinstance(polar, NewtonSchulz)  # the plan offers these schemes to no other
    if x.shape[-2] * team.sizes[0] > x.shape[-1] * team.sizes[1]:
        turned = team._replace(first=team.second, second=team.first, sizes=team.sizes[::-1])
        return _in_parts(step, x.mT, polar, turned).mT
    count, teams = len(x), team.size // step.parts
    x = _padded(x, teams * (step.parts if step.scatter else 1))
    stays = teams == 1 and team.sizes[0] == 1
    shape, dtype = x.shape, x.dtype
    x = x if stays else _exchange(x, team, step.parts)
    x = x.astype(polar.compute_dtype(dtype))
    for index, rows in enumerate(polar.phases(x.dtype)):
        make = lambda r, rows=rows, first=index == 0: polar.factor(r, rows, first=first)  # noqa: E731
        q = _factor(polar.gram(x, wide=True), make, team, step)
        x = polar.apply(q, x, wide=True)
    x = x.astype(dtype)
    return (x if stays else _restore(x, shape, team, step.parts))[:count]


def _factor(r: jax.Array, make: PolarFn, team: Team, step: Step) -> jax.Array:
    """Sum the parts' Gram matrices and return the factors, each computed once or by everyone."""
    among = {"axis_index_groups": team.members(step.parts)}
    dtype, r = r.dtype, r.astype(jnp.promote_types(r.dtype, jnp.float32))
    if not step.scatter:
        return make(jax.lax.psum(r, team.axes, **among).astype(dtype))
    r = jax.lax.psum_scatter(r, team.axes, scatter_dimension=0, tiled=True, **among)
    q = make(r.astype(dtype)).astype(r.dtype)
    return jax.lax.all_gather(q, team.axes, axis=0, tiled=True, **among).astype(dtype)


def _exchange(x: jax.Array, team: Team, parts: int) -> jax.Array:
    """Turn (L, rows, cols) parts into (L * parts / size) matrices with 1/parts of the columns."""
    teams, (count, a, b) = team.size // parts, x.shape
    x = x.reshape(teams, count // teams, a, parts, b // parts).transpose(0, 3, 1, 2, 4)
    x = x.reshape(team.size, count // teams, a, b // parts)
    x = jax.lax.all_to_all(x, team.axes, split_axis=0, concat_axis=0, tiled=True)
    p, q = team.sizes
    x = x.reshape(p, q, count // teams, a, b // parts).transpose(2, 0, 3, 1, 4)
    return x.reshape(count // teams, p * a, q * b // parts)


def _restore(x: jax.Array, shape: tuple[int, ...], team: Team, parts: int) -> jax.Array:
    """Undo `_exchange` of a stack of this shape."""
    teams, (count, a, b) = team.size // parts, shape
    p, q = team.sizes
    x = x.reshape(count // teams, p, a, q, b // parts).transpose(1, 3, 0, 2, 4)
    x = x.reshape(team.size, count // teams, a, b // parts)
    x = jax.lax.all_to_all(x, team.axes, split_axis=0, concat_axis=0, tiled=True)
    x = x.reshape(teams, parts, count // teams, a, b // parts).transpose(0, 2, 3, 1, 4)
    return x.reshape(shape)


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    """Append zero matrices, whose polar factors are zero."""
    missing = -len(x) % multiple
    return jnp.pad(x, ((0, missing), (0, 0), (0, 0))) if missing else x


def in_chunks(fn: PolarFn, x: jax.Array, most: int) -> jax.Array:
    """Apply `fn` to at most `most` matrices at a time, in place; the body is compiled once.

    On a TPU to half as many. Its scheduler hides latency at the price of memory, and only a loop
    stops it: 0.13 instead of 0.43 of the parameters' bytes on a GPT of 34 leaves. On a GPU a loop
    saves nothing, as its stack is copied, and its kernels are launched again for every chunk.
    """
    fn = in_cache(fn)
    if len(x) > most:
        return _loop(fn, x, most)
    if len(x) == 1 or 2 * len(x) <= most:
        return _checked(fn, x)
    return jax.lax.platform_dependent(
        x,
        tpu=lambda stack: _loop(fn, stack, max(1, most // 2)),
        default=lambda stack: _checked(fn, stack),
    )


# Bytes of a stack that a CPU takes as a whole, and of a matrix that it takes alone.
_SMALL_STACK, _LARGE_MATRIX = 8 * 2**20, 2**18


def in_cache(fn: PolarFn) -> PolarFn:
    """Return `fn` for stacks, which a CPU takes one by one where they are large.

    The products of one matrix stay in its cache: a step of Muon takes 0.87 of the time and half of
    the memory on a GPT of width 256, on two cores.
    """

    def of_stack(x: jax.Array) -> jax.Array:
        if x.nbytes <= _SMALL_STACK or x.nbytes < _LARGE_MATRIX * len(x):
            return fn(x)
        return jax.lax.platform_dependent(x, cpu=partial(jax.lax.map, fn), default=fn)

    return of_stack


def _loop(fn: PolarFn, x: jax.Array, most: int) -> jax.Array:
    each = _divisor(len(x), most)

    def body(i, stack):
        part = jax.lax.dynamic_slice_in_dim(stack, i * each, each)
        part = _checked(fn, part)
        return jax.lax.dynamic_update_slice_in_dim(stack, part, i * each, 0)

    return jax.lax.fori_loop(0, len(x) // each, body, x)


def _divisor(number: int, most: int) -> int:
    return max(k for k in range(1, most + 1) if number % k == 0)


def _checked(fn: PolarFn, x: jax.Array) -> jax.Array:
    out = fn(x)
    if jnp.shape(out) != x.shape:
        raise ValueError(
            f"orthogonalize: polar must keep the shape of its matrices, {x.shape}, "
            f"got {jnp.shape(out)}. Return (..., m, n) for (..., m, n)."
        )
    return out.astype(x.dtype)
