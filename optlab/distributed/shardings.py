"""Where leaves lie: shardings of parameters, of optimizer state, and what a leaf's placement is."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
    reshard,
)

from optlab import layout as _layout


def shardings_of(params: Any) -> Any:
    """Return the sharding of every leaf, to be passed to `orthogonalize` and the recipes.

    Inside `jax.jit` an array on an Auto mesh does not know its sharding, so an optimizer that moves
    matrices between devices has to be told: `optlab.muon(1e-2, shardings=shardings_of(params))`.
    On an Explicit mesh, JAX's default, types carry the shardings and nothing need be passed.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct`s with shardings, in any tree; boxes of Flax are
        looked into.

    Returns:
      A tree of the same structure with a `jax.sharding.Sharding` for every leaf.

    Raises:
      ValueError: a leaf traced on an Auto mesh, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> shardings = optlab.shardings_of({"kernel": jnp.ones((2, 2))})
      >>> print(type(shardings["kernel"]).__name__)
      SingleDeviceSharding
    """
    return jax.tree_util.tree_map_with_path(_sharding_of, params)


def _sharding_of(key_path: Any, leaf: Any) -> Sharding:
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding
        if AxisType.Explicit not in sharding.mesh.axis_types:
            raise ValueError(
                f"shardings_of: leaf '{_layout.path_str(key_path)}' is traced, and its mesh is not "
                "Explicit. Call it on the arrays themselves, outside jit."
            )
        return sharding
    sharding = getattr(leaf, "sharding", None)
    return sharding if sharding is not None else SingleDeviceSharding(jax.devices()[0])


def state_sharding(tx: optax.GradientTransformation, params: Any, shardings: Any = None) -> Any:
    """Return the sharding that every array of `tx.init(params)` should have.

    A state array with the shape of its parameter gets the parameter's sharding; one of its rank
    that is shorter along some axes, as `in_low_rank` has, is cut along the others; all else is
    replicated over the mesh. Use it as `out_shardings` of `jax.jit(tx.init)`, or to place a
    restored checkpoint. Chains, masks, `optax.partition` and `optax.MultiSteps` are followed.

    Args:
      tx: any transformation that `optax.tree.map_params` can work with.
      params: arrays, or `jax.ShapeDtypeStruct`s.
      shardings: of the parameters; None for `shardings_of(params)`.

    Returns:
      A tree with the structure of the state and a sharding for every array.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optlab
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> tx = optlab.lion(1e-3)
      >>> out = optlab.state_sharding(tx, params)
      >>> state = jax.jit(tx.init, out_shardings=out)(params)
    """
    shardings = shardings_of(params) if shardings is None else shardings
    shapes = jax.eval_shape(lambda tree: tree, params)
    leaves = jax.tree.leaves(shardings, is_leaf=_is_sharding)
    meshes = [leaf.mesh for leaf in leaves if isinstance(leaf, NamedSharding)]
    elsewhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else next(iter(leaves), None)

    def of_param(leaf: Any, shape: Any, sharding: Sharding) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        if leaf.shape == shape.shape or not isinstance(sharding, NamedSharding):
            return sharding if leaf.shape == shape.shape else elsewhere
        mesh = sharding.mesh
        halved = leaf.dtype == np.uint8 and leaf.shape == (*shape.shape[:-1], shape.shape[-1] // 2)
        # Codes of 4 bits, two to a byte, are half as many and lie where their numbers would.
        place = divided if halved else partial(fitted, shape=shape.shape)
        return NamedSharding(mesh, place(sharding.spec, new_shape=leaf.shape, mesh=mesh))

    state = jax.eval_shape(tx.init, params)
    found = optax.tree.map_params(
        tx.init,
        of_param,
        state,
        shapes,
        shardings,
        transform_non_params=lambda part: jax.tree.map(lambda _: elsewhere, part),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    # A state that keeps arrays beside its parameters' tree, as `quantize_state`, knows where.
    knows = lambda node: hasattr(node, "placed")  # noqa: E731
    settle = lambda node, here: node.placed(here) if knows(node) else here  # noqa: E731
    return jax.tree.map(settle, state, found, is_leaf=knows)


Shape = tuple[int, ...]


def divided(spec: PartitionSpec, new_shape: Shape, mesh: Any) -> PartitionSpec:
    """Return the spec without the mesh axes that do not divide an array of fewer entries."""
    entries = (e if isinstance(e, tuple) else (e,) if e else () for e in spec)
    pairs = zip(entries, new_shape, strict=False)
    fits = (e if n % math.prod(mesh.shape[name] for name in e) == 0 else () for e, n in pairs)
    return PartitionSpec(*(e[0] if len(e) == 1 else e or None for e in fits))


def _is_sharding(x: Any) -> bool:
    return isinstance(x, Sharding)


def fitted(spec: PartitionSpec, shape: Shape, new_shape: Shape, mesh: Any) -> PartitionSpec:
    """Return the spec of what keeps some axes of a leaf of `shape` and shortens others.

    The mesh axes of a shortened one move to the longest kept axis that they divide, if there is
    one: a state smaller than its parameter is still spread over all devices. One number per slice,
    which a sum leaves, stays where the slices are. Of another rank, it is replicated.
    """
    if len(shape) != len(new_shape):
        return PartitionSpec()
    entries = [e if isinstance(e, tuple) else (e,) if e else () for e in spec]
    entries += [()] * (len(shape) - len(entries))
    kept = [axis for axis, (n, new) in enumerate(zip(shape, new_shape, strict=True)) if n == new]
    new = [entry if axis in kept else () for axis, entry in enumerate(entries)]
    summed = all(n == 1 for axis, n in enumerate(new_shape) if axis not in kept)
    gone = () if summed else (axis for axis in range(len(shape)) if axis not in kept)
    freed = tuple(name for axis in gone for name in entries[axis])
    for axis in sorted(kept, key=lambda i: -new_shape[i]):
        parts = math.prod(mesh.shape[name] for name in (*new[axis], *freed))
        if freed and new_shape[axis] % parts == 0:
            new[axis] = (*new[axis], *freed)
            break
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in new))


class Placement(NamedTuple):
    """How one leaf lies on a mesh."""

    mesh: Mesh | AbstractMesh
    spec: tuple[tuple[str, ...], ...]  # the mesh axes of every axis of the leaf
    axes: tuple[str, ...]  # the mesh axes that are ours to work with

    def size(self, axes: tuple[str, ...]) -> int:
        """Return the number of devices along some axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    @property
    def replicated(self) -> tuple[str, ...]:
        """The axes along which every device holds the same."""
        used = {axis for axes in self.spec for axis in axes}
        return tuple(a for a in self.axes if a not in used and self.mesh.shape[a] > 1)

    @property
    def partition(self) -> PartitionSpec:
        """The spec as JAX writes it."""
        return PartitionSpec(*(axes or None for axes in self.spec))


