"""Which leaves a matrix method takes, and the optimizer of the others."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import optax
from jax.typing import DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.transforms.adaptive import scale_by_moments
from optlab.transforms.decay import add_cautious_decay, add_decay

FALLBACK = "fallback"


def _is_box(x: Any) -> bool:
    """Tell whether `x` is a box of Linen's, which has to go with its leaf and not stay empty."""
    return callable(getattr(x, "unbox", None))


def by_role(
    name: str,
    methods: Mapping[str, optax.GradientTransformation],
    fallback: optax.GradientTransformation,
    layout: _layout.Policy,
    label_of: Callable[[str], str] = str,
) -> optax.GradientTransformationExtraArgs:
    """Give every leaf to the method under `label_of` its role in `layout`, or to `fallback`."""
    _checks.check_callable(name, layout=layout)
    _checks.check_transform(name, FALLBACK, fallback)

    def label(key_path: Any, leaf: Any) -> str:
        leaf = leaf.unbox() if _is_box(leaf) else leaf
        found = label_of(_layout.role(_layout.path_str(key_path), leaf, layout))
        return found if found in methods else FALLBACK

    known: dict[Hashable, Any] = {**methods, FALLBACK: fallback}

    def routed(tree: Any) -> optax.GradientTransformationExtraArgs:
        labels = jax.tree_util.tree_map_with_path(label, tree, is_leaf=_is_box)
        return optax.partition(known, labels)

    def init(params):
        _leafwise.check_tree(name, params)
        return routed(params).init(params)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            return routed(updates).update(updates, state, None, **extra_args)
        _leafwise.aligned(name, updates, ("the parameters", params))
        # A missing gradient has no role: ask the parameters.
        return routed(params).update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def adamw(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Any,
    weight_decay_mask: _leafwise.Mask,
    mu_dtype: DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    """Return the default for leaves that are no matrices: AdamW as Muon's released code has it."""
    return optax.chain(
        scale_by_moments(0.9, 0.95, 1e-10, mu_dtype=mu_dtype),
        decay(name, weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def decay(
    name: str, weight_decay: Any, mask: _leafwise.Mask, *, cautious: bool = False
) -> optax.GradientTransformation:
    """Return the link of decoupled weight decay; nothing where the rate is the number 0.

    XLA may not leave out 0 p, which is NaN for an infinite p: for hundreds of leaves that shows in
    the time of compilation.
    """
    _checks.check_nonnegative(name, weight_decay=weight_decay)
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    if cautious:
        return add_cautious_decay(weight_decay, mask)
    return add_decay(name, weight_decay, mask)


def rate_of_fallback(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    given: optax.ScalarOrSchedule | None,
    ratio: float,
) -> optax.ScalarOrSchedule:
    """Return the fallback's rate: the given one, or a fixed share of the matrices'."""
    if given is not None:
        _checks.check_nonnegative(name, fallback_learning_rate=given, schedule=True)
        return given
    if callable(learning_rate):
        return lambda step: ratio * learning_rate(step)
    return ratio * learning_rate
