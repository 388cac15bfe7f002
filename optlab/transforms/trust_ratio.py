"""Layerwise rates: one factor per leaf or matrix, from norms of weights and updates."""

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.linalg import norms


class TrustRatioState(NamedTuple):
    """State of `scale_by_trust_ratio` when its cap is a schedule."""

    count: jax.Array  # int32, (): updates seen


class ScaleByInitialSnrState(NamedTuple):
    """State of `scale_by_initial_snr`."""

    count: jax.Array  # int32, (): updates seen
    snr: jax.Array  # float32 or wider, (leaves,): measured on the first gradient

    def metrics(self) -> dict[str, jax.Array]:
        """Return the smallest and the largest ratio of a leaf."""
        lowest = jnp.min(self.snr) if self.snr.size else jnp.zeros([], self.snr.dtype)
        return {"gsnr_min": lowest, "gsnr_max": jnp.max(self.snr, initial=0)}


def _clip_bounds(name: str, phi: tuple[float, float] | None) -> None:
    real = isinstance(phi, tuple) and all(isinstance(x, numbers.Real) for x in phi)
    good = phi is None or (real and len(phi) == 2 and 0 <= phi[0] <= phi[1])
    if not good:
        must = "None or (low, high) with 0 <= low <= high"
        raise _checks.refusal(ValueError, name, "phi", must, phi)


def _kept(d: jax.Array, norm: str) -> jax.Array:
    """Return d, kept from its norm to the step where that costs less than computing it again.

    TPU: d stays on chip; the compiler counts 32 bytes per parameter instead of 40 for LARS and 44
    instead of 72 for LAMB (one (4096, 4096) leaf, v5e). GPU: the norms of u and p share a kernel
    only if it writes d, 511 kernels instead of 681 for LARS on 170 leaves; those of d and p share
    one anyway, 501 kernels for LAMB, and 659 with d kept.
    """
    keep, forget = jax.lax.optimization_barrier, lambda x: x
    on_gpu = keep if norm == "sum_of" else forget
    return jax.lax.platform_dependent(d, tpu=keep, cuda=on_gpu, default=forget)


