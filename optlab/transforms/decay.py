"""Weight decay in the forms that optax lacks; `optax.add_decayed_weights` is the plain one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise


class DecayAfterUpdateState(NamedTuple):
    """State of `decay_after_update`."""

    count: jax.Array  # int32, (): updates seen


def _masked(name, leaf, mask):
    """Build `update` from `leaf(u, p)` for the leaves of a mask."""

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _leafwise.require_params(name, params)
        decays = _leafwise.resolve_mask(name, mask, params)
        (updates,) = _leafwise.leafwise(
            name,
            lambda _, u, p, decays: (leaf(u, p, state) if decays else u,),
            updates,
            (),
            params,
            others=(decays,),
        )
        return updates, state

    return update


def add_decay(
    name: str, weight_decay: optax.ScalarOrSchedule, mask: _leafwise.Mask
) -> optax.GradientTransformationExtraArgs:
    """`optax.add_decayed_weights` for the recipe `name`, which its errors name with the leaf."""
    decay = optax.add_decayed_weights(weight_decay, mask)

    def init(params):
        _leafwise.resolve_mask(name, mask, params)
        return decay.init(params)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _leafwise.require_params(name, params)
        _leafwise.resolve_mask(name, mask, params)
        _leafwise.leafwise(name, lambda _, u, p: (u,), updates, (), params)
        return decay.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


@_checks.explain_calls
def add_cautious_decay(
    weight_decay: ArrayLike = 0.0, mask: _leafwise.Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Add weight decay only where it agrees with the direction of the update.

    u <- u + weight_decay p [u p >= 0], entry by entry; u points uphill, so the step -lr u and the
    decay then pull the same way. Place it where `optax.add_decayed_weights` goes: before the
    learning rate.

    Args:
      weight_decay: rate, >= 0.
      mask: leaves that decay. (static)

    Returns:
      A stateless transformation. Needs params.

    State:
      None.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.add_cautious_decay(0.1)
      >>> p = jnp.array([1.0, 1.0])
      >>> u, _ = tx.update(jnp.array([1.0, -1.0]), tx.init(p), p)
      >>> print(u)
      [ 1.1 -1. ]
    """
    name = "add_cautious_decay"
    _checks.check_nonnegative(name, weight_decay=weight_decay)

    def leaf(u, p, state):
        del state
        return u + jnp.where(u * p >= 0, weight_decay * p, 0)

    return optax.GradientTransformationExtraArgs(
        _leafwise.init_checked(name), _masked(name, leaf, mask)
    )


@_checks.explain_calls
def decay_after_update(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: ArrayLike = 0.0,
    mask: _leafwise.Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Decay the weights after the step has been added to them.

    u <- u - learning_rate weight_decay (p + u), so that p + u <- (1 - lr wd)(p + u). The order of
    the Adam in Hugging Face's and GaLore's code; elsewhere the old weights decay.

    Args:
      learning_rate: the rate of the chain, or its schedule.
      weight_decay: rate, >= 0.
      mask: leaves that decay. (static)

    Returns:
      A transformation that must come last, after the learning rate. Needs params.

    State:
      count: int32.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optax.chain(optax.scale_by_learning_rate(1.0), optlab.decay_after_update(1.0, 0.5))
      >>> p = jnp.array([4.0])
      >>> u, _ = tx.update(jnp.array([2.0]), tx.init(p), p)
      >>> print(p + u)
      [1.]
    """
    name = "decay_after_update"
    _checks.check_nonnegative(name, learning_rate=learning_rate, schedule=True)
    _checks.check_nonnegative(name, weight_decay=weight_decay)

    def leaf(u, p, state):
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        return u - rate * weight_decay * (p + u)

    apply = _masked(name, leaf, mask)

    def init(params):
        _leafwise.check_tree(name, params)
        return DecayAfterUpdateState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        updates, _ = apply(updates, state, params, **extra_args)
        return updates, DecayAfterUpdateState(_leafwise.increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)
