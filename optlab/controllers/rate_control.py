"""Learning rates that look at what they did: at accuracy, at another gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab.distributed.shardings import everywhere, mesh_of
from optlab.linalg import norms


class AccuracyGradientRateState(NamedTuple):
    """State of `accuracy_gradient_rate`."""

    values: jax.Array  # float32, (window,): the last values, newest last
    mean: jax.Array  # float32, (): of those that are there
    epochs: jax.Array  # int32, (): values seen
    quiet: jax.Array  # int32, (): epochs since the last reduction, from `patience` at the start
    scale: jax.Array  # float32, (): what updates are multiplied by

    def metrics(self) -> dict[str, jax.Array]:
        """Return the factor, how often there was a value, and the moving mean of the values."""
        return {"rate_scale": self.scale, "epochs": self.epochs, "moving_mean": self.mean}


class HypergradientRateState(NamedTuple):
    """State of `hypergradient_rate`."""

    count: jax.Array  # int32, (): steps taken
    rate: jax.Array  # float32, (): the learning rate of the last step
    previous: Any  # the last directions in the parameters' shapes if `previous`, else None
    inner: optax.OptState

    def metrics(self) -> dict[str, jax.Array]:
        """Return the learning rate of the last step."""
        return {"learned_rate": self.rate}


@_checks.explain_calls
def accuracy_gradient_rate(
    factor: ArrayLike = 0.8,
    *,
    window: int = 5,
    patience: int = 5,
    threshold: ArrayLike = 5e-3,
    min_scale: ArrayLike = 0.0,
    mode: str = "max",
) -> optax.GradientTransformationExtraArgs:
    """Scale updates down when the moving mean of the validation accuracy no longer rises.

    At the n-th value: m_n = mean of the last `window` values, q <- q + 1 from q = patience;
      if n - 1 > window, q > patience and m_n - m_(n-1) < threshold:
        scale <- max(factor scale, min_scale), q <- 1.
    The extra argument `value` is the accuracy, with the first step after its evaluation, and NaN
    with every other: one program, nothing recompiles, and the state is saved with the optimizer's.
    `optax.contrib.reduce_on_plateau` waits for a new best value; this one for a rise of the mean.

    Args:
      factor: of every reduction, in (0, 1].
      window: values in the mean, >= 1. (static)
      patience: epochs between reductions, >= 0. (static)
      threshold: a rise below it is too slow, >= 0.
      min_scale: where reductions end, >= 0.
      mode: "max" for accuracy, "min" for a loss. (static)

    Returns:
      A transformation whose output is its input times `scale`; last in a chain. Needs the extra
      argument `value`.

    State:
      values: `window` float32; a few scalars.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.accuracy_gradient_rate(0.5, window=1, patience=0)
      >>> state = tx.init(jnp.zeros(1))
      >>> for accuracy in (0.5, 0.6, jnp.nan, 0.601):
      ...     u, state = tx.update(jnp.ones(1), state, value=accuracy)
      >>> print(u)
      [0.5]

    References:
      Nikfam, Marchisio, Martina and Shafique, AccelAT: a framework for accelerating the adversarial
      training of deep neural networks through accuracy gradient, arXiv:2210.06888, 2022; the
      authors' code.
    """
    name = "accuracy_gradient_rate"
    _checks.check_range(name, "a number in (0, 1]", lambda x: 0 < x <= 1, factor=factor)
    _checks.check_steps(name, 1, window=window)
    _checks.check_steps(name, patience=patience)
    _checks.check_nonnegative(name, threshold=threshold, min_scale=min_scale)
    _checks.check_choice(name, "mode", mode, ("max", "min"))
    sign = 1 if mode == "max" else -1

    def init(params):
        _leafwise.check_tree(name, params)
        dtype, mesh = _leafwise.scalar_dtype(params), mesh_of(params)
        new = lambda shape, kind, fill: everywhere(jnp.full(shape, fill, kind), mesh)  # noqa: E731
        return AccuracyGradientRateState(
            new((window,), dtype, 0),
            new((), dtype, 0),
            new((), jnp.int32, 0),
            new((), jnp.int32, patience),
            new((), dtype, 1),
        )

    def after(state: AccuracyGradientRateState, value: jax.Array) -> AccuracyGradientRateState:
        values = jnp.concatenate([state.values[1:], value[None]])
        epochs, quiet = map(_leafwise.increment, (state.epochs, state.quiet))
        mean = jnp.sum(values) / jnp.minimum(epochs, window)
        slow = (state.epochs > window) & (quiet > patience)
        slow &= sign * (mean - state.mean) < threshold
        scale = jnp.where(slow, jnp.maximum(state.scale * factor, min_scale), state.scale)
        return AccuracyGradientRateState(values, mean, epochs, jnp.where(slow, 1, quiet), scale)

    def update(updates, state, params=None, **extra_args):
        del params
        value = _scalar(name, "value", _leafwise.read(name, extra_args, "value"))
        value = everywhere(value.astype(state.scale.dtype), mesh_of(updates))
        new = after(state, jnp.where(jnp.isfinite(value), value, 0))
        state = jax.tree.map(
            lambda a, b: jnp.where(jnp.isfinite(value), a.astype(b.dtype), b), new, state
        )
        return _leafwise.scale_leaves(name, updates, state.scale), state

    return optax.GradientTransformationExtraArgs(init, update)


def _scalar(name: str, argument: str, value: Any) -> jax.Array:
    if jnp.shape(value) != ():
        raise ValueError(
            f"{name}: {argument} must be a scalar, got shape {jnp.shape(value)}. Pass its mean."
        )
    return jnp.asarray(value)


@_checks.explain_calls
def hypergradient_rate(
    inner: optax.GradientTransformation,
    learning_rate: ArrayLike = 0.1,
    meta_rate: ArrayLike = 0.01,
    *,
    bounds: tuple[float, float] = (1e-4, 0.5),
    accumulate: bool = True,
    previous: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Descend an objective f with `inner`'s direction, and its learning rate by f's hypergradient.

    u = inner(g),  -eta u is the update,  d f(x - eta u)/d eta = -<grad f, u> at eta = 0:
      eta <- clip(eta + meta_rate <a, u>, bounds)              where a, the extra argument
      eta  = clip(learning_rate + meta_rate <a, u>, bounds)    `aux_grad`, is grad f at x.
    The second form is without `accumulate`. The first step has the given rate. f may be a
    validation loss, or the training loss itself: with `previous=True` and a = g this is
    hypergradient descent.

    Args:
      inner: gives the direction u, with neither rate nor sign: `optax.scale_by_adam()`.
      learning_rate: rate of the first step; without `accumulate` that around which it moves.
      meta_rate: rate of the rate, >= 0. <a, u> is as large as f's gradient and u are.
      bounds: least and largest rate, 0 <= low <= high. (static)
      accumulate: keep what was learned; BIB's code starts anew at every step. (static)
      previous: pair a with the direction of the step before, whose effect a is the slope of, rather
        than with this step's. (static)

    Returns:
      A wrapper: -eta u, the last link of a chain. Needs the extra argument `aux_grad`, a tree like
      the gradient.

    State:
      rate, count: scalars; inner: `inner`'s; previous: the parameter's shape in float32 or wider if
      asked for, 4 bytes per parameter.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.hypergradient_rate(optax.identity(), 0.1, 0.01)
      >>> g = jnp.array([1.0, 2.0])
      >>> state = tx.init(g)
      >>> for _ in range(2):
      ...     u, state = tx.update(g, state, aux_grad=g)
      >>> print(u)
      [-0.15 -0.3 ]

    Deviations:
      BIB ascends f: give minus its gradient. Its accumulating form is commented out in its code.
      Where <a, u> is not a number the rate stays.

    References:
      Chen et al., Bidirectional learning for offline model-based biological sequence design,
      arXiv:2301.02931, 2023 (Adaptive-eta). Baydin et al., Online learning rate adaptation with
      hypergradient descent, arXiv:1703.04782, 2017.
    """
    name = "hypergradient_rate"
    _checks.check_transform(name, "inner", inner)
    _checks.check_positive(name, learning_rate=learning_rate)
    _checks.check_nonnegative(name, meta_rate=meta_rate)
    low, high = _check_bounds(name, bounds)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        rate = jnp.asarray(learning_rate, _leafwise.scalar_dtype(params))
        last = _leafwise.init_slots(name, params, _leafwise.widen) if previous else None
        return HypergradientRateState(
            jnp.zeros([], jnp.int32),
            everywhere(jnp.clip(rate, low, high), mesh_of(params)),
            last,
            inner.init(params),
        )

    def update(updates, state, params=None, **extra_args):
        aux = _leafwise.read(name, extra_args, "aux_grad")
        direction, inside = inner.update(updates, state.inner, params, **extra_args)
        gain = meta_rate * _dot(name, state.previous if previous else direction, aux)
        start = state.rate if accumulate else jnp.asarray(learning_rate, state.rate.dtype)
        moved = jnp.clip(start + gain, low, high).astype(state.rate.dtype)
        first = (state.count == 0) | jnp.isnan(gain)
        rate = everywhere(jnp.where(first, state.rate, moved), mesh_of(updates))
        last = state.previous
        if previous:
            _, last = _leafwise.leafwise(name, lambda _, u, s, p: (u, u), direction, (last,))
        count = _leafwise.increment(state.count)
        new = _leafwise.scale_leaves(name, direction, -rate)
        return new, HypergradientRateState(count, rate, last, inside)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_bounds(name: str, bounds: Any) -> tuple[float, float]:
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low <= high:
        must, fix = "two numbers 0 <= low <= high", " Write for example (1e-4, 0.5)."
        raise _checks.refusal(ValueError, name, "bounds", must, bounds, fix)
    return low, high


