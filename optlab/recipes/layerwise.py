"""Layerwise rates: LARS, LAMB, SGD-SaI, ALLoRA."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.transforms.adaptive import scale_by_moments
from optlab.transforms.decay import add_decay
from optlab.transforms.momentum import ema_from_first, heavy_ball
from optlab.transforms.trust_ratio import (
    scale_by_initial_snr,
    scale_by_inverse_row_norm,
    scale_by_trust_ratio,
)


@_checks.explain_calls
def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: ArrayLike = 0.9,
    nesterov: bool = False,
    trust_coefficient: ArrayLike = 1e-3,
    eps: ArrayLike = 0.0,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    trust_ratio_mask: _leafwise.Mask = None,
    norm: str = "sum_of",
    zero_norm_ratio: ArrayLike | None = None,
    lr_in_momentum: bool = True,
    larc: bool = False,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Policy | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum SGD with a rate per layer, proportional to weight norm over gradient norm (LARS).

    r = trust_coefficient |p|/(|g| + weight_decay |p| + eps) per leaf,
    m <- momentum m + lr r (g + weight_decay p),   p <- p - m.
    For very large batches. Biases and norm scales are usually left out of both masks.

    Args:
      learning_rate: step size, >= 0, or a schedule.
      momentum: rate of the buffer, in [0, 1).
      nesterov: look one step ahead. (static)
      trust_coefficient: size of a step relative to the weights, > 0.
      eps: added to the divisor, >= 0.
      weight_decay: L2 term, >= 0.
      weight_decay_mask: leaves that decay. (static)
      trust_ratio_mask: leaves that are scaled by r. (static)
      norm: "sum_of" for |g| + weight_decay |p|, the paper's; "of_sum" for |g + weight_decay p|,
        `optax.lars`'s. (static)
      zero_norm_ratio: r where a norm is zero; None for trust_coefficient. Ports use 1, which
        starts a zero-initialized layer a thousand times too fast.
      lr_in_momentum: keep the rate inside the buffer, as the paper does; ports multiply outside,
        the same for a constant rate. (static)
      larc: step by min(r, lr) instead of r lr (LARC), always inside the buffer. (static)
      mu_dtype: dtype of the buffer; None for the parameter's. (static)
      layout: None for one norm per leaf; a policy for one per matrix of a stacked leaf. (static)

    Returns:
      An optimizer; without momentum an update has norm lr trust_coefficient |p|.

    State:
      trace: the parameter's shape; 4 bytes per float32 parameter.

    Raises:
      ValueError: a rate outside its range.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.lars(1.0, trust_coefficient=0.1)
      >>> p = jnp.array([3.0, 4.0])
      >>> u, state = tx.update(jnp.array([100.0, 0.0]), tx.init(p), p)
      >>> print(u + 0.0)
      [-0.5  0. ]

    Deviations:
      zero_norm_ratio, above. `optax.lars` is norm="of_sum", zero_norm_ratio=1.

    References:
      You et al., Large batch training of convolutional networks, arXiv:1708.03888, 2017, Alg. 1.
    """
    name = "lars"
    _checks.check_nonnegative(name, learning_rate=learning_rate, schedule=True)
    ratio = scale_by_trust_ratio(
        trust_coefficient,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        norm=norm,
        eps=eps,
        max_ratio=learning_rate if larc else None,
        zero_norm_ratio=zero_norm_ratio,
        mask=trust_ratio_mask,
        layout=layout,
    )
    trace = heavy_ball(momentum, nesterov=nesterov, mu_dtype=mu_dtype)
    rate = optax.scale(-1.0) if larc else optax.scale_by_learning_rate(learning_rate)
    return optax.chain(ratio, rate, trace) if lr_in_momentum else optax.chain(ratio, trace, rate)


