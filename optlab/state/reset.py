"""Start the state of some leaves anew, in the middle of training."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.state import walk
from optlab.transforms.quantize import QuantizeState

NAME = "reset_state"
_SHARED = "shared"


@_checks.explain_calls
def reset_state(
    tx: optax.GradientTransformation,
    state: Any,
    params: Any,
    mask: Any,
    *,
    shared: str = "refuse",
) -> Any:
    """Put the state of some leaves, or of some entries, back to what `init` gives.

    For a new head, neurons that were initialized again, a layer that diverged. All that lies in the
    parameters' tree is reset: moments, accumulated gradients, error feedback, averages. What all
    leaves share stays: step counts, injected hyperparameters, keys. Adam's bias correction is
    therefore that of all steps: the first step of a leaf reset late is (1 - b1)/sqrt(1 - b2) times
    the learning rate, 3.2 at (0.9, 0.999), instead of 1.

    Some links keep numbers about many leaves in one array outside the parameters' tree: the bases
    of `in_low_rank`, the norms of `norm_growth_limiter`. `shared` says what becomes of these.

    Args:
        tx: the transformation whose state it is; its `init` is called.
        state: the state to start from; it is not changed.
        params: the parameters from now on, the new values in them.
        mask: which leaves: a tree of bools, a prefix of one, or a function from params to one. A
            bool array of a leaf's shape names single entries of it.
        shared: "refuse" such arrays, by name; "keep" them: a basis found for the old gradients
            stays until its next refresh; or "reset" them, for all leaves.

    Returns:
        A state like `state`.

    Raises:
        ValueError: there are such arrays and `shared` is "refuse"; a mask of single entries for
            state of another shape than its parameter's.
        TypeError: the mask holds something else than bools.

    Example:
        >>> import jax.numpy as jnp, optax, optlab
        >>> tx, params = optax.trace(0.9), {"body": jnp.ones(2), "head": jnp.ones(2)}
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> state = optlab.reset_state(tx, state, params, {"body": False, "head": True})
        >>> print(state.trace["body"], state.trace["head"])
        [1. 1.] [0. 0.]
    """
    _checks.check_transform(NAME, "tx", tx)
    _checks.check_choice(NAME, "shared", shared, ("refuse", "keep", "reset"))
    leaves, treedef = jax.tree.flatten(state)
    state, params = walk.unboxed(state), walk.unboxed(params)
    fresh = tx.init(params)
    if jax.tree.structure(fresh) != jax.tree.structure(state):
        raise ValueError(
            f"{NAME}: tx.init(params) is another tree than the state. "
            "Give the tx that made the state, and the parameters it was made for."
        )
    flags = _flags(tx, state, _resolved(mask, params))
    if shared == "refuse":
        _refuse_shared(flags)
    new = [
        _chosen(place, (flag is _SHARED and shared == "reset") or flag, *pair)
        for (place, flag), *pair in zip(flags, jax.tree.leaves(fresh), leaves, strict=True)
    ]
    return treedef.unflatten(new)


def _resolved(mask: Any, params: Any) -> Any:
    """Return a tree of bools, and of bool arrays where they have the shape of their leaf."""
    if callable(mask):
        _checks.check_takes(NAME, "the mask", "params", mask)
        mask = mask(params)
    is_array = lambda m: _is_array(m) and m.dtype == bool  # noqa: E731
    whole = jax.tree.map(lambda m: True if is_array(m) else m, mask)
    resolved = _leafwise.resolve_mask(NAME, whole, params)
    if not any(map(is_array, jax.tree.leaves(mask))):
        return resolved

    def fitted(key_path, p, m):
        if is_array(m) and m.shape != p.shape:
            raise ValueError(
                f"{NAME}: the mask of leaf '{_layout.path_str(key_path)}' has shape {m.shape}, the "
                f"leaf {p.shape}. Give one bool per entry, or one for the leaf."
            )
        return m

    return jax.tree_util.tree_map_with_path(fitted, params, jax.tree.broadcast(mask, params))


def _flags(tx: optax.GradientTransformation, state: Any, mask: Any) -> list[tuple[str, Any]]:
    """Return for every array of the state its place, and its mask or `_SHARED`."""
    flags = optax.tree.map_params(
        tx.init,
        lambda tree, mask: _spread(mask, tree),
        state,
        mask,
        transform_non_params=lambda part: jax.tree.map(_of_no_leaf, part),
        is_leaf=lambda _: True,
    )
    return list(_places(_with_codes(flags)))


def _spread(mask: Any, part: Any) -> Any:
    """Return the mask as a tree like `part`.

    The state of one leaf may be a subtree, and one hole may stand for a subtree of leaves.
    """
    if isinstance(part, optax.MaskedNode):
        return part
    masks, treedef = jax.tree.flatten(mask, is_leaf=lambda x: x is not mask)
    if jax.tree_util.treedef_is_leaf(treedef):
        return jax.tree.map(lambda _: mask, part)
    parts = treedef.flatten_up_to(part)
    return treedef.unflatten(map(_spread, masks, parts))


def _with_codes(flags: Any) -> Any:
    """Let what `quantize_state` reads a leaf's codes with follow these codes.

    Single entries are reset in the codes alone: a code of 0 reads as 0 at any scale.
    """
    is_coded = lambda x: isinstance(x, QuantizeState)  # noqa: E731

    def one(node: Any) -> Any:
        if not is_coded(node) or not isinstance(node.scales, dict):
            return node
        flat = jax.tree_util.tree_leaves_with_path(node.inner)
        of = {_layout.path_str(path): False if _is_array(flag) else flag for path, flag in flat}
        scales = {path: jax.tree.map(lambda _, f=of[path]: f, s) for path, s in node.scales.items()}
        return node._replace(scales=scales)

    return jax.tree.map(one, flags, is_leaf=is_coded)


def _is_array(flag: Any) -> bool:
    return jnp.ndim(flag) > 0


def _of_no_leaf(x: Any) -> Any:
    """Return False for numbers and keys, which all leaves share; `_SHARED` for larger arrays."""
    is_key = x.dtype == jnp.uint32 and x.shape in ((2,), (4,))
    return False if x.ndim == 0 or is_key or not x.size else _SHARED


def _places(flags: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arrays of a state as Owner.field, or as the way to them outside of a NamedTuple."""
    flat, _ = jax.tree_util.tree_flatten_with_path(flags)
    owners = dict(walk.states(flags))
    for key_path, flag in flat:
        keys = walk.keys(key_path)
        inner = max((k for k in range(len(keys)) if keys[:k] in owners), default=None)
        kind = "" if inner is None else f"{type(owners[keys[:inner]]).__name__}."
        yield kind + "/".join(keys[inner or 0 :]), flag


def _refuse_shared(flags: list[tuple[str, Any]]) -> None:
    held = sorted({place for place, flag in flags if flag is _SHARED})
    if held:
        raise ValueError(
            f"{NAME}: numbers about several leaves are in one array, got {', '.join(held[:4])}. "
            'Write shared="keep" to leave these as they are, or shared="reset" to start them anew '
            "for all leaves."
        )


def _chosen(place: str, flag: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    if flag is _SHARED or flag is False:
        return old
    if flag is True:
        return new
    if flag.shape != old.shape:
        raise ValueError(
            f"{NAME}: {place} has shape {old.shape}, the mask of its leaf {flag.shape}: single "
            "entries cannot be reset. Give one bool for the leaf."
        )
    return jnp.where(flag, new, old)
