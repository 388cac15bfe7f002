"""Steps that are not taken: gradients that are not finite, or far larger than usual."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab.linalg import norms, spikes

_NAME = "skip_bad_steps"


class SkipBadStepsState(NamedTuple):
    """State of `skip_bad_steps`."""

    inner: optax.OptState
    level: jax.Array  # float32 or wider, (): the usual norm of a gradient, 0 while not known
    count: jax.Array  # int32, (): accepted steps behind `level`
    skipped: jax.Array  # int32, (): steps skipped
    in_a_row: jax.Array  # int32, (): steps skipped since the last accepted one
    spikes: jax.Array  # int32, (): those of them whose gradients were finite
    ratio: jax.Array  # float32 or wider, (): norm of the last gradient over its usual one

    def metrics(self) -> dict[str, jax.Array]:
        """Return what to watch: skips in all, skips in a row, the last norm over its usual one."""
        return {
            "steps_skipped": self.skipped,
            "steps_skipped_in_a_row": self.in_a_row,
            "gradient_norm_ratio": self.ratio,
        }


def _judged(updates: Any, unit: jax.Array, axis_name: Any) -> tuple[jax.Array, jax.Array]:
    """Return whether all entries are finite, and the squared norm in terms of a unit.

    In its own unit the norm of a usual gradient neither overflows nor underflows when squared.
    """
    bad = _leafwise.scalars(_NAME, lambda _, u, p: jnp.any(~jnp.isfinite(u)), updates)
    inverse = _leafwise.spread(updates, 1 / unit)
    squares = _leafwise.scalars(
        _NAME, lambda _, u, p, by: norms.sum_of_squares(u * by), updates, (inverse,)
    )
    found = jnp.sum(bad != 0), jnp.sum(squares).astype(unit.dtype)
    if axis_name is not None:
        found = jax.lax.psum(found, axis_name)
    return found[0] == 0, found[1]


def _learned(
    state: SkipBadStepsState, unit: jax.Array, square: jax.Array, fresh: jax.Array, limit: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the level and its count after an accepted gradient, from which `fresh` starts anew.

    The level is the root of an average of squared norms; a zero gradient says nothing of them.
    """
    decay, threshold = limit
    largest = jnp.finfo(unit.dtype).max
    count = jnp.where(fresh, 1, _leafwise.increment(state.count))
    weight = (1 - decay) / (1 - jnp.asarray(decay, unit.dtype) ** count)
    # Nothing is a spike while the level is learned: at least it does not carry it away.
    mean = 1 + weight * (jnp.minimum(square, jnp.minimum(threshold, largest)) - 1)
    square = jnp.where(fresh, jnp.minimum(square, largest), mean)
    level = jnp.minimum(unit * jnp.sqrt(square), largest)
    return level, count


