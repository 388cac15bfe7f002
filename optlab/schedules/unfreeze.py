"""Groups of leaves that join the training one after another, or leave it."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.schedules.layerwise import check_all_matched, compile_groups, group_of, named_leaves

_NAME = "progressive_unfreeze"


class ProgressiveUnfreezeState(NamedTuple):
    """State of `progressive_unfreeze`."""

    count: jax.Array  # int32, (): updates seen
    training: jax.Array  # int32, (): groups that trained at the last step
    inner: tuple[optax.OptState, ...]  # of each group and of the rest; of all where nothing is held

    def metrics(self) -> dict[str, jax.Array]:
        """Return how many groups trained at the last step."""
        return {"groups_training": self.training}


def _boundaries(steps_per_stage: Any, groups: int) -> np.ndarray:
    """Return the steps at which the second, third, ... stage begins."""
    if not isinstance(steps_per_stage, Sequence):
        _checks.check_steps(_NAME, 1, steps_per_stage=steps_per_stage)
        steps_per_stage = [steps_per_stage] * (groups - 1)
    for steps in steps_per_stage:
        _checks.check_steps(_NAME, 1, steps_per_stage=steps)
    if len(steps_per_stage) != groups - 1:
        must = f"a number or {groups - 1} of them, one per stage but the last"
        raise _checks.refusal(ValueError, _NAME, "steps_per_stage", must, steps_per_stage)
    ends = list(itertools.accumulate(steps_per_stage))
    return np.minimum(np.asarray(ends, np.int64), np.iinfo(np.int32).max).astype(np.int32)


def _in_group(index: int, groups: Any) -> Any:
    """Return a mask, as a function of the tree, of the leaves of one group."""

    def mask(tree):
        mine = lambda path, _: group_of(_layout.path_str(path), groups) == index  # noqa: E731
        return jax.tree_util.tree_map_with_path(mine, tree)

    return mask


def _masked(inner: optax.GradientTransformation, mask: Any) -> Any:
    """Return `optax.masked`, which also takes extra arguments that are trees like the updates."""
    masked = optax.with_extra_args_support(optax.masked(inner, mask))

    def update(updates, state, params=None, **extra_args):
        tree, keeps = jax.tree.structure(updates), mask(updates)
        only = lambda keep, x: x if keep else optax.MaskedNode()  # noqa: E731
        for key, value in extra_args.items():
            if tree.num_leaves > 1 and jax.tree.structure(value) == tree:
                extra_args[key] = jax.tree.map(only, keeps, value)
        return masked.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(masked.init, update)


@_checks.explain_calls
def progressive_unfreeze(
    inner: optax.GradientTransformation,
    groups: Sequence[str],
    steps_per_stage: int | Sequence[int],
    *,
    freeze_state: bool = True,
    reverse: bool = False,
    strict: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Train the top group of leaves first, and one group more below it at every stage.

    In stage k = 0, 1, ... the top k + 1 groups get `inner`'s updates, the others zeros: ULMFiT's
    gradual unfreezing. Leaves of no group always train. One program serves all stages.

    With `freeze_state` every group has an `inner` of its own, whose whole state stands still while
    the group is frozen: moments do not drift, and Adam corrects its bias as at its first step, so
    that a group that joins at step T trains exactly as if training had begun there. What `inner`
    counts or sums over leaves is then counted and summed per group: put a schedule and a clip of
    the global norm outside. Without, `inner` sees all gradients at all steps and its moments are
    warm when a group joins.

    Args:
      inner: the optimizer of the groups.
      groups: expressions, bottom to top; a leaf belongs to the first that is found in its path.
        (static)
      steps_per_stage: steps of every stage, or a list of those of each but the last. (static)
      freeze_state: hold the state of what is frozen. (static)
      reverse: freeze progressively instead: all groups train at first, and at every stage one more
        of them stops, from the bottom up, until the top one trains alone. (static)
      strict: refuse at init a leaf without a group, and a group without leaves. (static)

    Returns:
      A wrapper that emits `inner`'s updates or zeros.

    State:
      count, training: int32. inner: `inner`'s own, of every group; allocated from the start.
      `metrics()` has groups_training.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.progressive_unfreeze(optax.sgd(1.0), ["body", "head"], 1)
      >>> params = {"body": jnp.ones(1), "head": jnp.ones(1)}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     u, state = tx.update(params, state, params)
      ...     print(u["body"], u["head"])
      [0.] [-1.]
      [-1.] [-1.]

    References:
      Howard & Ruder, ULMFiT, arXiv:1801.06146, 2018 (section 3.3).
    """
    _checks.check_transform(_NAME, "inner", inner)
    patterns = compile_groups(_NAME, "groups", groups)
    boundaries, n = _boundaries(steps_per_stage, len(groups)), len(groups)
    # Leaves of no group come last.
    links = [_masked(inner, _in_group(i, patterns)) for i in range(n + 1)]
    links = links if freeze_state else [optax.with_extra_args_support(inner)]

    def init(params):
        _leafwise.check_tree(_NAME, params)
        if strict:
            check_all_matched(_NAME, named_leaves(params), patterns)
        states = tuple(link.init(params) for link in links)
        return ProgressiveUnfreezeState(
            jnp.zeros([], jnp.int32), jnp.asarray(n if reverse else 1, jnp.int32), states
        )

    def held(trains, new, old):
        """Return the states, those of frozen groups as they were."""
        if not freeze_state:
            return new
        keep = lambda on: lambda a, b: jnp.where(on, a, b)  # noqa: E731
        groups = zip(trains, new[:n], old[:n], strict=True)
        return (*(jax.tree.map(keep(on), a, b) for on, a, b in groups), new[n])

    def update(updates, state, params=None, **extra_args):
        passed = jnp.sum(state.count >= boundaries, dtype=jnp.int32)
        training = n - passed if reverse else 1 + passed
        trains = [index >= n - training for index in range(n)]
        states = []
        for link, inside in zip(links, state.inner, strict=True):
            updates, inside = link.update(updates, inside, params, **extra_args)
            states.append(inside)

        def leaf(path, u):
            index = group_of(_layout.path_str(path), patterns)
            return u if index == n else jnp.where(trains[index], u, jnp.zeros_like(u))

        updates = jax.tree_util.tree_map_with_path(leaf, updates)
        count = _leafwise.increment(state.count)
        states = held(trains, tuple(states), state.inner)
        return updates, ProgressiveUnfreezeState(count, training, states)

    return optax.GradientTransformationExtraArgs(init, update)
