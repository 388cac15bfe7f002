"""Adam made safe against spikes: SPAM, Stable-SPAM."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.transforms.adaptive import scale_by_moments
from optlab.transforms.decay import add_decay, decay_after_update
from optlab.transforms.reset import reset_moments
from optlab.transforms.spam import scale_by_spam
from optlab.transforms.spikes import clip_spikes, normalize_gradient_norm


@_checks.explain_calls
def spam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    threshold: ArrayLike = 5000.0,
    every: int = 500,
    warmup: int = 150,
    grace: int | None = None,
    restart_counts: bool = False,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    official: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam that clips spikes entry by entry, and forgets its moments every 500 steps (SPAM).

    Before update t with t mod every = 0:  mu = nu = 0.
    g <- sign(g) sqrt(threshold nu)  where g^2 > threshold nu > 0;  mu, nu as in Adam,
    p <- p - lr (s mu/c1 / (sqrt(nu/c2) + eps) + weight_decay p),   c_i = 1 - b_i^t,
    s = 1 - 0.99 (1 + cos(pi c/(warmup + 1)))/2 for c < warmup steps after a reset, else 1.
    t goes on counting at a reset, so that steps are about 2.7 times Adam's when the warm-up ends;
    restart_counts makes them Adam's.

    Args:
      learning_rate: step size, >= 0, or a schedule; with a warm-up of its own for the start.
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      threshold: ratio of a squared entry to its average that makes it a spike, > 0. (The released
        code has been at 2000 too.)
      every: steps from one reset to the next, >= 1. (static)
      warmup: steps after a reset that are damped, >= 0. (static)
      grace: updates after a reset without clipping, >= 0; None for 0, or 20 if official. (static)
      restart_counts: restart the bias correction with the moments. (static)
      weight_decay: decoupled decay, >= 0; the paper has none.
      weight_decay_mask: leaves that decay. (static)
      official: as the released code: a grace of 20 updates, eps added before the bias correction,
        and decay after the step, p <- (1 - lr weight_decay)(p + u). (static)
      mu_dtype: dtype of the first moment; None for the parameter's. (static)

    Returns:
      An optimizer; entries of about lr, and always finite but for the decay.

    State:
      mu, nu: the parameter's shape, nu in float32 or wider; 8 bytes per float32 parameter.
      An entry that is no number changes no state: it is clipped, a NaN to 0.

    Raises:
      ValueError: a rate outside its range.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.spam(0.1, threshold=1e3)
      >>> p = jnp.zeros(1)
      >>> state = tx.init(p)
      >>> for g in (1.0, jnp.inf):
      ...     u, state = tx.update(jnp.full(1, g), state, p)
      >>> print(f"{u[0]:.3f}")
      -0.100

    Deviations:
      nu = 0 clips nothing: in the released code an entry without a gradient so far is set to 0 for
      ever. Its sparse momentum (`density` below 1, moments on a random part of every matrix) is
      left out; in it, weight decay acts on a copy and does nothing.

    References:
      Huang et al., SPAM: spike-aware Adam with momentum reset for stable LLM training,
      arXiv:2501.06842, 2025, Alg. 1; code: TianjinYellow/StableSPAM at 6a66da1, SPAM.py.
    """
    _checks.check_nonnegative("spam", learning_rate=learning_rate, schedule=True)
    _checks.check_nonnegative("spam", weight_decay=weight_decay)
    grace = (20 if official else 0) if grace is None else grace
    moments = scale_by_spam(
        b1, b2, eps, threshold=threshold, grace=grace, official=official, mu_dtype=mu_dtype
    )
    moments = reset_moments(moments, every, warmup=warmup, restart_counts=restart_counts)
    rate = optax.scale_by_learning_rate(learning_rate)
    decay: Any = (weight_decay, weight_decay_mask)
    if official:
        return optax.chain(moments, rate, decay_after_update(learning_rate, *decay))
    return optax.chain(moments, add_decay("spam", *decay), rate)


