"""Which blocks of a tree of updates move: the rules of `select_blocks`."""

import math
import numbers
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optlab import _checks, _leafwise
from optlab.distributed.shardings import everywhere
from optlab.linalg import norms
from optlab.linalg.largest import largest_entries
from optlab.transforms.noise import Groups, labels_of

NAME = "select_blocks"
GREEDY = ("gs", "gsl", "gsd")
ORDERS = ("ascending", "descending", "random")


class Selection(NamedTuple):
    """What decides which blocks move."""

    rule: str
    k: int | float
    every: int
    groups: Groups
    bound: Any
    normalize: bool
    seed: int

    def number(self, of: int) -> int:
        """Return k, a fraction taken of a number of blocks; of what is there, at least one."""
        k = self.k if isinstance(self.k, numbers.Integral) else max(1, round(self.k * of))
        return min(int(k), of)


class _Blocks(NamedTuple):
    """The blocks of a tree, in their order. Leaves that are missing or empty are in none."""

    labels: tuple[Any, ...]
    inside: np.ndarray  # bool, (blocks, leaves)
    sizes: np.ndarray  # entries of each block


def _blocks(tree: Any, groups: Groups) -> _Blocks:
    named, _, _ = _leafwise.aligned(NAME, tree)
    given, labels = iter(jax.tree.leaves(labels_of(NAME, groups, tree))), {}
    for index, (path, leaf) in enumerate(named):
        if leaf is None:
            continue
        label = path if groups is None else groups(path, leaf) if callable(groups) else next(given)
        if leaf.size:
            labels[index] = label
    try:
        order = dict.fromkeys(labels.values())
        order = tuple(order) if groups is None else tuple(sorted(order))
    except TypeError as error:
        raise TypeError(
            f"{NAME}: groups must give labels that can be sorted, got {list(labels.values())[:3]}. "
            "Write text for every block, or a whole number."
        ) from error
    inside = np.zeros((len(order), len(named)), bool)
    for index, label in labels.items():
        inside[order.index(label), index] = True
    leaf_sizes = np.array([0 if leaf is None else leaf.size for _, leaf in named], float)
    return _Blocks(order, inside, inside @ leaf_sizes)


def _constants(bound: Mapping[Any, Any], labels: tuple[Any, ...]) -> list[Any]:
    lacking = [label for label in labels if label not in bound]
    if lacking:
        raise ValueError(
            f"{NAME}: bound has no constant for {lacking[:3]}, it has {list(bound)[:3]}. "
            "Give one for every block, under its label or the path of its leaf."
        )
    return [bound[label] for label in labels]


def _diagonal(bound: Any, updates: Any) -> Any:
    """Return the bound as a tree like the updates, of arrays of their shapes or scalars."""
    try:
        tree = jax.tree.broadcast(bound, updates, is_leaf=_leafwise.is_none)
    except ValueError as error:
        raise ValueError(
            f"{NAME}: bound is no prefix of the tree of updates. Give an array of the shape of "
            "every leaf, or a number for a leaf or a subtree."
        ) from error
    named, (column,), _ = _leafwise.aligned(NAME, updates, ("bound", tree))
    for (path, u), d in zip(named, column, strict=True):
        if u is not None and jnp.shape(d) not in ((), u.shape):
            raise ValueError(
                f"{NAME}: bound of leaf '{path}' has shape {jnp.shape(d)}, the leaf {u.shape}. "
                "Give an array of the leaf's shape, or a number."
            )
    return tree


def _scores(selection: Selection, updates: Any, blocks: _Blocks) -> jax.Array:
    """Return the square of every block's score."""
    weighed = (_diagonal(selection.bound, updates),) if selection.rule == "gsd" else ()

    def of_leaf(path, u, p, *d):
        del path, p
        return jnp.sum(norms.safe_divide(u * u, d[0])) if d else norms.sum_of_squares(u)

    squares = everywhere(_leafwise.scalars(NAME, of_leaf, updates, weighed))
    scores = jnp.sum(jnp.where(blocks.inside, squares[None], 0), axis=1)
    if selection.normalize:
        scores /= blocks.sizes.astype(scores.dtype)
    if selection.rule == "gsl":
        constants = _constants(selection.bound, blocks.labels)
        scores /= jnp.stack([jnp.asarray(x, scores.dtype) for x in constants])
    return scores


