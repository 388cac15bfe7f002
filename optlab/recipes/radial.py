"""Recipes that care for the norm of the weights: AdamP, SGDP, NaP."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.transforms.adaptive import scale_by_moments
from optlab.transforms.momentum import HeavyBallState, heavy_ball
from optlab.transforms.radial import normalize_and_project, project_radial


@_checks.explain_calls
def adamp(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    delta: ArrayLike = 0.1,
    wd_ratio: ArrayLike = 0.1,
    nesterov: bool = False,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Policy = _layout.flax,
) -> optax.GradientTransformationExtraArgs:
    """Adam without the step's radial part on weights that look scale-invariant (AdamP).

    u = mu_hat/(sqrt(nu_hat) + eps), Adam's; where max |cos(g, p)| < delta/sqrt(width), by channel
    or else for the whole matrix, u <- u - n <n, u> with n = p/(|p| + eps), and q = wd_ratio;
    elsewhere q = 1;  p <- p - lr (u + weight_decay q p).

    For networks with normalization layers: momentum makes the norms of the weights before them grow
    and so shrinks their effective rate; this does not.

    Args:
      learning_rate: step size, >= 0, or a schedule.
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: guards the root and the norms, > 0.
      weight_decay: decoupled decay, >= 0.
      weight_decay_mask: leaves that decay. (static)
      delta: threshold of the test, >= 0.
      wd_ratio: share of the decay on projected weights, >= 0.
      nesterov: look one step ahead, as the official code does, not as NAdam. (static)
      mu_dtype: dtype of the first moment; None for the parameter's. (static)
      layout: which axes are channels. (static)

    Returns:
      An optimizer; updates are at most Adam's, plus the decay.

    State:
      mu, nu: the parameter's shape, nu in float32 or wider; 8 bytes per float32 parameter.

    Raises:
      ValueError: a rate outside its range; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.adamp(1.0)
      >>> p = {"kernel": jnp.eye(2)}
      >>> g = {"kernel": jnp.array([[0.0, 1.0], [1.0, 0.0]])}
      >>> u, state = tx.update(g, tx.init(p), p)
      >>> print(u["kernel"] + 0.0)
      [[ 0. -1.]
       [-1.  0.]]

    Deviations:
      Scan-stacked matrices are tested layer by layer. Leaves of rank >= 2 that the layout calls
      vectors (attention biases) are not projected; the official code goes by rank alone.

    References:
      Heo et al., AdamP: slowing down the slowdown for momentum optimizers on scale-invariant
      weights, arXiv:2006.08217, 2020, Alg. 2; code: clovaai/AdamP at 7f6f038.
    """
    _checks.check_nonnegative("adamp", learning_rate=learning_rate, schedule=True)
    adam = scale_by_moments(b1, b2, eps, nesterov=nesterov, mu_dtype=mu_dtype)
    return optax.chain(
        project_radial(
            adam,
            delta=delta,
            wd_ratio=wd_ratio,
            eps=eps,
            weight_decay=weight_decay,
            weight_decay_mask=weight_decay_mask,
            layout=layout,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


@_checks.explain_calls
def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: ArrayLike = 0.9,
    dampening: ArrayLike = 0.0,
    nesterov: bool = False,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    delta: ArrayLike = 0.1,
    wd_ratio: ArrayLike = 0.1,
    eps: ArrayLike = 1e-8,
    official: bool = False,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Policy = _layout.flax,
) -> optax.GradientTransformationExtraArgs:
    """Momentum SGD without the step's radial part on weights that look scale-invariant (SGDP).

    m <- momentum m + (1 - dampening) g,  u = m, or g + momentum m with nesterov;
    u and q as in `adamp`;  p <- p - lr (u + weight_decay q p/(1 - momentum)).

    Args:
      learning_rate: step size, >= 0, or a schedule.
      momentum: rate of the buffer, in [0, 1).
      dampening: share of the gradient kept out of the buffer, in [0, 1).
      nesterov: look one step ahead. (static)
      weight_decay: decoupled decay, >= 0.
      weight_decay_mask: leaves that decay. (static)
      delta: threshold of the test, >= 0.
      wd_ratio: share of the decay on projected weights, >= 0.
      eps: guards the norms, > 0.
      official: keep the projected direction as the buffer. The released code does so without
        nesterov, since it projects the buffer in place; with nesterov it changes nothing. (static)
      mu_dtype: dtype of the buffer; None for the parameter's. (static)
      layout: which axes are channels. (static)

    Returns:
      An optimizer; updates are at most momentum SGD's, plus the decay.

    State:
      trace: the parameter's shape; 4 bytes per float32 parameter.

    Raises:
      ValueError: a rate outside its range; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.sgdp(0.1)
      >>> p = {"kernel": jnp.eye(2)}
      >>> g = {"kernel": jnp.array([[0.0, 1.0], [1.0, 0.0]])}
      >>> u, state = tx.update(g, tx.init(p), p)
      >>> print(u["kernel"] + 0.0)
      [[ 0.  -0.1]
       [-0.1  0. ]]

    Deviations:
      As in `adamp`. The default momentum is 0.9, the official code's is 0; the default buffer is
      the paper's.

    References:
      Heo et al., AdamP: slowing down the slowdown for momentum optimizers on scale-invariant
      weights, arXiv:2006.08217, 2020, Alg. 1; code: clovaai/AdamP at 7f6f038.
    """
    _checks.check_nonnegative("sgdp", learning_rate=learning_rate, schedule=True)
    _checks.check_nonnegative("sgdp", weight_decay=weight_decay)
    _checks.check_decay("sgdp", momentum=momentum)
    ball = heavy_ball(momentum, dampening=dampening, nesterov=nesterov, mu_dtype=mu_dtype)
    keep = (lambda _, projected: HeavyBallState(projected)) if official and not nesterov else None
    return optax.chain(
        project_radial(
            ball,
            delta=delta,
            wd_ratio=wd_ratio,
            eps=eps,
            weight_decay=weight_decay / (1 - momentum),
            weight_decay_mask=weight_decay_mask,
            layout=layout,
            write_back=keep,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


@_checks.explain_calls
def nap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    every_k: int = 1,
    mask: _leafwise.Mask = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with every weight matrix put back to its initial norm after the step (NaP).

    p' = p - lr mu_hat/(sqrt(nu_hat) + eps);  every k-th step p <- |p_0| p'/|p'|, by whole leaves.

    Effective rates then follow the schedule alone, however long the run: made for
    continual and reinforcement learning. The architecture half of the paper - a normalization
    before every nonlinearity - is the model's. For another base optimizer wrap it in
    `normalize_and_project`.

    Args:
      learning_rate: step size, >= 0, or a schedule.
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root, >= 0.
      every_k: project at every k-th step, >= 1. (static)
      mask: leaves to hold; None for every leaf of rank >= 2. Leave the output layer out. (static)
      mu_dtype: dtype of the first moment; None for the parameter's. (static)

    Returns:
      An optimizer that keeps the norms of the held leaves; it must be the last link.

    State:
      mu, nu: the parameter's shape, nu in float32 or wider; 8 bytes per float32 parameter, and one
      float32 per leaf.

    Raises:
      ValueError: a rate outside its range.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.nap(0.1)
      >>> p = jnp.eye(2)
      >>> u, state = tx.update(jnp.ones((2, 2)), tx.init(p), p)
      >>> print(jnp.linalg.norm(optax.apply_updates(p, u)).round(4))
      1.4142

    Deviations:
      Neither the paper's text nor code by its authors was at hand: the rule was taken from its
      abstract and two ports. Norm scales and offsets are left free, as is the default for biases;
      whether the paper takes norms per layer or per unit is unconfirmed.

    References:
      Lyle et al., Normalization and effective learning rates in reinforcement learning,
      arXiv:2407.01800, 2024.
    """
    _checks.check_nonnegative("nap", learning_rate=learning_rate, schedule=True)
    adam = optax.chain(
        scale_by_moments(b1, b2, eps, mu_dtype=mu_dtype),
        optax.scale_by_learning_rate(learning_rate),
    )
    return normalize_and_project(adam, every_k=every_k, mask=mask)