@_checks.explain_calls
def stable_spam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    max_decay: ArrayLike = 0.999,
    norm_decay: ArrayLike = 0.7,
    square_decay: ArrayLike = 0.9,
    every: int = 1000,
    momentum_scale: optax.Schedule | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    official: bool = False,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Policy | None = None,
    shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam behind a clip at past maxima and a normalization by past norms, with resets.

    For each leaf, x, a, b averages from zero of max |g|, |g|, |g|^2, hats bias-corrected:
    AdaClip:  g <- g x^/max |g|  where |g| > x^;
    AdaGN:    g <- g/|g| a^/(sqrt(b^) + eps);
    MoRet:    every so many updates the moments and their bias correction start anew;
    p <- p - lr (Adam(g) + weight_decay p).
    For training in 4 bits and at large rates: gradients of any size and with any spikes will do.

    Args:
      learning_rate: step size, >= 0, or a schedule.
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the roots, >= 0.
      max_decay: rate of x, the paper's gamma_3 or theta, in [0, 1).
      norm_decay: rate of a, its gamma_1, in [0, 1).
      square_decay: rate of b, its gamma_2, in [0, 1).
      every: updates from one reset to the next, >= 1; the first comes before number `every`.
        (static)
      momentum_scale: a schedule that b1 and norm_decay are multiplied with, such as
        optax.cosine_decay_schedule(1.0, T + 1, alpha=0.5) over T steps, the code's `total_T`; None
        for 1. (static)
      weight_decay: decoupled decay, >= 0, or a schedule.
      weight_decay_mask: leaves that decay. (static)
      official: as the released code at a reset: that update still uses the old moments, with the
        bias correction of a first one; zero moments are then corrected as if one update old; and
        the corrections of x, a and b restart after it too though they go on, which turns AdaClip
        off for some 1/(1 - max_decay) steps. (static)
      mu_dtype: dtype of the first moment; None for the parameter's. (static)
      layout: None for one x, a and b per leaf; a policy for one per matrix of a stacked leaf.
        (static)
      shardings: `optlab.shardings_of(params)`, for fewer all-reduces on Auto meshes. (static)

    Returns:
      An optimizer; entries of about lr, and always finite but for the decay.

    State:
      mu, nu: the parameter's shape, nu in float32 or wider; 8 bytes per float32 parameter, and 20
      per leaf or matrix.
      An entry that is no number changes no state: see `clip_spikes`.

    Raises:
      ValueError: a rate outside its range.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.stable_spam(0.1)
      >>> p = jnp.zeros(2)
      >>> u, state = tx.update(jnp.array([1e6, -1e3]), tx.init(p), p)
      >>> print(f"{u[0]:.3f} {u[1]:.3f}")
      -0.100 0.100

    Deviations:
      A leaf of zeros is no step of x, a and b. The code's cosine rises again after its T + 1 steps;
      optax's schedule stays.

    References:
      Huang et al., Stable-SPAM: how to train in 4-bit more stably than 16-bit Adam,
      arXiv:2502.17055, 2025, Alg. 1; code: TianjinYellow/StableSPAM at 6a66da1, stablespam.py.
    """
    _checks.check_nonnegative("stable_spam", learning_rate=learning_rate, schedule=True)
    _checks.check_nonnegative("stable_spam", weight_decay=weight_decay, schedule=True)
    _checks.check_decay(
        "stable_spam",
        b1=b1,
        max_decay=max_decay,
        norm_decay=norm_decay,
        square_decay=square_decay,
    )
    _checks.check_callable("stable_spam", momentum_scale=momentum_scale)
    normalize = _scaled(
        lambda b1: normalize_gradient_norm(
            b1, square_decay, eps, layout=layout, shardings=shardings
        ),
        norm_decay,
        momentum_scale,
    )
    gradient = optax.chain(clip_spikes(max_decay, layout=layout), normalize)
    moments = _scaled(
        lambda b1: scale_by_moments(b1, b2, eps, mu_dtype=mu_dtype), b1, momentum_scale
    )
    if official:
        gradient = reset_moments(gradient, every, fields=("seen",), late=True)
    return optax.chain(
        gradient,
        reset_moments(moments, every, late=official),
        add_decay("stable_spam", weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scaled(
    make: Callable[[Any], optax.GradientTransformation], rate: ArrayLike, scale: Any
) -> optax.GradientTransformation:
    """Return `make(rate)`, the rate times a schedule if there is one."""
    if scale is None:
        return make(rate)
    # Without a dtype it would be the gradient's: 0.9 is 0.8984 in bfloat16.
    injected = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)
    return injected(b1=lambda step: rate * scale(step))
