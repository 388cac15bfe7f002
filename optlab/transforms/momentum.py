"""First moments beside optax's `ema` and `trace`."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise


class InterpolateMomentumState(NamedTuple):
    """State of `interpolate_momentum`."""

    mu: optax.Updates  # the average, in the parameter's shape


class EmaFromFirstState(NamedTuple):
    """State of `ema_from_first`."""

    count: jax.Array  # int32, (): updates seen
    mu: optax.Updates  # the average, in the parameter's shape


class DebiasedEmaState(NamedTuple):
    """State of `debiased_ema`."""

    count: jax.Array  # int32, (): updates seen
    mu: optax.Updates  # the average from zero, in the parameter's shape


class HeavyBallState(NamedTuple):
    """State of `heavy_ball`."""

    trace: optax.Updates  # the decaying sum, in the parameter's shape


class PreviousUpdatesState(NamedTuple):
    """State of `with_previous_updates`."""

    previous: optax.Updates  # the updates of the last step, in the parameter's shape
    inner: optax.OptState


def correction(decay: ArrayLike, count: jax.Array) -> jax.Array:
    """Return 1 - decay^count."""
    if isinstance(decay, int | float):
        # 1 - 0.999 loses 13 bits of float32; its logarithm, taken in float64, loses none.
        return -jnp.expm1(count * (math.log(decay) if decay else -math.inf))
    return 1 - jnp.asarray(decay) ** count


def debias(decay: ArrayLike, count: jax.Array) -> jax.Array:
    """Return 1/(1 - decay^count): to divide every entry by the scalar costs XLA on CPU more."""
    return 1 / correction(decay, count)


def _reads_new_average(b1: ArrayLike, b2: ArrayLike) -> bool:
    static = isinstance(b1, int | float) and isinstance(b2, int | float)
    return static and b2 > 0 and b1 <= 2 * b2


@_checks.explain_calls
def interpolate_momentum(
    b1: ArrayLike = 0.9, b2: ArrayLike = 0.99, *, mu_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Emit an interpolation of gradient and average that uses another rate than the average.

    With mu_0 = 0:  u_t = b1 mu_{t-1} + (1 - b1) g_t,   mu_t = b2 mu_{t-1} + (1 - b2) g_t.

    This is Lion's momentum. b1 = b2 is a plain average without bias correction, b1 < b2 looks
    ahead as Nesterov's does, b1 = 0 is the gradient itself.

    For Python numbers with 0 < b1/b2 <= 2 the same u_t is computed as r mu_t + (1 - r) g_t,
    r = b1/b2. Both read the new average only, so with donated state XLA overwrites mu in place; the
    textbook form costs a copy of mu on CPU (100 % of its bytes, and about twice the time). The two
    differ by max(1, r) roundings. Rates given as arrays take the textbook form.

    Args:
      b1: rate of the emitted interpolation, in [0, 1).
      b2: rate of the stored average, in [0, 1).
      mu_dtype: dtype of the average; None for the parameter's. A narrower one is copied on CPU,
        since u_t is computed before the average is rounded. (static)

    Returns:
      A transformation whose output has the size of a gradient.

    State:
      mu: the parameter's shape; 4 bytes per float32 parameter.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.interpolate_momentum(0.9, 0.99)
      >>> u, _ = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))
      >>> print(u)
      [0.1 0.1]
    """
    name = "interpolate_momentum"
    _checks.check_decay(name, b1=b1, b2=b2)
    _checks.check_dtype(name, mu_dtype=mu_dtype)

    def leaf(path, g, mu, p):
        del path, p
        new = b2 * mu + (1 - b2) * g
        if not _reads_new_average(b1, b2):
            return b1 * mu + (1 - b1) * g, new
        r = b1 / b2
        return (new if r == 1 else r * new + (1 - r) * g), new

    return _leafwise.stateful(name, InterpolateMomentumState, (mu_dtype,), lambda: leaf)


