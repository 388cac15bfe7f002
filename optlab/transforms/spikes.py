"""Spikes of single entries, and norms of gradients, tamed by what came before (Stable-SPAM)."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed import plan as _plan
from optlab.distributed import sums
from optlab.distributed.shardings import everywhere
from optlab.linalg.norms import safe_divide
from optlab.transforms.momentum import correction

Axes = tuple[int, ...]
AxesOf = Callable[[str, Any], Axes]


class ClipSpikesState(NamedTuple):
    """State of `clip_spikes`."""

    seen: jax.Array  # int32, (leaves or matrices,): steps with a gradient
    maxima: jax.Array  # float32 or wider, likewise: average from zero of max |g|
    rate: jax.Array  # float32, (): share of all entries that the last step clipped
    spikes: jax.Array  # int32, (): entries clipped so far; stays at the largest int32

    def metrics(self) -> dict[str, jax.Array]:
        """Return the share clipped at the last step, and how many entries were so far."""
        return {"clip_rate": self.rate, "spikes": self.spikes}


class NormalizeGradientNormState(NamedTuple):
    """State of `normalize_gradient_norm`."""

    seen: jax.Array  # int32, (leaves or matrices,): steps with a gradient
    norms: jax.Array  # float32 or wider, likewise: average from zero of |g|
    squares: jax.Array  # float32 or wider, likewise: average from zero of |g|^2


def finite_square(g: jax.Array) -> jax.Array:
    """Tell which entries have a square that is finite: what is said of others would be inf."""
    return jnp.isfinite(g * g)


def count_clipped(
    spikes: jax.Array, clipped: list[jax.Array], updates: Any
) -> tuple[jax.Array, jax.Array]:
    """Return the share of all entries that were clipped, and the total that saturates."""
    size = sum(leaf.size for leaf in jax.tree.leaves(updates))
    new = sum(clipped, jnp.zeros([], jnp.int32))
    most = np.iinfo(np.int32).max
    total = jnp.where(spikes > most - new, most, spikes + new)
    return new.astype(jnp.float32) / max(size, 1), total


def _axes_of(layout: _layout.Policy | None) -> AxesOf:
    """Return which axes of a leaf have one statistic in common: all but the layers of a stack."""

    def axes(path: str, leaf: Any) -> Axes:
        view = _layout.view_of(path, leaf, layout) if layout else None
        return (*view.rows, *view.cols) if view else tuple(range(leaf.ndim))

    return axes


def _sizes(tree: Any, axes: AxesOf) -> list[int]:
    """Return the number of statistics of every leaf; a missing one has none."""
    leaves = _plan.named_leaves(tree)
    return [0 if x is None else sums.size_of_sums(x.shape, axes(p, x)) for p, x in leaves]


def _init(name: str, params: Any, axes: AxesOf) -> tuple[jax.Array, jax.Array]:
    """Return zero counts and zero averages."""
    _leafwise.check_tree(name, params)
    leaves = jax.tree.leaves(params)
    mesh = jax.typeof(leaves[0]).sharding.mesh if leaves else None
    shape = (sum(_sizes(params, axes)),)
    seen, zeros = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, _leafwise.scalar_dtype(params))
    return everywhere(seen, mesh), everywhere(zeros, mesh)


def _cuts(name: str, updates: Any, params: Any, axes: AxesOf, found: int) -> np.ndarray:
    """Return where the statistics of every leaf begin, but for the first."""
    sizes = _sizes(updates if params is None else params, axes)
    if sum(sizes) != found:
        raise ValueError(
            f"{name}: the updates have {sum(sizes)} statistics, init saw {found}. "
            "Pass gradients of the very parameters that init was given."
        )
    return np.cumsum(sizes)[:-1]


def _present(updates: Any) -> tuple[list[Any], Any, dict[int, tuple[str, jax.Array]]]:
    """Return the leaves, their structure, and those that hold entries, with their paths."""
    leaves, treedef = jax.tree.flatten(updates, is_leaf=_leafwise.is_none)
    named = _plan.named_leaves(updates)
    return leaves, treedef, {i: x for i, x in enumerate(named) if x[1] is not None and x[1].size}


def _corrected(decay: ArrayLike, average: jax.Array, seen: jax.Array) -> jax.Array:
    """Divide averages from zero by the sum of their weights; 0 where nothing was seen."""
    return jnp.where(seen > 0, average / correction(decay, jnp.maximum(seen, 1)), 0)


def _lerp(decay: ArrayLike, old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.add(decay * old, (1 - decay) * new)


@_checks.explain_calls
def clip_spikes(
    decay: ArrayLike = 0.999, *, layout: _layout.Policy | None = None
) -> optax.GradientTransformationExtraArgs:
    """Bring entries over the average of past maxima down to it, in proportion (AdaClip).

    For each leaf, with M = max |g| and x from zero,
      x <- decay x + (1 - decay) M,   c = x/(1 - decay^n),   g <- g c/M where |g| > c.

    Only the largest entry lands on c; others over it come out below. The first step is left alone;
    later every step whose maximum is above the average loses a little, a spike nearly all.

    An entry whose square is not finite (inf, NaN, over 1e19 in float32) is left out of M and
    becomes c with its sign, a NaN 0. A leaf without a gradient, all zeros, is not counted as a
    step: after 1,000 of them the first real one would be cut to a third otherwise.

    Args:
      decay: rate of the average, in [0, 1).
      layout: None for one threshold per leaf; a policy for one per matrix of a stacked leaf.
        (static)

    Returns:
      A transformation with an output of at most its input's size, and always finite.

    State:
      seen, maxima: 8 bytes per leaf, or per matrix; rate, spikes: in `metrics`.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.clip_spikes(0.5)
      >>> state = tx.init(jnp.zeros(3))
      >>> for spike in (1.0, 9.0):
      ...     u, state = tx.update(jnp.array([1.0, spike, 0.5]), state)
      >>> print(u.round(2), state.spikes)
      [1.   6.33 0.5 ] 1

    References:
      Huang et al., Stable-SPAM, arXiv:2502.17055, 2025, Sec. 3 (AdaClip); code:
      TianjinYellow/StableSPAM at 6a66da1.
    """
    name = "clip_spikes"
    _checks.check_decay(name, decay=decay)
    _checks.check_callable(name, layout=layout)
    axes = _axes_of(layout)

    def init(params):
        seen, maxima = _init(name, params, axes)
        rate, spikes = jnp.zeros([], jnp.float32), jnp.zeros([], jnp.int32)
        return ClipSpikesState(seen, maxima, rate, spikes)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _leafwise.check_tree(name, updates)
        cuts = _cuts(name, updates, params, axes, state.maxima.size)
        leaves, treedef, present = _present(updates)
        tops = jnp.split(jnp.zeros_like(state.maxima), cuts)
        for i, (path, g) in present.items():
            tops[i] = _largest(g, axes(path, g)).astype(state.maxima.dtype)
        top = jnp.concatenate(tops) if tops else state.maxima
        seen = jnp.where(top > 0, _leafwise.increment(state.seen), state.seen)
        maxima = jnp.where(top > 0, _lerp(decay, state.maxima, top), state.maxima)
        level = _corrected(decay, maxima, seen)
        factor, clipped = safe_divide(level, top), []
        numbers = [jnp.split(x, cuts) for x in (level, factor)]
        for i, (path, g) in present.items():
            mine = (x[i].reshape(_beside(g, axes(path, g))) for x in numbers)
            leaves[i], spiked = _clip(g, *mine)
            clipped.append(spiked)
        rate, spikes = count_clipped(state.spikes, clipped, updates)
        return jax.tree.unflatten(treedef, leaves), ClipSpikesState(seen, maxima, rate, spikes)

    return optax.GradientTransformationExtraArgs(init, update)


def _largest(g: jax.Array, axes: Axes) -> jax.Array:
    g = g.astype(_leafwise.widen(g.dtype))
    return everywhere(jnp.max(jnp.where(finite_square(g), jnp.abs(g), 0), axis=axes)).ravel()


def _beside(g: jax.Array, axes: Axes) -> tuple[int, ...]:
    """Return the shape of one number per matrix that broadcasts against the leaf."""
    return tuple(1 if axis in axes else n for axis, n in enumerate(g.shape))


def _clip(g: jax.Array, level: jax.Array, factor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the leaf with its spikes clipped, and how many they were."""
    wide = g.astype(level.dtype)
    usual = finite_square(wide)
    sign = jnp.where(jnp.isnan(wide), 0, jnp.sign(wide))
    spike = ~usual | (jnp.abs(wide) > level)
    clipped = jnp.where(usual, wide * factor, sign * level)
    return jnp.where(spike, clipped, wide).astype(g.dtype), jnp.sum(spike, dtype=jnp.int32)


