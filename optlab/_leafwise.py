"""The shell around every transformation: leaves, dtypes, names in errors and masks, written once.

A primitive is a function of the arrays of one leaf. The shell finds the leaves, widens them to at
least float32, calls the function, and returns every array in the dtype it came in. A `None`
gradient and an `optax.MaskedNode` pass through; what cannot be a leaf is refused by name.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optlab import _checks
from optlab import layout as _layout

Mask = Any | Callable[[Any], Any] | None
"""A bool tree, a prefix of one, a function from params to one, or None for every leaf."""


def widen(dtype: Any) -> Any:
    """Return the dtype a leaf is computed in: float32, or float64 if the leaf is."""
    return jnp.promote_types(dtype, jnp.float32)


def is_none(x: Any) -> bool:
    """Tell whether `x` is a missing gradient, which is a leaf to the shell."""
    return x is None


def is_hole(x: Any) -> bool:
    """Tell whether `x` stands for a leaf that is not there."""
    return x is None or isinstance(x, optax.MaskedNode)


def is_hole_or_box(x: Any) -> bool:
    """Tell whether `x` is a hole, or Flax's box of one leaf: an NNX Variable, Linen's metadata."""
    unboxes = (getattr(x, name, None) for name in ("unbox", "get_raw_value"))
    return is_hole(x) or any(map(callable, unboxes))


def increment(count: jax.Array) -> jax.Array:
    """Return the next count, which stays at the largest int32 rather than wrap."""
    return jnp.asarray(optax.safe_increment(count))


def zeros_like(p: jax.Array, dtype: Any = None) -> jax.Array:
    """Return zeros of a parameter's shape and sharding, also under `jax.jit` on an Auto mesh."""
    zeros = jnp.zeros_like(p, dtype=dtype)
    if not isinstance(p, jax.core.Tracer):
        return zeros
    # A constant has no sharding of its own and would be replicated; what is chosen elementwise
    # between it and the parameter has the parameter's. `shard_alike` of jax 0.10.2 will not do: it
    # puts all leaves of one shape and dtype into one group, and gives them one sharding.
    never = jax.lax.optimization_barrier(False)
    return jax.lax.select(never, p.astype(zeros.dtype), zeros)


def require_params(name: str, params: Any) -> None:
    """Refuse a missing `params`."""
    if params is None:
        raise ValueError(
            f"{name}: update needs the current parameters, got params=None. "
            "Call tx.update(grads, state, params)."
        )


def _check_leaf(name: str, path: str, leaf: Any) -> None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        raise TypeError(
            f"{name}: leaf '{path}' is a {type(leaf).__name__}, not an array. "
            "Convert it with jnp.asarray, or take it out with optax.masked."
        )
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{name}: leaf '{path}' is complex ({dtype}), real leaves are needed. "
            "Wrap the optimizer in optax.contrib.split_real_and_imaginary."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name}: leaf '{path}' has dtype {dtype}, floating point is needed. "
            "Keep it out of the gradient, or take it out with optax.masked."
        )


def _named(tree: Any) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    return [(_layout.path_str(path), leaf) for path, leaf in flat]


def _mismatch(name: str, updates: Any, other: Any, what: str) -> ValueError:
    ours, theirs = (dict(_named(t)) for t in (updates, other))
    lacks, extra = ([k for k in a if k not in b] for a, b in ((ours, theirs), (theirs, ours)))
    parts = [f"only in the updates: {lacks[:3]}"] * bool(lacks)
    parts += [f"only in {what}: {extra[:3]}"] * bool(extra)
    return ValueError(
        f"{name}: the updates and {what} are different trees"
        f"{' (' + '; '.join(parts) + ')' if parts else ''}. "
        "Pass gradients of the very parameters that init was given."
    )


def aligned(name: str, updates: Any, *others: tuple[str, Any]) -> tuple[list, list[list], Any]:
    """Flatten `updates` and trees of its structure, leaf beside leaf.

    Returns the (path, update) pairs, one list of leaves per other tree, and the treedef.
    """
    treedef = jax.tree.structure(updates, is_leaf=is_none)
    columns = []
    for what, tree in others:
        try:
            columns.append(treedef.flatten_up_to(tree))
        except (ValueError, TypeError, KeyError) as error:
            raise _mismatch(name, updates, tree, what) from error
    return _named(updates), columns, treedef