@_checks.explain_calls
def skip_bad_steps(
    inner: optax.GradientTransformation,
    *,
    threshold: ArrayLike = 100.0,
    decay: ArrayLike = 0.99,
    warmup: int = 20,
    patience: int = 10,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Skip the steps whose gradients are not finite or spike: zero updates, `inner` untouched.

    With the squared norm s_t of all gradients together and its average over accepted steps,
      l_t = l_{t-1} + (1 - d)/(1 - d^t) (s_t - l_{t-1}),
    a step is skipped where an entry is not finite, or s_t > threshold l_{t-1}. Spikes are told
    apart after `warmup` accepted steps, but a norm whose square overflows in terms of the usual
    one, such as 1e30, at once. After `patience` spikes without an accepted step the next finite
    gradient is taken, and the average begins anew from it: no change of level is skipped for ever.

    A skipped step is no step to `inner`: its schedules and counters wait. It sees zeros then, and
    what it makes of them is thrown away. `optax.apply_if_finite` differs: it takes non-finite
    gradients after some in a row, and knows no spikes. Like it, put this outermost, around what
    clips; around `optax.MultiSteps` it judges micro-batches, inside their mean.

    Args:
      inner: the optimizer to protect.
      threshold: of the squared norm over its average, > 1; 100 is ten times the usual norm, inf
        no bound.
      decay: d, of the average; 0.99 remembers about 100 accepted steps.
      warmup: accepted steps without spikes, >= 0. (static)
      patience: spikes skipped before a new level is accepted, >= 0. (static)
      axis_name: mesh axes of `jax.shard_map` or `jax.pmap` over which the gradients differ:
        norms are summed over them, and all devices decide alike. (static)

    Returns:
      A wrapper that emits `inner`'s updates or zeros.

    State:
      inner: `inner`'s. Six scalars; `metrics()` tells the steps skipped, those in a row, and the
      last norm over the usual one.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.skip_bad_steps(optax.sgd(0.1))
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in (1.0, jnp.nan, 2.0):
      ...     u, state = tx.update(jnp.array([g]), state)
      ...     print(u)
      [-0.1]
      [0.]
      [-0.2]
      >>> print(state.skipped)
      1
    """
    _checks.check_transform(_NAME, "inner", inner)
    _checks.check_range(_NAME, "a number > 1", lambda x: x > 1, threshold=threshold)
    _checks.check_decay(_NAME, decay=decay)
    _checks.check_steps(_NAME, warmup=warmup, patience=patience)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        _leafwise.check_tree(_NAME, params)
        dtype = _leafwise.scalar_dtype(params)
        number, whole = (lambda: jnp.zeros([], dtype)), (lambda: jnp.zeros([], jnp.int32))
        return SkipBadStepsState(
            inner.init(params), number(), whole(), whole(), whole(), whole(), number()
        )

    def counted(state, finite, square, unit) -> tuple[jax.Array, SkipBadStepsState]:
        """Return whether the step is taken, and the state of the watch, `inner`'s apart."""
        known = (state.level > 0) & (state.count >= warmup)
        spike = finite & spikes.exceeds(square, known.astype(unit.dtype), threshold)
        patient = spike & (state.spikes >= patience)
        taken = (finite & ~spike) | patient
        fresh = patient | (state.level == 0)
        level, count = _learned(state, unit, square, fresh, (decay, threshold))
        informs = taken & (square > 0)
        more = lambda n, by: jnp.where(by, _leafwise.increment(n), n)  # noqa: E731
        finite_square = jnp.where(finite, square, jnp.inf)
        ratio = jnp.sqrt(jnp.minimum(finite_square, jnp.finfo(unit.dtype).max))
        return taken, SkipBadStepsState(
            state.inner,
            jnp.where(informs, level, state.level),
            jnp.where(informs, count, state.count),
            more(state.skipped, ~taken),
            jnp.where(taken, 0, more(state.in_a_row, ~taken)),
            jnp.where(taken, 0, more(state.spikes, spike)),
            jnp.where(state.level > 0, ratio, 0),
        )

    def update(updates, state, params=None, **extra_args):
        # A level below the smallest normal number has an infinite inverse.
        usual = state.level > jnp.finfo(state.level.dtype).tiny
        unit = jnp.where(usual, state.level, 1)
        taken, new = counted(state, *_judged(updates, unit, axis_name), unit)
        safe = jax.tree.map(lambda u: jnp.where(taken, u, jnp.zeros_like(u)), updates)
        updates, inner_state = inner.update(safe, state.inner, params, **extra_args)
        # Not `lax.cond`, which refuses an inner state whose type the first step settles: on CPU
        # AdamW of 8M parameters takes 37 ms with either, a skipped step 36 against 32.
        updates = jax.tree.map(lambda u: jnp.where(taken, u, jnp.zeros_like(u)), updates)
        kept = jax.tree.map(lambda n, o: jnp.where(taken, n, o), inner_state, state.inner)
        return updates, new._replace(inner=kept)

    return optax.GradientTransformationExtraArgs(init, update)
