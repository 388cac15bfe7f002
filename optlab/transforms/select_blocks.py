"""Updates of a few blocks of the parameters at a time."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import _checks, _leafwise
from optlab.transforms import block_rules
from optlab.transforms.noise import Groups

NAME = block_rules.NAME
Rule = Literal["gs", "gsl", "gsd", "top_k", "ascending", "descending", "random"]
InnerState = Literal["freeze", "follow", "restart"]


class SelectBlocksState(NamedTuple):
    """State of `select_blocks`."""

    count: jax.Array  # int32, (): updates seen
    chosen: Any  # bool, (leaves,): which move; "top_k": bool, the parameters' shapes
    inner: optax.OptState
    others: optax.OptState

    def metrics(self) -> dict[str, jax.Array]:
        """Return the share of blocks that move; of "top_k", of entries."""
        chosen = jax.tree.leaves(self.chosen)
        entries = max(sum(x.size for x in chosen), 1)
        return {"moving_share": sum((jnp.sum(x) for x in chosen), jnp.zeros([])) / entries}


def _pick(masks: Any, updates: Any, where: bool) -> Any:
    """Return the updates where the mask is as asked for, zeros elsewhere."""
    one = lambda m, u: jnp.where(m if where else ~m, u, 0)  # noqa: E731
    return jax.tree.map(one, masks, updates)


def _merge(mask: jax.Array, u: jax.Array, new: jax.Array, rest: jax.Array) -> jax.Array:
    return jnp.where(mask, new.astype(u.dtype), rest.astype(u.dtype))


def _merge_states(inner: optax.GradientTransformation, masks: Any, new: Any, old: Any) -> Any:
    """Return the new state of what moved, the old of the rest, and all new that is no leaf's own.

    State of a leaf that has another shape is new where any entry of the leaf moved.
    """
    is_hole = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731

    def flag(leaf, mask):
        if is_hole(leaf):
            return leaf
        return False if mask is None else mask if mask.shape == leaf.shape else jnp.any(mask)

    flags = optax.tree.map_params(
        inner.init, flag, new, masks, transform_non_params=lambda _: True, is_leaf=is_hole
    )
    keep = lambda f, n, o: n if f is True else jnp.where(f, n, o)  # noqa: E731
    return jax.tree.map(keep, flags, new, old)


@_checks.explain_calls
def select_blocks(
    inner: optax.GradientTransformation,
    rule: Rule = "gs",
    k: int | float = 1,
    *,
    every: int = 1,
    groups: Groups = None,
    bound: Any = None,
    normalize: bool = False,
    inner_state: InnerState = "freeze",
    others: optax.GradientTransformation | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Let k blocks of the parameters move, the others not, and choose again every few steps.

    At steps 0, every, 2 every, ...: S = the k blocks b with the largest score, or the next k;
      u_b = inner(g)_b for b in S,   u_b = others(g)_b or 0 elsewhere.

    Rules with a score, of Nutini et al.; ties go to the block that comes first:
      "gs"     |g_b|, the 2-norm: the steepest block. Large leaves win, unless `normalize`.
      "gsl"    |g_b|/sqrt(L_b), for a Lipschitz constant L_b of each block
      "gsd"    sqrt(sum g_i^2/D_i) over the block, for a diagonal bound D of the Hessian
      "top_k"  |g_i| or |g_i|/sqrt(D_i): k single entries of the whole tree
    Rules that take turns, of BAdam and FRUGAL:
      "ascending", "descending"  the next k in that order, which closes to a ring
      "random"                   a new permutation whenever all had their turn

    Choosing blocks saves the cost of moments only outside of `jit`: here the state is dense, and
    every block is computed. On several devices, average gradients before they get here.

    Args:
      inner: what moves the blocks chosen, such as `optax.scale_by_adam()`.
      rule: one of the rules above. (static)
      k: how many blocks move; a float is a fraction of them, rounded, at least one. From all on,
        every block moves. (static)
      every: steps until the next choice. (static)
      groups: what a block is: labels as a tree, a prefix of one or a function (path, leaf) -> label
        make blocks in the order of their labels; None: each leaf is one, in the tree's order. Not
        for "top_k". (static)
      bound: for "gsl" a mapping from label, or path of a leaf, to L; for "gsd" and "top_k" D as a
        tree like the parameters or a prefix of one; all > 0. (static)
      normalize: divide the score of a block by the root of its number of entries. (static)
      inner_state: what becomes of the state of `inner`. "freeze": a leaf's state stays while the
        leaf does, counters that all share go on; a gradient not chosen is not seen. "follow": every
        leaf's state sees every gradient. "restart": whenever blocks are chosen, all state starts
        anew, counters too, as in BAdam and FRUGAL. With "freeze", Adam's correction of its averages
        is that of all steps: a block that first moves late steps 3.2 times as far at
        (b1, b2) = (0.9, 0.999). (static)
      others: what moves the other blocks; None: nothing does. FRUGAL's is `apply_kappa()`, the
        sign of the gradient, times a factor. (static)
      seed: of "random". (static)

    Returns:
      A wrapper with the output of `inner` where blocks move, of `others` elsewhere. Decay that all
      blocks should get, and the rate, come after it.

    State:
      count: int32. chosen: one bool per leaf; with "top_k" 1 byte per parameter. inner: `inner`'s,
      for all parameters, whether they move or not. others: that of `others`.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.select_blocks(optax.identity(), "gs")
      >>> g = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([6.0])}
      >>> u, _ = tx.update(g, tx.init(g))
      >>> print(u["a"], u["b"])
      [0. 0.] [6.]

    References:
      Nutini et al., "Let's Make Block Coordinate Descent Converge Faster", arXiv:1712.08859, 2017;
      the authors' code, IssamLaradji/BlockCoordinateDescent@322066b2, scores with 1-norms.
      Luo et al., "BAdam", arXiv:2404.02827, 2024. Zmushko et al., "FRUGAL", arXiv:2411.07837, 2024.
    """
    _checks.check_transform(NAME, "inner", inner)
    selection = block_rules.Selection(rule, k, every, groups, bound, normalize, seed)
    block_rules.check(selection)
    _checks.check_choice(NAME, "inner_state", inner_state, ("freeze", "follow", "restart"))
    if others is not None:
        _checks.check_transform(NAME, "others", others)
    inner = optax.with_extra_args_support(inner)
    beside = optax.with_extra_args_support(others or optax.set_to_zero())

    def init(params):
        chosen = block_rules.nothing(selection, params)
        count = jnp.zeros([], jnp.int32)
        return SelectBlocksState(count, chosen, inner.init(params), beside.init(params))

    def before(state, params):
        """Return the inner state to step from."""
        if inner_state != "restart":
            return state.inner
        _leafwise.require_params(NAME, params)
        first = state.count % every == 0
        return jax.tree.map(partial(jnp.where, first), inner.init(params), state.inner)

    def update(updates, state, params=None, **extra_args):
        chosen, masks = block_rules.choose(selection, updates, state.chosen, state.count)
        old = before(state, params)
        seen = updates if inner_state == "follow" else _pick(masks, updates, True)
        new, inside = inner.update(seen, old, params, **extra_args)
        if inner_state == "freeze":
            inside = _merge_states(inner, masks, inside, old)
        rest = _pick(masks, updates, False)
        rest, outside = beside.update(rest, state.others, params, **extra_args)
        merged = jax.tree.map(_merge, masks, updates, new, rest)
        count = _leafwise.increment(state.count)
        return merged, SelectBlocksState(count, chosen, inside, outside)

    return optax.GradientTransformationExtraArgs(init, update)
