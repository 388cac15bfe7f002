"""Training in a fixed random subspace: intrinsic dimension, SAID."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, reshard

from optlab import _checks, _leafwise
from optlab.distributed.shardings import everywhere
from optlab.linalg import fastfood, subspace

NAME = "random_subspace"
# Leaves of one size are mapped together while they need at most this many numbers, one after the
# other beyond that: then what a step needs beside the gradients is that of one leaf.
TOGETHER = 2**22

Leaves = Sequence[jax.Array]  # flat, of one dtype, each with an entry


class Maps(NamedTuple):
    """The maps of all leaves, P_l for every leaf l, and their transposes."""

    project: Callable[[Leaves, int], tuple[jax.Array, Any]]  # of x_l and d: P_l^T x_l, and notes
    expand: Callable[[Any, jax.Array, Sequence[int]], Leaves]  # of notes, w_l and sizes: P_l w_l


class RandomSubspaceState(NamedTuple):
    """State of `random_subspace`."""

    coordinates: Any  # float32 or wider: z, (d,); {"scale": (leaves,), "z": (d - leaves,)} of SAID
    inner: optax.OptState


def _keys(seed: int, count: int) -> jax.Array:
    """Return one key for every leaf, by its number."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(count))


def _alike(
    fn: Callable[..., Any],
    sizes: Sequence[int],
    width: Callable[[int], int],
    keys: jax.Array,
    rows: Sequence[jax.Array],
) -> list[Any]:
    """Return `fn(size, key, row)` of every leaf; those of one size share a computation.

    `width` is how many numbers one leaf of a size needs at a time.
    """
    out: list[Any] = [None] * len(sizes)
    for size in dict.fromkeys(sizes):
        places = [i for i, s in enumerate(sizes) if s == size]
        one = partial(fn, size)
        if len(places) == 1:
            out[places[0]] = one(keys[places[0]], rows[places[0]])
            continue
        stack = keys[np.array(places)], jnp.stack([rows[i] for i in places])
        if len(places) * width(size) <= TOGETHER:
            found = jax.vmap(one)(*stack)
        else:
            found = jax.lax.map(lambda both, one=one: one(*both), stack)
        for j, place in enumerate(places):
            out[place] = jax.tree.map(lambda x, j=j: x[j], found)
    return out


def _fastfood(seed: int) -> Maps:
    """Return Fastfood maps; leaves that need the same L share a computation."""
    width = lambda length: length  # noqa: E731

    def project(leaves, dim):
        def one(length, key, x):
            return fastfood.project(fastfood.draw(key, length, x.dtype), x, dim)

        lengths = [fastfood.length(x.size, dim) for x in leaves]
        rows = [fastfood.fill(x, length) for x, length in zip(leaves, lengths, strict=True)]
        return jnp.stack(_alike(one, lengths, width, _keys(seed, len(leaves)), rows)), None

    def expand(_, rows, sizes):
        def one(length, key, w):
            return fastfood.expand(fastfood.draw(key, length, w.dtype), w)

        lengths = [fastfood.length(size, rows.shape[1]) for size in sizes]
        found = _alike(one, lengths, width, _keys(seed, len(sizes)), list(rows))
        return [fastfood.cut(x, size) for x, size in zip(found, sizes, strict=True)]

    return Maps(project, expand)


def _dense(seed: int) -> Maps:
    """Return dense normal maps; the columns of all of them, stacked, have norm 1."""

    def width(size, dim):
        return min(size * dim, fastfood.CHUNK)

    def project(leaves, dim):
        one = lambda size, key, x: fastfood.project_dense(key, x, dim)  # noqa: E731
        sizes, keys = [x.size for x in leaves], _keys(seed, len(leaves))
        found = _alike(one, sizes, partial(width, dim=dim), keys, leaves)
        products, squares = (jnp.stack(column) for column in zip(*found, strict=True))
        lengths = jnp.sqrt(squares.sum(0))
        return products / lengths[None], lengths

    def expand(lengths, rows, sizes):
        one = lambda size, key, w: fastfood.expand_dense(key, w, size)  # noqa: E731
        keys, rows = _keys(seed, len(sizes)), rows / lengths[None]
        return _alike(one, sizes, partial(width, dim=rows.shape[1]), keys, list(rows))

    return Maps(project, expand)


def _orthonormal(seed: int) -> Maps:
    """Return dense maps whose columns, stacked, are orthonormal; all are in memory at once."""

    def project(leaves, dim):
        draws = zip(_keys(seed, len(leaves)), leaves, strict=True)
        whole = jnp.concatenate([fastfood.dense(k, x.size, dim, x.dtype) for k, x in draws])
        ends = np.cumsum([x.size for x in leaves])[:-1]
        parts = jnp.split(subspace.orthonormal(whole), ends)
        found = [subspace.product(x, part) for x, part in zip(leaves, parts, strict=True)]
        return jnp.stack(found), parts

    def expand(parts, rows, sizes):
        del sizes
        return [subspace.product(part, w) for part, w in zip(parts, rows, strict=True)]

    return Maps(project, expand)


