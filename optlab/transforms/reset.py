"""Forget moments every so many steps, and start again gently (SPAM)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise

MOMENTS = ("mu", "nu", "nu_max", "trace", "ema", "m1", "m2", "exp_avg", "exp_avg_sq")
"""Fields of optax's and optlab's states that hold averages of gradients and nothing else."""

_COUNTS = ("count", "count_m2")


class ResetMomentsState(NamedTuple):
    """State of `reset_moments`."""

    age: jax.Array  # int32, (): updates since the last reset, which has 0; from 0 at the start
    resets: jax.Array  # int32, (): resets so far
    damped: jax.Array  # float32, (): share that the warm-up took off the last updates
    inner: optax.OptState

    def metrics(self) -> dict[str, jax.Array]:
        """Return the resets so far, and how warm the last step was."""
        return {"resets": self.resets, "rewarm": 1 - self.damped}


def rewarm(age: jax.Array, warmup: int, least: ArrayLike) -> jax.Array:
    """Return the factor of the update `age` steps after a reset: `least` at 0, 1 from `warmup` on.

    1 - (1 - least)(1 + cos(pi age/(warmup + 1)))/2, a cosine that would be 1 at warmup + 1.
    """
    wave = jnp.cos(jnp.pi * age.astype(jnp.result_type(float)) / (warmup + 1))
    return jnp.where(age < warmup, 1 - (1 - jnp.asarray(least)) * (1 + wave) / 2, 1.0)


@_checks.explain_calls
def reset_moments(
    inner: optax.GradientTransformation,
    every: int = 500,
    *,
    warmup: int = 0,
    least: ArrayLike = 0.01,
    fields: Sequence[str] = MOMENTS,
    restart_counts: bool = True,
    late: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Set the moments of `inner` back before updates number every, 2 every, 3 every, ...

    After a reset the first updates are multiplied with
    1 - (1 - least)(1 + cos(pi c/(warmup + 1)))/2, c = 0, 1, ... < warmup steps after it.

    What a spike has left in the moments is gone after at most `every` steps. Any transformation
    will do: states are searched through chains, masks, partitions and wrappers for named tuples
    with such fields, which get the values that `inner.init` gives them. All other state, such as
    the step of a schedule, goes on. Let the warm-up be a fraction of `every`: there is another one
    after each reset.

    Args:
      inner: what has moments.
      every: steps from one reset to the next, >= 1; SPAM's is 500, Stable-SPAM's 1,000. (static)
      warmup: steps after a reset that are damped, >= 0; SPAM's is 150. The start of a run is not
        damped: the schedule of the rate does that. (static)
      least: factor right after a reset, in [0, 1]; SPAM's is 0.01.
      fields: names of the fields that are moments; the default are optax's words for them. Adan:
        ("m", "v", "n"); Adafactor: ("v_row", "v_col", "v"). (static)
      restart_counts: set back the count beside the moments too, so that their bias correction is
        that of a start. Without it Adam's steps are up to (1 - b1)/sqrt(1 - b2) = 3.2 times as long
        right after a reset, and still 2.7 times after 150 steps. (static)
      late: set the fields back after the update instead of before it, whole numbers to 1, since
        they have counted it; the counts beside them before: Stable-SPAM's released code. (static)

    Returns:
      A wrapper with `inner`'s output, damped after resets.

    State:
      age, resets, damped: 12 bytes; inner: `inner`'s.

    Raises:
      ValueError: at init, if no state of `inner` has one of the fields.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.reset_moments(optax.trace(0.5), every=3)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(4):
      ...     u, state = tx.update(jnp.ones(1), state)
      ...     print(u)
      [1.]
      [1.5]
      [1.]
      [1.5]

    References:
      Huang et al., SPAM, arXiv:2501.06842, 2025, Alg. 1; Stable-SPAM, arXiv:2502.17055, 2025.
    """
    name = "reset_moments"
    _checks.check_transform(name, "inner", inner)
    _checks.check_steps(name, 1, every=every)
    _checks.check_steps(name, 0, warmup=warmup)
    _checks.check_range(name, "a number in [0, 1]", lambda x: 0 <= x <= 1, least=least)
    moments = _names(name, fields)
    counts = frozenset(("age", *(_COUNTS if restart_counts else ())))
    inner = optax.with_extra_args_support(inner)

    def init(params):
        state = inner.init(params)
        _check_found(name, state, moments)
        zero = jnp.zeros([], jnp.int32)
        return ResetMomentsState(zero, zero.copy(), jnp.zeros([], jnp.float32), state)

    def update(updates, state, params=None, **extra_args):
        age = _leafwise.increment(state.age)
        due = age >= every
        age = jnp.where(due, 0, age)
        resets = jnp.where(due, _leafwise.increment(state.resets), state.resets)
        # XLA drops all of this but what becomes of the moments. Zeros for parameters, whose own
        # values would be read once more for it: 8 bytes per parameter around `scale_by_moments`.
        fresh = inner.init(jax.tree.map(jnp.zeros_like, updates if params is None else params))
        early = counts if late else moments | counts
        try:
            before = _set_back(state.inner, fresh, due, moments, early)
        except (ValueError, TypeError) as error:
            what = "updates" if params is None else "parameters"
            raise ValueError(
                f"{name}: the {what} are another tree, or of other shapes, than those of the "
                "state. Pass the very parameters that init was given, and their gradients."
            ) from error
        new, after = inner.update(updates, before, params, **extra_args)
        if late:
            after = _set_back(after, _one_counted(fresh), due, moments, moments)
        factor = jnp.ones([])
        if warmup:
            factor = jnp.where(resets > 0, rewarm(age, warmup, least), factor)
            new = _leafwise.scale_leaves(name, new, factor)
        return new, ResetMomentsState(age, resets, (1 - factor).astype(jnp.float32), after)

    return optax.GradientTransformationExtraArgs(init, update)