@_checks.explain_calls
def normalize_gradient_norm(
    b1: ArrayLike = 0.7,
    b2: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    *,
    layout: _layout.Policy | None = None,
    shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Give each leaf the norm that its past norms agree on, about 1 (AdaGN).

    For each leaf, with N = |g| and a, b from zero,
      a <- b1 a + (1 - b1) N,   b <- b2 b + (1 - b2) N^2,
      u = g/N a/(1 - b1^n) / (sqrt(b/(1 - b2^n)) + eps).

    The size of the gradient is gone: what is left of it is how the mean norm of the last few steps
    compares with the root mean square of more. It can stand before any optimizer.

    Entries whose square is not finite count as 0 and become 0. A leaf of zeros stays one, and is
    not counted as a step; nor is one whose sum of squares overflows or vanishes, which becomes 0.

    Args:
      b1: rate of the average norm, in [0, 1).
      b2: rate of the average square, in [0, 1).
      eps: added to the root, >= 0.
      layout: None for one norm per leaf; a policy for one per matrix of a stacked leaf. (static)
      shardings: `optlab.shardings_of(params)`, for one all-reduce on Auto meshes too. (static)

    Returns:
      A transformation with an output of norm about 1, and always finite.

    State:
      seen, norms, squares: 12 bytes per leaf, or per matrix.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.normalize_gradient_norm()
      >>> u, _ = tx.update(jnp.array([300.0, 400.0]), tx.init(jnp.zeros(2)))
      >>> print(u.round(3))
      [0.6 0.8]

    References:
      Huang et al., Stable-SPAM, arXiv:2502.17055, 2025, Sec. 3 (AdaGN); code:
      TianjinYellow/StableSPAM at 6a66da1.
    """
    name = "normalize_gradient_norm"
    _checks.check_decay(name, b1=b1, b2=b2)
    _checks.check_nonnegative(name, eps=eps)
    _checks.check_callable(name, layout=layout)
    axes = _axes_of(layout)

    def init(params):
        seen, zeros = _init(name, params, axes)
        return NormalizeGradientNormState(seen, zeros, zeros.copy())

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _leafwise.check_tree(name, updates)
        cuts = _cuts(name, updates, params, axes, state.norms.size)
        leaves, treedef, present = _present(updates)
        if not present:
            return updates, state
        columns = [jnp.split(x, cuts) for x in state]
        named = [(path, _without_spikes(g)) for path, g in present.values()]
        given = {i: tuple(column[i] for column in columns) for i in present}
        # Python numbers stay what they are, for the bias correction's sake; arrays, which are
        # injected, have to be handed over.
        numbers = {"b1": b1, "b2": b2, "eps": eps}
        arrays = {k: x for k, x in numbers.items() if isinstance(x, jax.Array)}
        scaled, (new, _) = sums.scale_by_sums(
            name,
            named,
            [axes(*leaf) for leaf in named],
            partial(_factors, numbers),
            (given, arrays),
            shardings,
        )
        for i, u in zip(present, scaled, strict=True):
            leaves[i] = u
            for column, value in zip(columns, new[i], strict=True):
                column[i] = value
        state = NormalizeGradientNormState(*(jnp.concatenate(column) for column in columns))
        return jax.tree.unflatten(treedef, leaves), state

    return optax.GradientTransformationExtraArgs(init, update)


def _without_spikes(g: jax.Array) -> jax.Array:
    return jnp.where(finite_square(g.astype(_leafwise.widen(g.dtype))), g, 0)


def _factors(
    numbers: dict[str, Any], squares: list[jax.Array], state: Any
) -> tuple[list[jax.Array], Any]:
    """Return the factor of every leaf's norms, and their averages."""
    before, arrays = state
    b1, b2, eps = (numbers | arrays).values()
    factors, after = [], {}
    for (i, (seen, mean, mean_square)), square in zip(before.items(), squares, strict=True):
        total = square.astype(mean.dtype).ravel()
        norm, good = jnp.sqrt(total), jnp.isfinite(total) & (total > 0)
        seen = jnp.where(good, _leafwise.increment(seen), seen)
        mean = jnp.where(good, _lerp(b1, mean, norm), mean)
        mean_square = jnp.where(good, _lerp(b2, mean_square, total), mean_square)
        first, second = _corrected(b1, mean, seen), _corrected(b2, mean_square, seen)
        # Of zeros the factor says nothing; of a sum that overflowed nothing can be kept.
        factor = jnp.where(good, safe_divide(first, norm) / (jnp.sqrt(second) + eps), 0)
        factors.append(factor.reshape(square.shape))
        after[i] = seen, mean, mean_square
    return factors, (after, arrays)
