"""The parameters to evaluate a model with, where the optimizer keeps others than it trains."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from optlab import _leafwise
from optlab import layout as _layout
from optlab.state import walk
from optlab.transforms.averages import AverageParamsState

NAME = "eval_params"


def eval_params(state: Any, params: Any) -> Any:
    """Return the parameters to evaluate with: averages and the like where a state keeps some.

    Found at any depth of the state, as in chains, partitions, `optax.MultiSteps` and
    `optax.inject_hyperparams`:

    - `optax.contrib.schedule_free` and its aliases: x = (y - (1 - b1) z)/b1, computed in float32,
      with the injected b1 where it is a hyperparameter;
    - `optlab.average_params`: the average, the parameters themselves before the first update;
    - `optax.lookahead`: the slow weights, for `params` an `optax.LookaheadParams`.

    Leaves for which no state keeps anything, those outside a mask for example, are the parameters
    themselves: it is safe to call this for any optimizer. Works inside `jax.jit`, and on the state
    of `nnx.Optimizer` with `nnx.state(model, nnx.Param)`.

    Args:
        state: the state of any optax transformation.
        params: the parameters as they are trained.

    Returns:
        A tree like `params`, in its dtypes; for lookahead one like `params.slow`.

    Raises:
        ValueError: two states keep parameters for one leaf, by their places; or a state keeps
            others than these.

    Example:
        >>> import jax.numpy as jnp, optax, optlab
        >>> tx = optax.chain(optax.clip(1.0), optax.contrib.schedule_free_sgd(0.5))
        >>> p = jnp.ones(2)
        >>> u, state = tx.update(p, tx.init(p), p)
        >>> print(optlab.eval_params(state, optax.apply_updates(p, u)))
        [0.5 0.5]
    """
    nodes = dict(walk.states(walk.unboxed(state)))
    bare = walk.unboxed(params)
    ours, names = jax.tree.leaves(bare, is_leaf=_leafwise.is_hole), _paths(bare)
    chosen: list[tuple[str, Any] | None] = [None] * len(ours)
    for path, node in nodes.items():
        found = _leaves(node, nodes.get(path[:-1]), bare, names)
        place = f"{type(node).__name__} at '{'/'.join(path)}'"
        for i, x in enumerate(found):
            if not _leafwise.is_hole(x):
                _check_first(names[i], place, chosen[i])
                chosen[i] = place, x
    slow = _slow(nodes, params, chosen)
    if slow is not None:
        return slow
    leaves = [p if c is None else c[1].astype(p.dtype) for c, p in zip(chosen, ours, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=_leafwise.is_hole), leaves)


def _paths(params: Any) -> list[str]:
    keyed, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_leafwise.is_hole)
    return [_layout.path_str(path) for path, _ in keyed]


def _leaves(node: Any, outer: Any, params: Any, names: list[str]) -> list[Any]:
    """Return what one state says of every leaf: nothing, or holes, where it says nothing."""
    if isinstance(node, contrib.ScheduleFreeState):
        # An injected b1 may change, and has the parameters' widest dtype; the state's own does not.
        b1 = getattr(outer, "hyperparams", {}).get("b1", node.b1)
        b1 = jnp.asarray(b1, _leafwise.widen(jnp.result_type(b1)))
        return [_extrapolated(*pair, b1) for pair in _pairs(node, "z", params, names)]
    if isinstance(node, AverageParamsState):
        return [
            a if _leafwise.is_hole(a) else jnp.where(node.count > 0, a, p.astype(a.dtype))
            for p, a in _pairs(node, "average", params, names)
        ]
    return []


def _pairs(node: Any, field: str, params: Any, names: list[str]) -> list[tuple[Any, Any]]:
    """Return the leaves of the parameters with what a field holds in their places, maybe holes."""
    where = f"{type(node).__name__}.{field}"
    held, treedef = jax.tree.flatten(getattr(node, field), is_leaf=_leafwise.is_hole)
    try:
        parts = treedef.flatten_up_to(params)
    except ValueError as error:
        raise ValueError(
            f"{NAME}: {where} and params are different trees. "
            "Pass the whole tree of parameters that init was given."
        ) from error
    leaves = lambda tree: jax.tree.leaves(tree, is_leaf=_leafwise.is_hole)  # noqa: E731
    # One hole may stand for a subtree of leaves.
    pairs = [(p, x) for x, part in zip(held, parts, strict=True) for p in leaves(part)]
    for name, (p, x) in zip(names, pairs, strict=True):
        if not _leafwise.is_hole(x) and jnp.shape(x) != jnp.shape(p):
            raise ValueError(
                f"{NAME}: leaf '{name}' has shape {jnp.shape(p)}, in {where} {jnp.shape(x)}. "
                "Pass the very parameters that are trained; what runs inside a change of space, "
                "such as in_low_rank, keeps none to evaluate with."
            )
    return pairs


def _extrapolated(y: jax.Array, z: Any, b1: jax.Array) -> Any:
    if _leafwise.is_hole(z):
        return z
    wide = _leafwise.widen(jnp.promote_types(y.dtype, z.dtype))
    y, z = y.astype(wide), z.astype(wide)
    # (y - (1 - b1) z)/b1, without the difference of two large numbers.
    return z + (y - z) / b1.astype(wide)


def _check_first(name: str, place: str, before: tuple[str, Any] | None) -> None:
    if before is not None:
        raise ValueError(
            f"{NAME}: two states keep parameters for leaf '{name}', {before[0]} and {place}. "
            "Pass the part of the state that holds the one you mean."
        )


def _slow(nodes: dict[walk.Path, Any], params: Any, chosen: list[Any]) -> Any:
    """Return the slow weights of lookahead, or None where there is no lookahead."""
    places = [path for path, node in nodes.items() if isinstance(node, optax.LookaheadState)]
    if not places:
        return None
    if not isinstance(params, optax.LookaheadParams):
        raise ValueError(
            f"{NAME}: the state has a LookaheadState at '{'/'.join(places[0])}', whose slow "
            f"weights are in params, got {type(params).__name__}. Pass the LookaheadParams."
        )
    others = {c[0] for c in chosen if c is not None}
    if others:
        raise ValueError(
            f"{NAME}: {', '.join(sorted(others))} and LookaheadState at '{'/'.join(places[0])}' "
            "both keep parameters. Pass the part of the state that holds the one you mean."
        )
    return params.slow
