"""Recipes that measure the loss's curvature: Sophia."""

import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab.transforms.curvature import scale_by_clipped_curvature
from optlab.transforms.decay import add_decay

# The paper's, section 3.1; what an estimate's noise asks for.
_GAMMAS = {"gnb": 0.05, "hutchinson": 0.01}


@_checks.explain_calls
def sophia(
    learning_rate: optax.ScalarOrSchedule,
    *,
    estimator: str = "gnb",
    b1: ArrayLike = 0.96,
    b2: ArrayLike = 0.99,
    gamma: ArrayLike | None = None,
    eps: ArrayLike | None = None,
    every: int = 10,
    weight_decay: optax.ScalarOrSchedule = 0.2,
    weight_decay_mask: _leafwise.Mask = None,
    official: bool = False,
    seed: int = 0,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Clipped Newton steps with a diagonal of curvature refreshed every few steps (Sophia).

    m <- b1 m + (1 - b1) g;  every k-th step h <- b2 h + (1 - b2) curvature;
    p <- p - lr (clip(m/max(gamma h, eps), -1, 1) + weight_decay p).

    Update needs the extra argument `curvature`, the function that `gauss_newton_diagonal` or
    `hutchinson_diagonal` returns for the current batch; see `scale_by_clipped_curvature`.
    `nnx.Optimizer.update(model, grads, curvature=...)` forwards it, as does
    `optlab.flax.TrainState.apply_gradients(grads=grads, curvature=...)`; Flax's TrainState does
    not. Entries move by at most lr: rates are those of Lion, below AdamW's.

    Args:
      learning_rate: step size, >= 0, or a schedule; the paper's GPT-2 has 6e-4 at 125M parameters.
      estimator: "gnb" or "hutchinson", what the loop passes; it sets gamma's default. (static)
      b1: rate of the average of gradients, in [0, 1).
      b2: rate of the average of curvature, in [0, 1), per refresh.
      gamma: factor of the curvature, > 0; None for 0.05 with "gnb", 0.01 with "hutchinson". Raise
        it if the win rate stays below 0.1, lower it above 0.5.
      eps: least divisor, > 0; None for 1e-12, with `official` 1e-15.
      every: steps between refreshes, >= 1. (static)
      weight_decay: decoupled decay, >= 0, or a schedule.
      weight_decay_mask: leaves that decay. (static)
      official: add eps to gamma h, and refresh first at step k, as the released code. (static)
      seed: of the keys for the estimates. (static)
      mu_dtype: dtype of m; None for the parameter's. (static)

    Returns:
      An optimizer whose updates have entries of at most lr, plus the decay.

    State:
      mu, nu: the parameter's shape, nu in float32 or wider; 8 bytes per float32 parameter.

    Raises:
      ValueError: a number outside its range; at update, a missing `curvature`.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.sophia(0.1, estimator="hutchinson", weight_decay=0.0)
      >>> p = jnp.array([1.0, -1.0])
      >>> curvature = optlab.hutchinson_diagonal(lambda p: jnp.sum(p**4))
      >>> u, state = tx.update(4 * p**3, tx.init(p), p, curvature=curvature)
      >>> print(p + u)
      [ 0.9 -0.9]

    Deviations:
      From `optax.contrib.sophia`: m is not corrected for its start; the curvature is refreshed
      before the step, not after it; eps is 1e-12, not 1e-8, and the decay 0.2, not 1e-4; probes
      are normal; Gauss-Newton-Bartlett exists; the batch is whatever the given function closes
      over. The released code keeps B out of h and has gamma B in the divisor; its training script
      clips the sampled gradient to norm 1, which is not done here. The paper's first version,
      clip(m/max(h, eps), -rho, rho), is gamma = rho at the rate rho lr.

    References:
      Liu et al., Sophia: a scalable stochastic second-order optimizer for language model
      pre-training, arXiv:2305.14342, 2023, Alg. 3; code: Liuhong99/Sophia at a7e1572.
    """
    _checks.check_choice("sophia", "estimator", estimator, tuple(_GAMMAS))
    _checks.check_nonnegative(
        "sophia", learning_rate=learning_rate, weight_decay=weight_decay, schedule=True
    )
    return optax.chain(
        scale_by_clipped_curvature(
            b1,
            b2,
            gamma=_GAMMAS[estimator] if gamma is None else gamma,
            eps=eps,
            every=every,
            official=official,
            seed=seed,
            mu_dtype=mu_dtype,
        ),
        add_decay("sophia", weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