def _names(name: str, fields: Any) -> frozenset[str]:
    good = isinstance(fields, Sequence) and not isinstance(fields, str) and len(fields) > 0
    if not (good and all(isinstance(field, str) for field in fields)):
        fix = ' Write fields=("mu", "nu").'
        raise _checks.refusal(TypeError, name, "fields", "a tuple of field names", fields, fix)
    return frozenset(fields)


def _fields_of(node: Any) -> tuple[str, ...]:
    return getattr(node, "_fields", ()) if isinstance(node, tuple) else ()


def _set_back(
    state: Any, fresh: Any, due: jax.Array, moments: frozenset[str], fields: frozenset[str]
) -> Any:
    """Return the state with fresh fields where due, in the nodes that have moments."""

    def has_moments(node: Any) -> bool:
        return bool(moments & set(_fields_of(node)))

    def node(old: Any, new: Any) -> Any:
        if not has_moments(old):
            return old
        changes = {}
        for field in _fields_of(old):
            pair = getattr(old, field), getattr(new, field)
            inside = field not in fields
            changes[field] = (
                _set_back(*pair, due, moments, fields) if inside else _chosen(due, *pair)
            )
        return old._replace(**changes)

    return jax.tree.map(node, state, fresh, is_leaf=has_moments)


def _chosen(due: jax.Array, old: Any, new: Any) -> Any:
    """Select between two trees; what was made of a missing gradient is zero anew."""

    def one(x: Any, y: Any) -> Any:
        if y is not None and y.shape != x.shape:
            raise ValueError(f"shapes {x.shape} and {y.shape}")
        return jnp.where(due, jnp.zeros_like(x) if y is None else y.astype(x.dtype), x)

    return jax.tree.map(one, old, new)


def _one_counted(state: Any) -> Any:
    """Return a fresh state whose whole numbers have counted one update."""
    whole = lambda x: jnp.issubdtype(x.dtype, jnp.integer)  # noqa: E731
    return jax.tree.map(lambda x: x + 1 if whole(x) else x, state)


def _check_found(name: str, state: Any, fields: frozenset[str]) -> None:
    """Refuse a state without moments, and say what it has."""
    known: set[str] = set()

    def collect(node: Any) -> bool:
        known.update(_fields_of(node))
        return False

    jax.tree.leaves(state, is_leaf=collect)
    if not fields & known:
        raise ValueError(
            f"{name}: no state of inner has a field named {', '.join(sorted(fields))}, they have "
            f"{', '.join(sorted(known)) or 'none'}. Name those that are moments: fields=(...)."
        )