def _dot(name: str, tree: Any, other: Any) -> jax.Array:
    """Return the sum of products of all entries; leaves that are missing do not count."""
    return jnp.sum(_leafwise.scalars(name, lambda _, u, p, a: jnp.sum(u * a), tree, (other,)))


@_checks.explain_calls
def alrs_rate(
    learning_rate: ArrayLike, scale_grads: Any, bits: int, *, top_bits: int = 8
) -> jax.Array:
    """Return the rate of quantization scales at one width in bits, from their gradients.

    eta_b max(0, lr - mean over layers of min(max |clip(g)|, 1)), each layer's gradient clipped to
    norm 1; with D = top_bits - bits, eta_b = 10^(-D/2) for an even D, else 5 10^(-(D + 1)/2).

    Args:
      learning_rate: lr.
      scale_grads: a tree with the gradient of one layer's quantization scales per leaf.
      bits: width that this step trains at, 1 <= bits <= top_bits. (static)
      top_bits: largest width. (static)

    Returns:
      A scalar. Of use only where quantization scales are trained, with an optimizer of their own
      and without decay.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> grads = [jnp.array([0.02, -0.03]), jnp.array([0.01])]
      >>> print(f"{optlab.alrs_rate(0.1, grads, 6):.4f}")
      0.0080

    Deviations:
      As printed the bracket turns negative where gradients exceed lr; here the rate is 0 then. No
      code was released, and what the paper means by clipping is our reading.

    References:
      Huang et al., Nearly lossless adaptive bit switching, arXiv:2502.01199, 2025 (eq. 6 and 7).
    """
    name = "alrs_rate"
    _checks.check_nonnegative(name, learning_rate=learning_rate)
    _checks.check_steps(name, 1, bits=bits)
    _checks.check_steps(name, bits, top_bits=top_bits)
    leaves = jax.tree.leaves(scale_grads)
    if not leaves:
        must = "a tree of gradients, one leaf per layer"
        raise _checks.refusal(ValueError, name, "scale_grads", must, scale_grads)
    largest = [norms.largest(g) / jnp.maximum(norms.frobenius(g), 1) for g in leaves]
    below = top_bits - bits
    eta = 10.0 ** (-below / 2) if below % 2 == 0 else 5 * 10.0 ** (-(below + 1) / 2)
    # What is clipped to norm 1 has no entry above 1.
    return eta * jnp.maximum(learning_rate - jnp.mean(jnp.stack(largest)), 0)