@_checks.explain_calls
def lamb(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    trust_ratio_mask: _leafwise.Mask = None,
    phi: tuple[float, float] | None = None,
    max_ratio: optax.ScalarOrSchedule | None = None,
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Policy | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with steps of a fixed size relative to each layer's weights (LAMB).

    d = mu_hat/(sqrt(nu_hat) + eps) + weight_decay p,   p <- p - lr phi(|p|)/|d| d, norms per leaf;
    factor 1 where a norm is zero. For large batches: |step|/|p| = lr exactly while phi(z) = z.
    Under a zero gradient d is the decay alone, and the full relative step is still made.

    Args:
      learning_rate: step size relative to the weights, >= 0, or a schedule.
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      weight_decay: decay, part of d, >= 0; the paper uses 0.01.
      weight_decay_mask: leaves that decay. (static)
      trust_ratio_mask: leaves that are scaled; the authors leave out biases and norms, as from the
        decay. (static)
      phi: (low, high) to clip |p|; None for |p|, as the authors use it in practice. (static)
      max_ratio: largest factor, > 0, or a schedule; None for no bound, 1 is LAMBC.
      bias_correction: False for the authors' first code. (static)
      mu_dtype: dtype of the first moment; None for the parameter's. (static)
      layout: None for one norm per leaf; a policy for one per matrix of a stacked leaf. (static)

    Returns:
      An optimizer whose updates have norm lr |p|.

    State:
      mu, nu: the parameter's shape, nu in float32 or wider; 8 bytes per float32 parameter.

    Raises:
      ValueError: a rate outside its range.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.lamb(0.1)
      >>> p = jnp.array([3.0, 4.0])
      >>> u, state = tx.update(jnp.array([1.0, 0.0]), tx.init(p), p)
      >>> print(u.round(3) + 0.0)
      [-0.5  0. ]

    Deviations:
      None; the same numbers as `optax.lamb`, which has no phi, masks of the ratio or bound. Some
      ports clip the global gradient norm to 1 first: chain `optax.clip_by_global_norm(1.0)`.

    References:
      You et al., Large batch optimization for deep learning: training BERT in 76 minutes,
      arXiv:1904.00962, 2019, Alg. 2.
    """
    _checks.check_nonnegative("lamb", learning_rate=learning_rate, schedule=True)
    return optax.chain(
        scale_by_moments(b1, b2, eps, bias_correction=bias_correction, mu_dtype=mu_dtype),
        scale_by_trust_ratio(
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            phi=phi,
            max_ratio=max_ratio,
            mask=trust_ratio_mask,
            layout=layout,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


@_checks.explain_calls
def sgd_sai(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    official: bool = False,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum SGD with a rate per leaf that is set once, on the first gradient (SGD-SaI).

    snr = |g_1|/(std(g_1) + eps) per leaf, divided by the largest;  m_1 = g_1,
    m <- momentum m + (1 - momentum) g,   p <- p - lr (snr m + weight_decay p).
    Half of Adam's memory. The paper's Algorithm 1 divides by the largest ratio, the released code
    does not: its ratios are about sqrt(size of the leaf), and its rate of 1e-2 that many times
    larger.

    Args:
      learning_rate: step size, >= 0, or a schedule; it does not carry over between the two forms.
      momentum: rate of the average, in [0, 1).
      eps: added to the standard deviation, >= 0.
      weight_decay: decoupled decay, >= 0, or a schedule; not scaled by snr. The code's 1e-2 goes
        with its own rates; beside rates sqrt(size) times larger it shrinks all weights: 2.70 nats
        instead of 2.45 after 500 steps of the quick race.
      weight_decay_mask: leaves that decay. (static)
      official: do not divide by the largest ratio. (static)
      mu_dtype: dtype of the average; None for the parameter's. (static)

    Returns:
      An optimizer; updates are at most momentum SGD's unless official.

    State:
      mu: the parameter's shape, 4 bytes per float32 parameter; snr: one float32 per leaf.

    Raises:
      ValueError: a rate outside its range.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.sgd_sai(0.1)
      >>> p = jnp.zeros(2)
      >>> u, state = tx.update(jnp.array([3.0, 4.0]), tx.init(p), p)
      >>> print(u)
      [-0.3 -0.4]

    Deviations:
      One-element leaves, and leaves whose first gradient is constant, zero or not finite, get the
      ratio 1. The official code gives one-element leaves |g|/eps, which throws them out of range
      in one step, and freezes leaves with a zero first gradient.

    References:
      Xu et al., No more Adam: learning rate scaling at initialization is all you need,
      arXiv:2412.11768, 2024, Alg. 1; code: AnonymousAlethiometer/SGD_SaI at e213080.
    """
    _checks.check_nonnegative(
        "sgd_sai", learning_rate=learning_rate, weight_decay=weight_decay, schedule=True
    )
    _checks.check_decay("sgd_sai", momentum=momentum)
    return optax.chain(
        scale_by_initial_snr(eps, normalize=not official),
        ema_from_first(momentum, mu_dtype=mu_dtype),
        add_decay("sgd_sai", weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )


@_checks.explain_calls
def allora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    base: optax.GradientTransformation | None = None,
    eta: ArrayLike = 2.0,
    after_base: bool = True,
    layout: _layout.Policy = _layout.flax,
) -> optax.GradientTransformationExtraArgs:
    """Rates per output row for low-rank adapters, large for rows near zero (ALLoRA).

    Per output row i of each matrix: factor_i = 1/sqrt(|w_i| + 1/eta^2), the norm not squared;
    p <- p - lr factor base(g), or p <- p - lr base(factor g).
    It replaces LoRA's dropout and its alpha/r scaling: set both off. The matrix that starts at
    zero is boosted by eta.

    Args:
      learning_rate: step size, >= 0, or a schedule.
      base: the direction, e.g. `optax.scale_by_adam()`; None for the gradient.
      eta: factor of a zero row, > 0.
      after_base: scale what base emits; False scales the gradient, which Adam undoes almost wholly.
        (static)
      layout: which axis is the output's. (static)

    Returns:
      An optimizer; leaves that the layout gives no view get base's step.

    State:
      `base`'s; none for the gradient.

    Raises:
      ValueError: a rate outside its range; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.allora(0.1)
      >>> p = {"lora_b": jnp.zeros((1, 2))}
      >>> u, state = tx.update({"lora_b": jnp.ones((1, 2))}, tx.init(p), p)
      >>> print(u["lora_b"])
      [[-0.2 -0.2]]

    Deviations:
      The paper's text was not at hand: the rule was taken from ports that agree. Unconfirmed there:
      whether both adapter matrices are scaled (here both), which side "row" means (here the
      output's), eta's default, and that the factor follows the weights (some ports fix it at init).

    References:
      Huang and Balestriero, ALLoRA: adaptive learning rate mitigates LoRA fatal flaws,
      arXiv:2410.09692, 2024.
    """
    _checks.check_nonnegative("allora", learning_rate=learning_rate, schedule=True)
    base = optax.identity() if base is None else base
    _checks.check_transform("allora", "base", base)
    rows = scale_by_inverse_row_norm(eta, layout=layout)
    links = (base, rows) if after_base else (rows, base)
    return optax.chain(*links, optax.scale_by_learning_rate(learning_rate))