def _next(selection: Selection, blocks: int, k: int, turn: jax.Array) -> jax.Array:
    """Return the blocks whose turn it is."""
    if selection.rule == "random":
        turns = math.ceil(blocks / k)  # of one sweep
        key = jax.random.fold_in(jax.random.key(selection.seed), turn // turns)
        places = (turn % turns * k + jnp.arange(k)) % blocks
        return jax.random.permutation(key, blocks)[places]
    ascending = (turn % blocks * k + jnp.arange(k)) % blocks
    return ascending if selection.rule == "ascending" else blocks - 1 - ascending


def _choose_leaves(selection: Selection, updates: Any, turn: jax.Array) -> jax.Array:
    """Return which leaves move, from whole blocks."""
    blocks = _blocks(updates, selection.groups)
    number = len(blocks.labels)
    if not number:
        return jnp.zeros(blocks.inside.shape[1:], bool)
    k = selection.number(number)
    if selection.rule in GREEDY:
        places = jax.lax.top_k(_scores(selection, updates, blocks), k)[1]
    else:
        places = _next(selection, number, k, turn)
    chosen = jnp.any(places[:, None] == jnp.arange(number)[None], axis=0)
    return jnp.any(blocks.inside & chosen[:, None], axis=0)


def _choose_entries(selection: Selection, updates: Any) -> Any:
    """Return which entries move, as a tree like the updates."""
    bound = 1.0 if selection.bound is None else selection.bound
    (scores,) = _leafwise.leafwise(
        NAME,
        lambda _, u, p, d: (norms.safe_divide(jnp.abs(u), jnp.sqrt(d)),),
        updates,
        others=(_diagonal(bound, updates),),
        keep_dtype=False,
    )
    column, treedef = jax.tree.flatten(scores)
    size = sum(x.size for x in column)
    if size >= 2**31:
        raise ValueError(
            f'{NAME}: rule "top_k" counts up to 2^31 - 1 entries, got {size}. '
            "Wrap parts of the tree one by one, or choose whole blocks."
        )
    if not size:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, bool), scores)
    return jax.tree.unflatten(treedef, largest_entries(column, selection.number(size)))


def _masks(updates: Any, chosen: jax.Array) -> Any:
    """Return a bool per leaf as a tree like the updates, with their holes."""
    leaves, treedef = jax.tree.flatten(updates, is_leaf=_leafwise.is_none)
    return treedef.unflatten([None if u is None else chosen[i] for i, u in enumerate(leaves)])


def nothing(selection: Selection, params: Any) -> Any:
    """Return a choice of nothing, refusing what cannot be chosen from."""
    _leafwise.check_tree(NAME, params)
    if selection.rule == "top_k":
        return jax.tree.map(lambda p: _leafwise.zeros_like(p, bool), params)
    labels = _blocks(params, selection.groups).labels
    if selection.rule == "gsl":
        _constants(selection.bound, labels)
    return jnp.zeros((_leafwise.leaf_count(params),), bool)


def choose(selection: Selection, updates: Any, last: Any, count: jax.Array) -> tuple[Any, Any]:
    """Return the choice of step `count`, the last one or a new one, and a tree of masks."""
    first = count % selection.every == 0
    if selection.rule == "top_k":
        choice = _choose_entries(selection, updates)
        renew = lambda _, u, old, p, new: (u, jnp.where(first, new, old))  # noqa: E731
        _, chosen = _leafwise.leafwise(NAME, renew, updates, (last,), others=(choice,))
        present = lambda u, c: None if u is None else c  # noqa: E731
        return chosen, jax.tree.map(present, updates, chosen, is_leaf=_leafwise.is_none)
    _leafwise.check_count(NAME, updates, last)
    choice = _choose_leaves(selection, updates, count // selection.every)
    chosen = jnp.where(first, choice, last)
    return chosen, _masks(updates, chosen)


def check(selection: Selection) -> None:
    """Refuse what does not belong together, or to nothing."""
    rule, k, bound = selection.rule, selection.k, selection.bound
    _checks.check_choice(NAME, "rule", rule, (*GREEDY, "top_k", *ORDERS))
    whole = isinstance(k, numbers.Integral) and not isinstance(k, bool) and k >= 1
    if not whole and not (isinstance(k, float) and 0 < k <= 1):
        must, fix = "a whole number >= 1, or a fraction in (0, 1]", " Write 1 for one block."
        raise _checks.refusal(ValueError, NAME, "k", must, k, fix)
    if selection.normalize and rule not in GREEDY:
        must, fix = f"False for rule {rule!r}", ' Only "gs", "gsl" and "gsd" weigh blocks.'
        raise _checks.refusal(ValueError, NAME, "normalize", must, True, fix)
    if rule == "top_k" and selection.groups is not None:
        must, fix = 'None for rule "top_k"', " It chooses entries, not blocks."
        raise _checks.refusal(ValueError, NAME, "groups", must, selection.groups, fix)
    if isinstance(selection.seed, bool) or not isinstance(selection.seed, numbers.Integral):
        raise _checks.refusal(TypeError, NAME, "seed", "a whole number", selection.seed)
    _checks.check_steps(NAME, 1, every=selection.every)
    _check_bound(rule, bound)


def _check_bound(rule: str, bound: Any) -> None:
    refuse = partial(_checks.refusal, ValueError, NAME, "bound")
    if rule == "gsl":
        if not isinstance(bound, Mapping):
            fix = ' Write {"dense/kernel": 2.0, ...}.'
            raise refuse('a mapping from blocks to constants for rule "gsl"', bound, fix)
        for value in bound.values():
            _checks.check_positive(NAME, bound=value)
    elif rule == "gsd" and bound is None:
        raise refuse('a tree for rule "gsd"', bound, " Give what each g^2 is divided by.")
    elif rule not in ("gsd", "top_k") and bound is not None:
        raise refuse(f"None for rule {rule!r}", bound, ' "gsl", "gsd" and "top_k" take one.')