def _check_shapes(name: str, path: str, u: jax.Array, what: str, other: Any) -> None:
    if getattr(other, "shape", None) != u.shape:
        raise ValueError(
            f"{name}: leaf '{path}' has shape {u.shape} in the updates and "
            f"{getattr(other, 'shape', type(other).__name__)} in {what}. "
            "Pass gradients of the very parameters that init was given."
        )


def leafwise(
    name: str,
    fn: Callable[..., tuple],
    updates: Any,
    slots: tuple[Any, ...] = (),
    params: Any = None,
    *,
    others: tuple[Any, ...] = (),
    keep_dtype: bool = True,
) -> tuple:
    """Apply `fn(path, u, *slots, p, *others)` to every leaf and return (updates, *slots).

    `p` is None where no params are given. Arrays are widened on the way in; the update and each
    slot come back in their own dtypes, unless `keep_dtype` is off. Slots and `params` have a
    leaf's shape, `others` need not.
    """
    with_params = () if params is None else (("params", params),)
    columns_of = tuple(("the state", s) for s in slots) + with_params
    named, columns, treedef = aligned(
        name, updates, *columns_of, *(("a tree beside them", o) for o in others)
    )
    results = [[] for _ in range(1 + len(slots))]
    for (path, u), *rest in zip(named, *columns, strict=True):
        if u is None:
            new = (None, *rest[: len(slots)])
        else:
            _check_leaf(name, path, u)
            for (what, _), leaf in zip(columns_of, rest, strict=False):
                _check_shapes(name, path, u, what, leaf)
            wide = [_widen_leaf(x, widen(u.dtype)) for x in (u, *rest)]
            if not with_params:
                wide.insert(1 + len(slots), None)
            new = fn(path, *wide)
            if keep_dtype:
                new = [n.astype(o.dtype) for n, o in zip(new, (u, *rest), strict=False)]
        for result, leaf in zip(results, new, strict=True):
            result.append(leaf)
    return tuple(jax.tree.unflatten(treedef, r) for r in results)


def _widen_leaf(x: Any, dtype: Any) -> Any:
    return x.astype(dtype) if hasattr(x, "astype") else x


def check_tree(name: str, params: Any) -> None:
    """Refuse by name every leaf that cannot be optimized."""
    for path, leaf in _named(params):
        if leaf is not None:
            _check_leaf(name, path, leaf)


def leaf_count(tree: Any) -> int:
    """Return the number of leaves, missing gradients among them."""
    return len(jax.tree.leaves(tree, is_leaf=is_none))


def scalar_dtype(tree: Any) -> Any:
    """Return the dtype of numbers kept about whole leaves: float32, or float64 if a leaf is."""
    return jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(tree)))


def scalars(
    name: str, fn: Callable[..., jax.Array], updates: Any, others: tuple[Any, ...] = ()
) -> jax.Array:
    """Return a vector of one `fn(path, u, None, *others)` per leaf, 0 for a missing gradient."""
    (tree,) = leafwise(name, lambda *leaf: (fn(*leaf),), updates, others=others, keep_dtype=False)
    column = jax.tree.leaves(tree, is_leaf=is_none)
    column = [jnp.zeros([], jnp.float32) if x is None else x for x in column]
    return jnp.stack(column) if column else jnp.zeros((0,), jnp.float32)


def check_count(name: str, updates: Any, values: jax.Array) -> None:
    """Refuse updates with another number of leaves than the vector kept about them."""
    if leaf_count(updates) != len(values):
        raise ValueError(
            f"{name}: the updates have {leaf_count(updates)} leaves, init saw {len(values)}. "
            "Pass gradients of the very parameters that init was given."
        )


def spread(tree: Any, values: jax.Array) -> Any:
    """Return a tree like `tree` with the entries of a vector, or one scalar, as its leaves."""
    treedef = jax.tree.structure(tree, is_leaf=is_none)
    column = [values if values.ndim == 0 else values[i] for i in range(treedef.num_leaves)]
    return jax.tree.unflatten(treedef, column)


