"""Numbers about a step, written down for `metrics`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import _checks, _leafwise
from optlab.distributed.shardings import everywhere, mesh_of
from optlab.transforms import measures as _measures

Measure = Callable[[Any, Any, Any], jax.Array]
"""`(updates, new, params) -> scalar`; its `__name__` is the metric's, also within a `partial`."""


class WatchState(NamedTuple):
    """State of `watch`."""

    count: jax.Array  # int32, (): updates seen
    values: dict[str, jax.Array]  # float32, () each, by name: of the last step, 0 before the first
    inner: optax.OptState

    def metrics(self) -> dict[str, jax.Array]:
        """Return what was measured at the last step."""
        return self.values


@_checks.explain_calls
def watch(
    inner: optax.GradientTransformation,
    measures: Sequence[Measure] = (_measures.gradient_rms, _measures.update_rms),
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Write down numbers about every step of `inner`, for `metrics` to read; change nothing.

    Measures are functions (updates, new, params) -> scalar of what goes into `inner`, what comes
    out, and the parameters. `optlab.measures` has: gradient_rms, gradient_mean_abs, update_rms,
    relative_update, trust_ratio_min, trust_ratio_median, trust_ratio_max, clip_rate,
    orthogonality_error and nonfinite_entries; any function of yours does as well, and its name
    becomes the metric's.

    On a TPU (v5e) the size of the gradient is free; that of AdamW's update costs 48 bytes of memory
    traffic per parameter instead of 28.

    It can stand anywhere: around a whole optimizer or around one link of it, such as a clip. Within
    `optax.MultiSteps` it sees real steps.

    Args:
      inner: the transformation to watch.
      measures: what to measure; `functools.partial` sets keywords. (static)
      learning_rate: a schedule, or a number, to be written down as `learning_rate` too: give it the
        schedule that `inner` was given, whose count no state shows. None for nothing.

    Returns:
      `inner`'s output. Measures of parameters need params.

    State:
      values: one float32 per measure, in a dict; count: int32; inner: `inner`'s own.

    Raises:
      TypeError: a measure is no function, or has no name.
      ValueError: two measures of one name; at the first update, one that returns no scalar.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.watch(optax.sgd(0.1), [optlab.measures.update_rms])
      >>> u, state = tx.update(jnp.ones(4), tx.init(jnp.zeros(4)))
      >>> print(optlab.metrics(state)["update_rms"])
      0.1
    """
    name = "watch"
    _checks.check_transform(name, "inner", inner)
    if learning_rate is not None:
        _checks.check_nonnegative(name, learning_rate=learning_rate, schedule=True)
    named = _named(name, measures, learning_rate)
    keys = sorted([*named, *(["learning_rate"] if learning_rate is not None else [])])
    inner = optax.with_extra_args_support(inner)

    def init(params):
        _leafwise.check_tree(name, params)
        zero = everywhere(jnp.zeros([], jnp.float32), mesh_of(params))
        # A buffer each: two leaves of one state must not share one.
        values = {key: jnp.zeros_like(zero) for key in keys}
        return WatchState(jnp.zeros([], jnp.int32), values, inner.init(params))

    def update(updates, state, params=None, **extra_args):
        new, inside = inner.update(updates, state.inner, params, **extra_args)
        values: dict[str, Any] = {k: m(updates, new, params) for k, m in named.items()}
        if learning_rate is not None:
            rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
            values["learning_rate"] = rate
        mesh = mesh_of(updates)
        values = {key: everywhere(_scalar(name, key, x), mesh) for key, x in values.items()}
        return new, WatchState(_leafwise.increment(state.count), values, inside)

    return optax.GradientTransformationExtraArgs(init, update)


def _scalar(name: str, key: str, value: Any) -> jax.Array:
    if value is None or jnp.shape(value) != ():
        got = "nothing" if value is None else f"shape {jnp.shape(value)}"
        raise ValueError(
            f"{name}: measure {key!r} must return a scalar, got {got}. "
            "Return its mean or largest entry."
        )
    return jnp.asarray(value, jnp.float32)


def _named(name: str, measures: Any, learning_rate: Any) -> dict[str, Measure]:
    """Return the measures by name."""
    if callable(measures) or not isinstance(measures, Sequence):
        fix = " Write [optlab.measures.update_rms]."
        raise _checks.refusal(TypeError, name, "measures", "a list of functions", measures, fix)
    named: dict[str, Measure] = {}
    for measure in measures:
        called = getattr(getattr(measure, "func", measure), "__name__", "<lambda>")
        if not callable(measure) or called == "<lambda>":
            must, fix = "functions with a name", " Write it with def."
            raise _checks.refusal(TypeError, name, "measures", must, measure, fix)
        if called in named or (called == "learning_rate" and learning_rate is not None):
            must = "functions of different names"
            fix = f" Rename one {called!r}."
            raise _checks.refusal(ValueError, name, "measures", must, measure, fix)
        named[called] = measure
    return named