@_checks.explain_calls
def ema_from_first(
    decay: ArrayLike, *, mu_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Average the updates, starting from the first one instead of from zero.

    mu_1 = g_1,  mu_t = decay mu_{t-1} + (1 - decay) g_t; emits mu_t.

    `optax.ema` starts from zero, and its bias correction weighs the first gradients differently.

    Args:
      decay: rate in [0, 1).
      mu_dtype: dtype of the average; None for the parameter's. (static)

    Returns:
      A transformation whose output has the size of a gradient.

    State:
      mu: the parameter's shape; 4 bytes per float32 parameter.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.ema_from_first(0.9)
      >>> u, _ = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))
      >>> print(u)
      [1. 1.]
    """
    name = "ema_from_first"
    _checks.check_decay(name, decay=decay)
    _checks.check_dtype(name, mu_dtype=mu_dtype)

    def make_leaf(count):
        keep = jnp.where(count == 1, 0.0, decay)

        def leaf(path, g, mu, p):
            del path, p
            new = keep * mu + (1 - keep) * g
            return new, new

        return leaf

    return _leafwise.stateful(name, EmaFromFirstState, (mu_dtype,), make_leaf)


@_checks.explain_calls
def debiased_ema(
    decay: ArrayLike, *, nesterov: bool = False, mu_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """Average the updates and divide by the sum of the weights; with nesterov as NAdam looks ahead.

    mu <- decay mu + (1 - decay) g from zero;  emits mu/(1 - decay^t), or with nesterov
    decay mu/(1 - decay^(t+1)) + (1 - decay) g/(1 - decay^t).

    The momentum of `optax.contrib.muon`; without nesterov `optax.ema(decay)`'s numbers. NAdam's
    form weighs the newest gradient more while t is small: 1.95 times as much as
    `interpolate_momentum(decay, decay)`'s look ahead at t = 1 for decay = 0.95.

    Args:
      decay: rate in [0, 1).
      nesterov: look one step ahead. (static)
      mu_dtype: dtype of the average; None for the parameter's. (static)

    Returns:
      A transformation whose output has the size of a gradient.

    State:
      mu: the parameter's shape; 4 bytes per float32 parameter. count: int32.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.debiased_ema(0.5)
      >>> u, _ = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))
      >>> print(u)
      [1. 1.]
    """
    name = "debiased_ema"
    _checks.check_decay(name, decay=decay)
    _checks.check_dtype(name, mu_dtype=mu_dtype)

    def make_leaf(count):
        now, ahead = (debias(decay, t) for t in (count, _leafwise.increment(count)))

        def leaf(path, g, mu, p):
            del path, p
            mu = decay * mu + (1 - decay) * g
            return (decay * ahead * mu + (1 - decay) * now * g if nesterov else now * mu), mu

        return leaf

    return _leafwise.stateful(name, DebiasedEmaState, (mu_dtype,), make_leaf)


@_checks.explain_calls
def heavy_ball(
    momentum: ArrayLike,
    *,
    dampening: ArrayLike = 0.0,
    nesterov: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Sum the updates with decaying weights (Polyak's momentum, as in PyTorch's SGD).

    m <- momentum m + (1 - dampening) g from zero;  emits m, or g + momentum m with nesterov.

    Without dampening these are `optax.trace`'s numbers; here the buffer follows the sharding of its
    parameter under `jax.jit(tx.init)` too.

    Args:
      momentum: rate of the buffer, in [0, 1).
      dampening: share of the gradient kept out of the buffer, in [0, 1); Nesterov's own term takes
        the whole gradient.
      nesterov: look one step ahead. (static)
      mu_dtype: dtype of the buffer; None for the parameter's. (static)

    Returns:
      A transformation whose output is up to 1/(1 - momentum) times a gradient.

    State:
      trace: the parameter's shape; 4 bytes per float32 parameter.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.heavy_ball(0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     u, state = tx.update(jnp.ones(2), state)
      >>> print(u)
      [1.5 1.5]
    """
    name = "heavy_ball"
    _checks.check_decay(name, momentum=momentum, dampening=dampening)
    _checks.check_dtype(name, mu_dtype=mu_dtype)

    def leaf(path, g, trace, p):
        del path, p
        trace = momentum * trace + (1 - dampening) * g
        return (g + momentum * trace if nesterov else trace), trace

    return _leafwise.stateful(name, HeavyBallState, (mu_dtype,), lambda: leaf)


@_checks.explain_calls
def with_previous_updates(
    inner: optax.GradientTransformation,
    *,
    last: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Hand `inner` the updates of the step before, as the extra argument `previous_updates`.

    The first step hands over zeros. Every link inside a chain receives the argument, so a rule that
    compares two gradients needs no memory of its own.

    Args:
      inner: the transformation to feed.
      last: promise that what `inner` emits is added to the parameters as it is. The gradient is
        then remembered only where the new parameter is finite, and the comparison makes XLA read
        the old memory before it overwrites it in place: without the promise a donated state is
        copied on CPU (100 % of its bytes). Needs params. (static)
      mu_dtype: dtype of the memory; None for the parameter's. (static)

    Returns:
      `inner`'s output.

    State:
      previous: the parameter's shape; 4 bytes per float32 parameter. inner: `inner`'s own.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> def difference(u, state, params=None, *, previous_updates, **extra_args):
      ...     return u - previous_updates, state
      >>> change = optax.GradientTransformationExtraArgs(optax.init_empty_state, difference)
      >>> tx = optlab.with_previous_updates(change)
      >>> state = tx.init(jnp.zeros(2))
      >>> for g in (1.0, 3.0):
      ...     u, state = tx.update(jnp.full(2, g), state)
      >>> print(u)
      [2. 2.]
    """
    name = "with_previous_updates"
    _checks.check_transform(name, "inner", inner)
    _checks.check_dtype(name, mu_dtype=mu_dtype)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return PreviousUpdatesState(
            _leafwise.init_slots(name, params, mu_dtype), inner.init(params)
        )

    def remember(path, g, previous, p, u):
        del path
        return g, (jnp.where(jnp.isfinite(p + u), g, 0) if last else g)

    def update(updates, state, params=None, **extra_args):
        if last:
            _leafwise.require_params(name, params)
        # Inside, a leaf sees its own dtype: what was stored narrow is widened by the shell.
        new, inner_state = inner.update(
            updates, state.inner, params, **(extra_args | {"previous_updates": state.previous})
        )
        _, previous = _leafwise.leafwise(
            name, remember, updates, (state.previous,), params if last else None, others=(new,)
        )
        return new, PreviousUpdatesState(previous, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