def scale_leaves(name: str, updates: Any, factors: jax.Array) -> Any:
    """Multiply every leaf by its entry of a vector, or all of them by one scalar."""
    others = (spread(updates, factors),)
    (scaled,) = leafwise(name, lambda _, u, p, f: (f * u,), updates, others=others)
    return scaled


def init_slots(name: str, params: Any, dtype: Any = None) -> Any:
    """Return zeros for every parameter, refusing by name what cannot be optimized."""
    check_tree(name, params)
    dtype_of = lambda p: widen(p.dtype) if dtype is widen else dtype  # noqa: E731
    return jax.tree.map(lambda p: zeros_like(p, dtype_of(p)), params)


def init_checked(name: str) -> optax.TransformInitFn:
    """Return an `init` without state that refuses by name what cannot be optimized."""

    def init(params):
        check_tree(name, params)
        return optax.EmptyState()

    return init


def stateless(
    name: str, fn: Callable[..., jax.Array], *, needs_params: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Build a transformation without state from `fn(path, u, p) -> u`."""

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if needs_params:
            require_params(name, params)
        (updates,) = leafwise(
            name, lambda *a: (fn(*a),), updates, (), params if needs_params else None
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(init_checked(name), update)


def read(name: str, extra_args: dict[str, Any], key: str) -> Any:
    """Return an extra argument of update, or say which is missing and how it is passed."""
    if key not in extra_args:
        raise ValueError(
            f"{name}: update needs the extra argument {key!r}, got {sorted(extra_args)}. "
            f"Call tx.update(grads, state, params, {key}=...)."
        )
    return extra_args[key]


def stateful(
    name: str,
    state_type: type,
    dtypes: tuple[Any, ...],
    make_leaf: Callable[..., Callable[..., tuple]],
    *,
    needs_params: bool = False,
    reads: tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """Build a transformation whose state is a step count and slots of the parameters' shape.

    `state_type` is a NamedTuple: `count` first if it has one, then one tree per entry of `dtypes`
    (None: the parameter's own; `widen`: at least float32). `make_leaf(count)` receives the number
    of this step, from 1, and returns `leaf(path, u, *slots, p, *read) -> (u, *slots)`. `reads`
    names the extra arguments of update, trees like the updates, that the leaf needs.
    """
    counts = "count" in state_type._fields

    def init(params):
        slots = tuple(init_slots(name, params, dtype) for dtype in dtypes)
        return state_type(*((jnp.zeros([], jnp.int32),) if counts else ()), *slots)

    def update(updates, state, params=None, **extra_args):
        if needs_params:
            require_params(name, params)
        head = (increment(state.count),) if counts else ()
        updates, *slots = leafwise(
            name,
            make_leaf(*head),
            updates,
            tuple(state[len(head) :]),
            params if needs_params else None,
            others=tuple(read(name, extra_args, key) for key in reads),
        )
        return updates, state_type(*head, *slots)

    return optax.GradientTransformationExtraArgs(init, update)


def resolve_mask(name: str, mask: Mask, params: Any) -> Any:
    """Return a tree of bools, one per leaf of `params`, from any accepted form of mask."""
    if callable(mask):
        _checks.check_takes(name, "the mask", "params", mask)
    tree = mask(params) if callable(mask) else mask
    if tree is None:
        return jax.tree.map(lambda _: True, params)
    try:
        tree = jax.tree.broadcast(tree, params)
    except ValueError as error:
        ours, theirs = ([path for path, _ in _named(t)][:3] for t in (tree, params))
        raise ValueError(
            f"{name}: the mask is no prefix of the parameter tree: it has the leaves {ours}, the "
            f"parameters {theirs}. Give a bool per leaf or subtree, or a function of params."
        ) from error
    for path, leaf in _named(tree):
        # None where the parameters have None: what Equinox does not train.
        if leaf is not None and not isinstance(leaf, bool):
            raise TypeError(f"{name}: the mask holds {leaf!r} at '{path}'. Use True or False.")
    return tree
