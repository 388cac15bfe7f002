"""Scale leaves by factors of sums over whole axes: one all-reduce for all leaves of a tree."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optlab.distributed.shardings import Placement, by_path, placement_of

Axes = tuple[int, ...]
Arrays = list[jax.Array]
Factors = Callable[[Arrays, Any], tuple[Arrays, Any]]


def scale_by_sums(
    name: str,
    leaves: Sequence[tuple[str, jax.Array]],
    axes: Sequence[Axes],
    factors: Factors,
    state: Any,
    shardings: Any,
) -> tuple[Arrays, Any]:
    """Multiply every leaf by factors computed from its sums of squares over some axes.

    `factors(sums, state)` sees the sums of whole leaves, without the summed axes, and returns a
    factor of each one's shape and the new state; states are trees of arrays, the same on every
    device. Left to the partitioner, the sums of each leaf cost a collective of their own.
    """
    known = by_path(name, shardings)
    arrays = [leaf for _, leaf in leaves]
    found = [placement_of(name, path, leaf, known) for path, leaf in leaves]
    where = next((p for p in found if p), None)
    if where is None:
        scales, state = factors([_sum(x, a) for x, a in zip(arrays, axes, strict=True)], state)
        return [_scaled(x, f, a) for x, f, a in zip(arrays, scales, axes, strict=True)], state
    places = [p or _replicated(where, x.ndim) for p, x in zip(found, arrays, strict=True)]

    def body(state, *parts):
        sums = [_sum(x, a) for x, a in zip(parts, axes, strict=True)]
        scales, state = factors(_whole_sums(sums, axes, places, where.axes), state)
        mine = [_mine(*item) for item in zip(scales, parts, axes, places, strict=True)]
        return state, *(_scaled(x, f, a) for x, f, a in zip(parts, mine, axes, strict=True))

    specs = (PartitionSpec(), *(p.partition for p in places))
    state, *scaled = jax.shard_map(
        body,
        mesh=where.mesh,
        in_specs=specs,
        out_specs=specs,
        axis_names=set(where.axes),
        check_vma=False,
    )(state, *arrays)
    return scaled, state


def _replicated(where: Placement, ndim: int) -> Placement:
    return where._replace(spec=((),) * ndim)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _sum(x: jax.Array, axes: Axes) -> jax.Array:
    return jnp.sum(_wide(x) ** 2, axis=axes)


def _kept(axes: Axes, where: Placement) -> list[tuple[str, ...]]:
    """Return the mesh axes of the axes that are not summed."""
    return [names for axis, names in enumerate(where.spec) if axis not in axes]


def _starts(shape: tuple[int, ...], names: list[tuple[str, ...]]) -> list[Any]:
    """Return where this device's part of that shape begins.

    The first place is int32 as an axis's index is: with jax_enable_x64 a plain 0 would not be.
    """
    return [
        jax.lax.axis_index(n) * size if n else jnp.int32(0)
        for size, n in zip(shape, names, strict=True)
    ]


def _whole_sums(
    sums: Arrays, axes: Sequence[Axes], places: Sequence[Placement], names: tuple[str, ...]
) -> Arrays:
    filled = [_in_place(s, _kept(a, p), p) for s, a, p in zip(sums, axes, places, strict=True)]
    flat = jax.lax.psum(jnp.concatenate([f.ravel() for f in filled]), names)
    parts, start = [], 0
    for x in filled:
        parts.append(flat[start : start + x.size].reshape(x.shape))
        start += x.size
    return parts


def _in_place(sums: jax.Array, names: list[tuple[str, ...]], where: Placement) -> jax.Array:
    """Return zeros of the whole shape with this device's sums where they belong.

    Of devices that hold the same, only the first one adds.
    """
    shape = tuple(size * where.size(n) for size, n in zip(sums.shape, names, strict=True))
    if where.replicated:
        sums = jnp.where(jax.lax.axis_index(where.replicated) == 0, sums, 0)
    return jax.lax.dynamic_update_slice(
        jnp.zeros(shape, sums.dtype), sums, _starts(sums.shape, names)
    )


def _mine(factor: jax.Array, x: jax.Array, axes: Axes, where: Placement) -> jax.Array:
    """Return the factors that belong to this device's part of a leaf."""
    shape = tuple(n for axis, n in enumerate(x.shape) if axis not in axes)
    return jax.lax.dynamic_slice(factor, _starts(shape, _kept(axes, where)), shape)


def _scaled(x: jax.Array, factor: jax.Array, axes: Axes) -> jax.Array:
    return (_wide(x) * jnp.expand_dims(factor, axes)).astype(x.dtype)


def size_of_sums(shape: tuple[int, ...], axes: Axes) -> int:
    """Return the number of sums of a leaf of this shape."""
    return math.prod(n for axis, n in enumerate(shape) if axis not in axes)