def _start(params: Any, dim: int, layerwise_scale: bool) -> Any:
    """Return the coordinates of the parameters that training starts from."""
    leaves, dtype = jax.tree.leaves(params), _leafwise.scalar_dtype(params)
    count = len(leaves) if layerwise_scale else 0
    if count >= dim:
        raise ValueError(
            f"{NAME}: dim must be above the number of leaves with layerwise_scale, which takes one "
            f"coordinate of each, got dim={dim} for {count} leaves. Raise dim, or take leaves out "
            "with optax.masked."
        )
    mesh = jax.typeof(leaves[0]).sharding.mesh if leaves else None
    z = everywhere(jnp.zeros([dim - count], dtype), mesh)
    return {"scale": everywhere(jnp.ones([count], dtype), mesh), "z": z} if layerwise_scale else z


def _check_count(coordinates: Any, leaves: Leaves) -> None:
    if isinstance(coordinates, dict) and len(coordinates["scale"]) != len(leaves):
        raise ValueError(
            f"{NAME}: the updates have {len(leaves)} leaves, init saw "
            f"{len(coordinates['scale'])}. Pass gradients of the very parameters that init was "
            "given, and take out those without a gradient with optax.masked."
        )


def _gradient(coordinates: Any, projected: jax.Array) -> Any:
    """Return the gradient of the coordinates from P_l^T g_l, (leaves, d)."""
    if not isinstance(coordinates, dict):
        return projected.sum(0)
    scale, z = coordinates["scale"], coordinates["z"]
    # <P_l z, g_l> = <z, P_l^T g_l>: nothing is mapped twice.
    slopes = jnp.matmul(projected, z, precision="highest")
    return {"scale": slopes, "z": jnp.sum(scale[:, None] * projected, 0)}


def _moves(old: Any, change: Any, new: Any, count: int) -> jax.Array:
    """Return what P_l maps to the update of leaf l: lam_l' z' - lam_l z, without its cancellation.

    (leaves, d)
    """
    if not isinstance(old, dict):
        return jnp.broadcast_to(change[None], (count, *change.shape))
    return new["scale"][:, None] * change["z"][None] + change["scale"][:, None] * old["z"][None]


def _like(x: jax.Array, u: jax.Array) -> jax.Array:
    """Return flat numbers as a leaf: its shape, dtype, and on an Explicit mesh its sharding."""
    x, sharding = x.reshape(u.shape).astype(u.dtype), jax.typeof(u).sharding
    return reshard(x, sharding) if AxisType.Explicit in sharding.mesh.axis_types else x