def by_path(name: str, shardings: Any) -> dict[str, Sharding] | None:
    """Return the shardings under the paths of their leaves; None stays None."""
    if shardings is None:
        return None
    keyed, _ = jax.tree_util.tree_flatten_with_path(shardings, is_leaf=_is_sharding)
    for key_path, leaf in keyed:
        if not _is_sharding(leaf):
            raise TypeError(
                f"{name}: shardings must hold a jax.sharding.Sharding for every leaf, got {leaf!r} "
                f"at '{_layout.path_str(key_path)}'. Write optlab.shardings_of(params)."
            )
    return {_layout.path_str(key_path): leaf for key_path, leaf in keyed}


def placement_of(
    name: str, path: str, leaf: Any, known: dict[str, Sharding] | None
) -> Placement | None:
    """Return how a leaf lies, from `known` or from its type; None: on one device, or not known."""
    sharding = _known_sharding(name, path, leaf, known)
    if not isinstance(sharding, NamedSharding):
        return None
    mesh, kinds = sharding.mesh, sharding.mesh.axis_types
    ours = mesh.axis_names
    if known is None:
        ours = tuple(a for a, k in zip(ours, kinds, strict=True) if k == AxisType.Explicit)
    # Inside a shard_map its axes are out of sight: a leaf is what one device holds.
    context = jax.sharding.get_abstract_mesh()
    if context.manual_axes:
        ours, mesh = tuple(a for a in ours if a not in context.manual_axes), context
    if not ours:
        return None
    if len(sharding.spec) > leaf.ndim:
        raise ValueError(
            f"{name}: shardings have {len(sharding.spec)} axes for leaf '{path}' of shape "
            f"{leaf.shape}. Call optlab.shardings_of on the very parameters that init is given."
        )
    return _checked(name, path, leaf, Placement(mesh, _spec(sharding.spec, leaf.ndim, ours), ours))


def _known_sharding(name: str, path: str, leaf: Any, known: dict[str, Sharding] | None) -> Sharding:
    if known is None:
        return jax.typeof(leaf).sharding
    if path not in known:
        raise ValueError(
            f"{name}: shardings has no leaf '{path}', it has {sorted(known)[:3]}. "
            "Call optlab.shardings_of on the very parameters that init is given."
        )
    return known[path]


def _spec(spec: PartitionSpec, ndim: int, ours: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    entries = [e if isinstance(e, tuple) else (e,) for e in spec] + [()] * (ndim - len(spec))
    return tuple(tuple(a for a in entry if a in ours) for entry in entries)


def _checked(name: str, path: str, leaf: Any, placement: Placement) -> Placement:
    for axis, (length, axes) in enumerate(zip(leaf.shape, placement.spec, strict=True)):
        if length % placement.size(axes):
            raise ValueError(
                f"{name}: shardings cut axis {axis} of leaf '{path}' of shape {leaf.shape} into "
                f"{placement.size(axes)} parts, which do not come out even. "
                "Call optlab.shardings_of on the very parameters that init is given."
            )
    return placement


def everywhere(values: jax.Array, mesh: Any = None) -> jax.Array:
    """Return the values replicated over an Explicit mesh, their own if none is named.

    Their type says so too. On other meshes they are what they are.
    """
    mesh = mesh or jax.typeof(values).sharding.mesh
    wanted = NamedSharding(mesh, PartitionSpec())
    if AxisType.Explicit not in mesh.axis_types or jax.typeof(values).sharding == wanted:
        return values
    return reshard(values, wanted)


def mesh_of(params: Any) -> Any:
    """Return the mesh in the types of a tree; None of an empty one."""
    leaves = jax.tree.leaves(params)
    return jax.typeof(leaves[0]).sharding.mesh if leaves else None


def partitioned(fn: Callable[..., Any], out: Any, *args: Any) -> Any:
    """Call `fn` with the compiler free to partition it over an Explicit mesh; results go to `out`.

    `out` holds a `PartitionSpec` for every result. On other meshes the compiler is free anyway.
    """
    explicit = {
        axis: mesh
        for mesh in (jax.typeof(x).sharding.mesh for x in jax.tree.leaves(args))
        for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    if not explicit:
        return fn(*args)
    mesh = next(iter(explicit.values()))
    free = jax.sharding.auto_axes(fn, axes=tuple(explicit), out_sharding=_placements(mesh, out))
    return free(*args)


def _placements(mesh: Any, out: Any) -> Any:
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), out, is_leaf=is_spec)