@_checks.explain_calls
def scale_by_trust_ratio(
    trust_coefficient: ArrayLike = 1.0,
    *,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    norm: str = "of_sum",
    eps: ArrayLike = 0.0,
    phi: tuple[float, float] | None = None,
    max_ratio: optax.ScalarOrSchedule | None = None,
    zero_norm_ratio: ArrayLike | None = None,
    mask: _leafwise.Mask = None,
    layout: _layout.Policy | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scale each leaf so that its step is proportional to the norm of its weights.

    With d = u + weight_decay p,
      norm="of_sum":  r = trust_coefficient phi(|p|)/(|d| + eps), LAMB's and optax.lars's;
      norm="sum_of":  r = trust_coefficient phi(|p|)/(|u| + weight_decay |p| + eps), LARS's.
    Emits min(r, max_ratio) d. `optax.scale_by_trust_ratio` is "of_sum" with r = 1 at zero norms.

    Args:
      trust_coefficient: size of a step relative to the weights, > 0.
      weight_decay: added before the norms are taken, >= 0.
      weight_decay_mask: leaves that decay. (static)
      norm: which norm divides, see above. (static)
      eps: added to the divisor, >= 0.
      phi: (low, high) to clip |p|, as in LAMB's paper; None for |p| itself. (static)
      max_ratio: largest ratio, > 0, or a schedule of it; None for no bound.
      zero_norm_ratio: ratio where |p| or |u| is zero; None for `trust_coefficient`, so that a
        zero-initialized layer moves at the others' pace. Official codes use 1, which for LARS is a
        thousand times that.
      mask: leaves that are scaled; others get d. (static)
      layout: None takes one norm per leaf; a policy takes one per matrix, so that scan-stacked
        layers and experts get ratios of their own, and one per leaf where it sees no matrix.
        (static)

    Returns:
      A transformation with output norm trust_coefficient |p| for norm="of_sum". Needs params.

    State:
      None; a count if max_ratio is a schedule.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.scale_by_trust_ratio(0.1)
      >>> p = jnp.array([3.0, 4.0])
      >>> u, _ = tx.update(jnp.array([100.0, 0.0]), tx.init(p), p)
      >>> print(u)
      [0.5 0. ]
    """
    name = "scale_by_trust_ratio"
    _checks.check_positive(name, trust_coefficient=trust_coefficient)
    _checks.check_nonnegative(name, weight_decay=weight_decay, eps=eps)
    _checks.check_choice(name, "norm", norm, ("of_sum", "sum_of"))
    _clip_bounds(name, phi)
    if max_ratio is not None:
        _checks.check_positive(name, max_ratio=max_ratio, schedule=True)
    if zero_norm_ratio is not None:
        _checks.check_nonnegative(name, zero_norm_ratio=zero_norm_ratio)
    _checks.check_callable(name, layout=layout)
    at_zero = trust_coefficient if zero_norm_ratio is None else zero_norm_ratio
    of_sum = norm == "of_sum"

    def leaf_ratio(path, u, d, p, decay, cap):
        view = _layout.view_of(path, p, layout) if layout else None
        axes = (*view.rows, *view.cols) if view else None
        of_p, moving = (norms.frobenius(x, axes, keepdims=True) for x in (p, d if of_sum else u))
        divisor = moving if of_sum else moving + decay * of_p
        size = of_p if phi is None else jnp.clip(of_p, *phi)
        ratio = trust_coefficient * size / jnp.where(moving > 0, divisor + eps, 1)
        ratio = jnp.where((of_p > 0) & (moving > 0), ratio, at_zero)
        return ratio if cap is None else jnp.minimum(ratio, cap)

    def init(params):
        _leafwise.check_tree(name, params)
        count = jnp.zeros([], jnp.int32)
        return TrustRatioState(count) if callable(max_ratio) else optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _leafwise.require_params(name, params)
        scales = _leafwise.resolve_mask(name, mask, params)
        decays = _leafwise.resolve_mask(name, weight_decay_mask, params)
        cap = max_ratio
        if callable(max_ratio):
            cap = max_ratio(state.count)
            state = TrustRatioState(_leafwise.increment(state.count))

        def leaf(path, u, p, scales, decays):
            decay = weight_decay if decays else 0.0
            d = u + decay * p if decays else u
            if not scales:
                return (d,)
            d = _kept(d, norm)
            return (leaf_ratio(path, u, d, p, decay, cap) * d,)

        (updates,) = _leafwise.leafwise(name, leaf, updates, (), params, others=(scales, decays))
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)


@_checks.explain_calls
def scale_by_initial_snr(
    eps: ArrayLike = 1e-8, *, normalize: bool = True, ddof: int = 1, fallback: ArrayLike = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Scale each leaf by the signal-to-noise ratio of its first gradient, for the whole run.

    On the first update, per leaf: snr = |g|/(std(g) + eps); normalize divides by the largest of all
    leaves, so that the largest is 1. Then u = snr g for ever. About sqrt(size) where the mean
    gradient is near zero: learning rates do not carry over between the two settings of normalize.

    A leaf without spread (one element, a constant or zero gradient) or with a gradient that is not
    finite gets `fallback` before normalization; the authors' code divides by eps there, and the
    leaf explodes or freezes.

    Args:
      eps: added to the standard deviation, >= 0.
      normalize: divide by the largest ratio, as the paper's Algorithm 1. (static)
      ddof: degrees of freedom taken off the variance, 0 or 1. (static)
      fallback: ratio of a leaf without spread, >= 0.

    Returns:
      A transformation; output norm at most the input's with normalize.

    State:
      snr: one float32 per leaf; count: int32. Under `optax.MultiSteps` the first update is the
      accumulated gradient, as it should be.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.scale_by_initial_snr(normalize=False)
      >>> state = tx.init(jnp.zeros(2))
      >>> u, state = tx.update(jnp.array([3.0, 4.0]), state)
      >>> print(f"{state.snr[0]:.3f}")
      7.071
    """
    name = "scale_by_initial_snr"
    _checks.check_nonnegative(name, eps=eps, fallback=fallback)
    _checks.check_steps(name, 0, ddof=ddof)

    def measure(updates):
        size = _leafwise.scalars(name, lambda _, g, p: jnp.full([], g.size, g.dtype), updates)
        total = _leafwise.scalars(name, lambda _, g, p: jnp.sum(g), updates)
        mean = total / jnp.maximum(size, 1)
        squares = _leafwise.scalars(
            name,
            lambda _, g, p, mean: norms.sum_of_squares(g - mean),
            updates,
            (_leafwise.spread(updates, mean),),
        )
        # Vectors over the leaves, and |g|^2 from what is there already: 361 GPU kernels for 170
        # leaves on an H200, where leaf by leaf takes 737.
        std = jnp.sqrt(squares / jnp.maximum(size - ddof, 1))
        snr = jnp.sqrt(squares + size * mean**2) / (std + eps)
        snr = jnp.where((size > ddof) & (std > 0) & jnp.isfinite(snr), snr, fallback)
        snr = jnp.where(size > 0, snr, 0.0)
        return norms.safe_divide(snr, jnp.max(snr, initial=0.0)) if normalize else snr

    def init(params):
        _leafwise.check_tree(name, params)
        leaves = _leafwise.leaf_count(params)
        snr = jnp.zeros((leaves,), _leafwise.scalar_dtype(params))
        return ScaleByInitialSnrState(jnp.zeros([], jnp.int32), snr)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        _leafwise.check_count(name, updates, state.snr)
        first = lambda u: measure(u).astype(state.snr.dtype)  # noqa: E731
        # The dead measurement, which XLA drops, gives both branches one type inside shard_map.
        later = lambda u: jnp.where(False, first(u), state.snr)  # noqa: E731
        # A branch, not a select: the reductions run once in a training run.
        snr = jax.lax.cond(state.count == 0, first, later, updates)
        new = ScaleByInitialSnrState(_leafwise.increment(state.count), snr)
        return _leafwise.scale_leaves(name, updates, snr), new

    return optax.GradientTransformationExtraArgs(init, update)


@_checks.explain_calls
def scale_by_inverse_row_norm(
    eta: ArrayLike = 2.0,
    *,
    power: ArrayLike = 0.5,
    layout: _layout.Policy = _layout.flax,
) -> optax.GradientTransformationExtraArgs:
    """Scale each output row of a matrix by an inverse power of its weights' norm (ALLoRA).

    u_i <- u_i (|w_i| + eta^(-1/power))^(-power), for power = 1/2: u_i/sqrt(|w_i| + 1/eta^2). The
    norm is not squared under the root. A zero row is boosted by eta, a long one is held back; the
    factor follows the current weights.

    Before Adam, which divides by the size of its input, the factor nearly cancels: put it after.

    Args:
      eta: factor of a zero row, > 0.
      power: exponent, > 0.
      layout: which axis is the output's. (static)

    Returns:
      A stateless transformation; leaves without a view pass untouched. Needs params.

    State:
      None.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.scale_by_inverse_row_norm(eta=2.0)
      >>> p = {"lora_b": jnp.zeros((1, 3))}
      >>> u, _ = tx.update({"lora_b": jnp.ones((1, 3))}, tx.init(p), p)
      >>> print(u["lora_b"])
      [[2. 2. 2.]]
    """
    name = "scale_by_inverse_row_norm"
    _checks.check_positive(name, eta=eta, power=power)
    _checks.check_callable(name, layout=layout)

    def leaf(path, u, p):
        view = _layout.view_of(path, p, layout)
        if view is None:
            return u
        norm = norms.frobenius(p, view.within_channel, keepdims=True)
        return u / (norm + eta ** (-1 / power)) ** power

    return _leafwise.stateless(name, leaf, needs_params=True)