def in_coordinates(
    inner: optax.GradientTransformation, dim: int, maps: Maps, layerwise_scale: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Train `dim` coordinates by `inner`, for any maps."""
    inner = optax.with_extra_args_support(inner)

    def init(params):
        _leafwise.check_tree(NAME, params)
        coordinates = _start(params, dim, layerwise_scale)
        return RandomSubspaceState(coordinates, inner.init(coordinates))

    def update(updates, state, params=None, **extra_args):
        del params  # the parameters are their start and z: all that `inner` may see of them is z
        _leafwise.check_tree(NAME, updates)
        leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, updates))
        old = state.coordinates
        _check_count(old, leaves)
        z = old["z"] if isinstance(old, dict) else old
        filled = [i for i, u in enumerate(leaves) if u.size]
        flat = [everywhere(leaves[i]).ravel().astype(z.dtype) for i in filled]
        projected, notes = jnp.zeros((len(leaves), z.size), z.dtype), None
        if flat:
            rows, notes = maps.project(flat, z.size)
            projected = projected.at[np.array(filled)].set(rows)
        change, inside = inner.update(_gradient(old, projected), state.inner, old, **extra_args)
        new = optax.apply_updates(old, change)
        if flat:
            moves = _moves(old, change, new, len(leaves))[np.array(filled)]
            moved = maps.expand(notes, moves, [x.size for x in flat])
            for i, x in zip(filled, moved, strict=True):
                leaves[i] = _like(x, leaves[i])
        return treedef.unflatten(leaves), RandomSubspaceState(new, inside)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_size(params: Any, coordinates: Any) -> None:
    """Refuse more orthonormal columns than there are rows; no tree has no parameters."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    z = coordinates["z"] if isinstance(coordinates, dict) else coordinates
    if size and z.size > size:
        raise ValueError(
            f"{NAME}: orthonormal=True needs dim <= the number of parameters, {size}, got "
            f"{z.size}. Write a smaller dim, or orthonormal=False."
        )


@_checks.explain_calls
def random_subspace(
    inner: optax.GradientTransformation,
    dim: int,
    *,
    kind: Literal["fastfood", "dense"] = "fastfood",
    layerwise_scale: bool = False,
    orthonormal: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Train all parameters through a few coordinates of a fixed random subspace.

    theta = theta_0 + P z, with one z of d numbers for the whole tree, from zero; only z is trained:
      g_z = sum over leaves of P_l^T g_l,   dz = inner(g_z),   u_l = P_l dz.
    P is affine, so this is training of z itself, whatever `inner` is; Adam on z is not Adam on
    theta. With layerwise_scale (SAID), theta_l = theta_0l + lam_l P_l z and every lam_l, from one,
    is trained too:
      g_z = sum lam_l P_l^T g_l,   g_lam_l = <P_l z, g_l>,   u_l = lam_l' P_l z' - lam_l P_l z.

    With "fastfood", L = 2^k >= max(D, d) for a leaf of D entries, and
      P_l z = first D of H diag(G) Pi H diag(B) (z, 0...)/(sqrt(L sum G^2) sqrt(D/L)),
    H a Hadamard matrix of entries 1 and -1, B random signs, Pi a permutation, G normals. With
    "dense", P holds normals, every column of the whole P divided by its norm.

    The dimension that reaches 90 % of what full training does is how hard a task is for a model: d
    = 200 is enough for RoBERTa on MRPC. To train fast, or well, use `in_low_rank`.

    Nothing else may move the parameters: decay inside `inner` pulls them to their start; behind
    this link it takes them out of the subspace, and z no longer tells where they are.

    Args:
      inner: what trains the coordinates, such as `optax.adam(1e-2)`. It is given z as its
        parameter, {"scale": lam, "z": z} with layerwise_scale, and every extra argument as it is.
      dim: coordinates in all; with layerwise_scale one is spent on each leaf, and z has the rest. A
        leaf, or the whole tree, may have fewer entries. (static)
      kind: "fastfood", O(L log L) time a leaf; or "dense", D d time, at which 4 MB of P are in
        memory at once. Beside the gradients a step holds two copies of the leaves and some six
        vectors of length L. A Fastfood column has norm 1 in every leaf, a dense one in all leaves
        together. (static)
      layerwise_scale: train one more number for every leaf. (static)
      orthonormal: make the columns of a dense P orthonormal, which holds all of it in memory and
        takes 2 D d^2 more operations a step: for small cases. Needs dim <= D. (static)
      seed: of P. With the numbers of the leaves, in the tree's order, it is all that P depends on;
        leaves without a gradient take no part and have no number. (static)

    Returns:
      A wrapper with updates P dz: at inner = `optax.sgd(1.0)` the gradient's projection, of about
      sqrt(d/D) its norm for one leaf. On a mesh every device maps whole leaves.

    State:
      coordinates: z and lam, dim float32 numbers. inner: `inner`'s, 2 dim numbers for Adam. Nothing
      has the size of the parameters: 2.4 KB in all for d = 200.

    Raises:
      ValueError: by init, where dim does not exceed the number of leaves with layerwise_scale, or
        exceeds the number of parameters with orthonormal.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.random_subspace(optax.sgd(0.1), 2, kind="dense", orthonormal=True)
      >>> g = {"w": jnp.array([3.0, 4.0])}
      >>> u, _ = tx.update(g, tx.init(g))  # the subspace is everything: plain descent
      >>> print(f"{u['w'][0]:.3f} {u['w'][1]:.3f}")
      -0.300 -0.400

    Deviations:
      The gradient of z is P^T g. The released Fastfood divides by sqrt(L) in the backward pass of
      each of its two transforms, not in the forward one: its z sees P_l^T g_l/L_l, less of a large
      leaf. Adam hides a common factor, not this one. It also cuts z where d > L; here L is larger.
      Pi is a random permutation, but not uniform among all: rounds of x <- a x + c mod L and
      x <- x xor x >> k. A uniform one sorts, and the step of 2^22 parameters takes 26 times as long
      on a CPU; the singular values of P spread alike. Updates are rounded to the leaf's dtype: for
      bfloat16 parameters their sum drifts from P z.

    References:
      Aghajanyan et al., "Intrinsic Dimensionality Explains the Effectiveness of Language Model
      Fine-Tuning", arXiv:2012.13255, 2020, eq. 2 and 3; code in rabeehk/compacter@e123daaa.
      Li et al., "Measuring the Intrinsic Dimension of Objective Landscapes", arXiv:1804.08838, 2018
      (dense). Le et al., "Fastfood", ICML 2013.
    """
    _checks.check_transform(NAME, "inner", inner)
    _checks.check_steps(NAME, 1, dim=dim)
    _checks.check_steps(NAME, seed=seed)
    _checks.check_choice(NAME, "kind", kind, ("fastfood", "dense"))
    if orthonormal and kind == "fastfood":
        must, fix = 'False for kind="fastfood"', ' Write kind="dense".'
        raise _checks.refusal(ValueError, NAME, "orthonormal", must, orthonormal, fix)
    maps = (
        _orthonormal(seed) if orthonormal else {"fastfood": _fastfood, "dense": _dense}[kind](seed)
    )
    tx = in_coordinates(inner, dim, maps, layerwise_scale)

    def init(params):
        state: Any = tx.init(params)
        if orthonormal:
            _check_size(params, state.coordinates)
        return state

    return optax.GradientTransformationExtraArgs(init, tx.update)
