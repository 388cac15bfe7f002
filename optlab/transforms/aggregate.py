"""Robust means of gradients: over examples, over groups of a batch, over steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from optlab import _checks, _leafwise

# XLA's sort takes 37 ms on CPU for 8 gradients of 131072 entries, a network of minima and maxima
# 0.4 ms; for 16 it is 105 against 2.4 ms. The network of 32 takes 1.8 s to compile.
_LARGEST_NETWORK = 16


class RollingMedianState(NamedTuple):
    """State of `rolling_median`."""

    count: jax.Array  # int32, (): steps seen
    previous: tuple  # of trees, in the parameters' dtypes: the gradients before, the latest first


def _network(n: int) -> list[tuple[int, int]]:
    """Return the compare-exchanges of Batcher's odd-even mergesort of n items."""
    found, run = [], 1
    while run < n:
        step = run
        while step:
            starts = range(step % run, n - step, 2 * step)
            lows = [i for start in starts for i in range(start, min(start + step, n - step))]
            found += [(i, i + step) for i in lows if i // (2 * run) == (i + step) // (2 * run)]
            step //= 2
        run *= 2
    return found


def _sorted(x: jax.Array) -> jax.Array:
    """Sort along the first axis; a NaN counts as +inf."""
    x = jnp.where(jnp.isnan(x), jnp.inf, x)
    if len(x) > _LARGEST_NETWORK:
        return jnp.sort(x, axis=0)
    rows = list(x)
    for i, j in _network(len(rows)):
        rows[i], rows[j] = jnp.minimum(rows[i], rows[j]), jnp.maximum(rows[i], rows[j])
    return jnp.stack(rows)


def _median(x: jax.Array) -> jax.Array:
    """Return the median over the first axis."""
    half, rows = len(x) // 2, _sorted(x)
    return rows[half] if len(x) % 2 else rows[half - 1] / 2 + rows[half] / 2


def _percentile(rows: jax.Array, percent: ArrayLike) -> jax.Array:
    """Return a percentile of sorted rows, interpolated linearly between the two beside it."""
    position = jnp.asarray(percent, rows.dtype) / 100 * (len(rows) - 1)
    weights = jnp.maximum(1 - jnp.abs(jnp.arange(len(rows)) - position), 0)
    weights = weights.reshape(-1, *[1] * (rows.ndim - 1)).astype(rows.dtype)
    # A row without weight may be infinite.
    return jnp.sum(jnp.where(weights > 0, weights * rows, 0), axis=0, keepdims=True)


def whole(x: jax.Array) -> jax.Array:
    """Gather the first axis on an Explicit mesh, where a sharded one cannot be sorted."""
    first, *rest = jax.typeof(x).sharding.spec or (None,)
    return x if first is None else jax.sharding.reshard(x, PartitionSpec(None, *rest))


def _over_axis(name: str, axis: int, fn: Any) -> optax.GradientTransformationExtraArgs:
    """Build the transformation that drops an axis: `fn(path, u)` sees it as the first one."""

    def leaf(path, u, _, *params):
        shape = u.shape[:axis] + u.shape[axis + 1 :]
        expected = params[0].shape if params else shape
        if u.ndim <= axis or shape != expected or not u.shape[axis]:
            raise ValueError(
                f"{name}: leaf '{path}' needs a gradient per example or group along axis {axis}, "
                f"got shape {u.shape}{f' for parameters of {expected}' if params else ''}. "
                "Compute them with jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batch)."
            )
        return (fn(path, whole(jnp.moveaxis(u, axis, 0))),)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        others = () if params is None else (params,)
        return _leafwise.leafwise(name, leaf, updates, others=others)[0], state

    return optax.GradientTransformationExtraArgs(_leafwise.init_checked(name), update)


@_checks.explain_calls
def winsorize(percent: ArrayLike, axis: int = 0) -> optax.GradientTransformationExtraArgs:
    """Average per-example gradients whose extremes are pulled in (winsorized gradient descent).

    Entry by entry, over n examples, with l and h the c-th and (100 - c)-th percentiles,
    interpolated linearly:  u = mean_i clip(g_i, l, h).  c = 0 is the mean, c = 50 the median.

    What few examples want does not reach the update, so that less is memorized. A NaN counts as
    +inf: what is not finite in fewer than c percent of the examples is clipped like any extreme.

    Args:
      percent: c, in [0, 50]; the paper sweeps 1 to 8 for about 100 examples.
      axis: of the examples, >= 0, in every leaf. (static)

    Returns:
      A stateless transformation whose output lacks that axis, as
      `optax.contrib.differentially_private_aggregate`; put it first in a chain. On an Explicit
      mesh an axis that is sharded is gathered; under `jax.shard_map` or `jax.pmap` gather it
      yourself: `jax.lax.all_gather(grads, name, axis=axis, tiled=True)`.

    State:
      None. The incoming gradients take n times the memory of the parameters.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.winsorize(percent=25)
      >>> grads = jnp.array([[1.0], [2.0], [3.0], [4.0], [1e6]])
      >>> u, _ = tx.update(grads, tx.init(jnp.zeros(1)))
      >>> print(u)
      [3.]
    """
    name = "winsorize"
    must = "a number in [0, 50]"
    _checks.check_range(name, must, lambda c: 0 <= c <= 50, percent=percent)
    _checks.check_steps(name, axis=axis)

    def leaf(_, u):
        rows = _sorted(u)
        low, high = _percentile(rows, percent), _percentile(rows, 100 - percent)
        return jnp.mean(jnp.clip(rows, low, high), axis=0)

    return _over_axis(name, axis, leaf)


@_checks.explain_calls
def median_of_groups(num_groups: int = 3) -> optax.GradientTransformationExtraArgs:
    """Take the median of the mean gradients of a few groups of the batch (M3).

    Entry by entry, with m_k the mean over the k-th of equal, contiguous parts of the first axis:
    u = median(m_1, ..., m_K). Pass K gradients, each the mean of its group, or those of all
    examples. An even K takes the mean of the middle two.

    It costs less than `winsorize`: K gradients instead of one per example. The median of skewed
    numbers is not their mean: an entry that is zero in most groups, as in rows of an embedding,
    stays. A NaN counts as +inf: one bad group of three is outvoted.

    Args:
      num_groups: K, >= 1; 1 is the mean. (static)

    Returns:
      A stateless transformation whose output lacks the first axis; put it first in a chain. Over
      devices: `jax.lax.all_gather(grads, name)` first; on Explicit meshes it gathers by itself.

    State:
      None.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.median_of_groups()
      >>> u, _ = tx.update(jnp.array([[1.0], [2.0], [1e6]]), tx.init(jnp.zeros(1)))
      >>> print(u)
      [2.]
    """
    name = "median_of_groups"
    _checks.check_steps(name, 1, num_groups=num_groups)

    def leaf(path, u):
        if len(u) % num_groups:
            raise ValueError(
                f"{name}: leaf '{path}' has {len(u)} gradients along its first axis, a multiple "
                f"of num_groups={num_groups} is needed. Drop or add examples."
            )
        groups = u.reshape(num_groups, len(u) // num_groups, *u.shape[1:])
        return _median(jnp.mean(groups, axis=1))

    return _over_axis(name, 0, leaf)


@_checks.explain_calls
def rolling_median(
    window: int = 3, *, warmup: str = "passthrough"
) -> optax.GradientTransformationExtraArgs:
    """Take the median of the last few gradients (RM3).

    Entry by entry:  u_t = median(g_t, g_{t-1}, ..., g_{t-w+1}),  each at its own parameters. It
    costs what the plain gradient costs; a gradient that differs from both its neighbours, a spike
    or a NaN (which counts as +inf), does not reach the update. An entry that is zero in most
    steps, as in rows of an embedding, never moves: mask such leaves.

    Args:
      window: w, >= 1; 1 changes nothing. (static)
      warmup: of the first w - 1 steps: "passthrough" uses g_t as it is, "zeros" takes zeros for
        the gradients before the first. The paper does not say. (static)

    Returns:
      A transformation; put it first in a chain.

    State:
      count: int32. previous: w - 1 gradients, 8 bytes per float32 parameter for w = 3.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.rolling_median(warmup="zeros")
      >>> state = tx.init(jnp.zeros(1))
      >>> for g in (1.0, 2.0, 1e6):
      ...     u, state = tx.update(jnp.array([g]), state)
      ...     print(u)
      [0.]
      [1.]
      [2.]
    """
    name = "rolling_median"
    _checks.check_steps(name, 1, window=window)
    _checks.check_choice(name, "warmup", warmup, ("passthrough", "zeros"))

    def init(params):
        previous = tuple(_leafwise.init_slots(name, params) for _ in range(window - 1))
        return RollingMedianState(jnp.zeros([], jnp.int32), previous)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = _leafwise.increment(state.count)

        def leaf(_, u, *rest):
            seen = (u, *rest[:-1])
            median = _median(jnp.stack(seen))
            if warmup == "passthrough":
                median = jnp.where(count < window, u, median)
            return (median, *seen[:-1])

        updates, *previous = _leafwise.leafwise(name, leaf, updates, state.previous)
        return updates, RollingMedianState(count, tuple(previous))

    return optax.GradientTransformationExtraArgs(init, update)
