"""Scale a momentum by what is known of the raw gradient, each seen where the other is."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise


class WithRawGradientState(NamedTuple):
    """State of `with_raw_gradient`."""

    momentum: optax.OptState
    inner: optax.OptState


class ScaleByRawGradientState(NamedTuple):
    """State of `scale_by_raw_gradient`."""

    nu: optax.Updates  # mean squares of the raw gradient, in the parameter's shape


@_checks.explain_calls
def with_raw_gradient(
    momentum: optax.GradientTransformation, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Run `momentum` and `inner` in a row, and hand `inner` the gradient too, as `raw_gradient`.

    Args:
      momentum: what `inner`'s updates come from.
      inner: reads the extra argument `raw_gradient`, a tree like the updates.

    Returns:
      `inner`'s output.

    State:
      That of `momentum` and of `inner`.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> momentum = optlab.interpolate_momentum(0.9, 0.9)
      >>> tx = optlab.with_raw_gradient(momentum, optlab.scale_by_raw_gradient(0.75, eps=0.0))
      >>> u, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
      >>> print(u)
      [0.2]
    """
    name = "with_raw_gradient"
    _checks.check_transform(name, "momentum", momentum)
    _checks.check_transform(name, "inner", inner)
    momentum, inner = map(optax.with_extra_args_support, (momentum, inner))

    def init(params):
        return WithRawGradientState(momentum.init(params), inner.init(params))

    def update(updates, state, params=None, **extra_args):
        average, first = momentum.update(updates, state.momentum, params, **extra_args)
        extra_args = extra_args | {"raw_gradient": updates}
        new, second = inner.update(average, state.inner, params, **extra_args)
        return new, WithRawGradientState(first, second)

    return optax.GradientTransformationExtraArgs(init, update)


@_checks.explain_calls
def scale_by_raw_gradient(
    b2: ArrayLike = 0.999, *, eps: ArrayLike = 1e-8
) -> optax.GradientTransformationExtraArgs:
    """Divide the updates by the root mean square of the raw gradient.

    nu <- b2 nu + (1 - b2) g^2 from zero,  u <- u/(sqrt(nu) + eps), where g is the extra argument
    `raw_gradient`. After a momentum this is Adam without bias correction; in a rotated
    basis, Conda.

    Args:
      b2: rate of the mean squares, in [0, 1).
      eps: added to the root, > 0 for entries without a gradient.

    Returns:
      A transformation that needs the extra argument `raw_gradient`, as from `with_raw_gradient`.

    State:
      nu: the parameter's shape, in float32 or wider; 4 bytes per float32 parameter.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.scale_by_raw_gradient(0.75, eps=0.0)
      >>> g = jnp.array([2.0])
      >>> u, _ = tx.update(g, tx.init(jnp.zeros(1)), raw_gradient=g)
      >>> print(u)
      [2.]
    """
    name = "scale_by_raw_gradient"
    _checks.check_decay(name, b2=b2)
    _checks.check_nonnegative(name, eps=eps)

    def leaf(path, u, nu, p, g):
        del path, p
        nu = b2 * nu + (1 - b2) * g * g
        return u / (jnp.sqrt(nu) + eps), nu

    return _leafwise.stateful(
        name,
        ScaleByRawGradientState,
        (_leafwise.widen,),
        lambda: leaf,
        reads=("raw_gradient",),
    )
