"""Adam by a sketch, in a rotation, neuron by neuron: APOLLO, Conda, GradNormLoRP."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.recipes.low_rank.assembly import LateAdam
from optlab.transforms.clip import norm_growth_limiter
from optlab.transforms.low_rank import in_low_rank
from optlab.transforms.momentum import interpolate_momentum
from optlab.transforms.projection import Rank
from optlab.transforms.raw_gradient import scale_by_raw_gradient, with_raw_gradient
from optlab.transforms.refresh import Refresh
from optlab.transforms.residual import column_scaled_residual
from optlab.transforms.subspace import Projector, power_projector, random_projector
from optlab.transforms.weight_norm import in_weight_norm


@_checks.explain_calls
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    every: int | Refresh = 200,
    scale: ArrayLike = 1.0,
    per: str = "column",
    growth: ArrayLike = 1.01,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    inner: optax.GradientTransformation | None = None,
    projector: Projector | None = None,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Policy = _layout.flax,
    fallback: optax.GradientTransformation | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    shardings: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """The gradient, every channel scaled as Adam would scale a random sketch of it (APOLLO).

    With B (a, r) of N(0, 1/r) entries, new at every `every` steps:  R = B^T G,
    N = mu/(sqrt(nu) + eps) of R,   S = G |N_j|/(|R_j| + 1e-8) for every slice j of the long side;
    |S| may grow by 1 % per step;   p <- p - lr sqrt(1 - b2^t)/(1 - b1^t) sqrt(scale) S.
    APOLLO-Mini is `rank=1, scale=128, per="matrix"`.

    Args:
      learning_rate: step size, >= 0, or a schedule; 0.01 in the paper's pre-training.
      rank: a number, a fraction of the projected side, or as in `optlab.in_low_rank`. A quarter is
        the paper's 1024 of 4096 for 7B parameters. (static)
      every: steps between two subspaces, >= 1, or a rule. (static)
      scale: its square root multiplies the update, >= 0.
      per: "column" for one factor per slice of the long side, "matrix" for one. (static)
      growth: largest growth of |S| in a step, > 0.
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root of the uncorrected second moment, >= 0.
      inner: None for raw Adam; any transformation to run on the coordinates, such as one whose
        state is compressed. (static)
      projector: None for `random_projector()`; `power_projector()` for the paper's other form.
        (static)
      weight_decay: decay of all leaves after the step, p <- (1 - lr weight_decay) p, >= 0.
      weight_decay_mask: leaves that decay. (static)
      mu_dtype: dtype of the first moment; None for the parameter's. (static)
      layout: which axes are inputs and outputs, and which leaves are no matrices. (static)
      fallback: optimizer of the other leaves; None for the same Adam without a subspace.
      fallback_learning_rate: rate of that Adam, or a schedule; None for `learning_rate`.
      shardings: `optlab.shardings_of(params)`, needed on Auto meshes only. (static)
      seed: of what is random in the projector. (static)

    Returns:
      An optimizer with steps of full rank, in the gradient's direction within every slice.

    State:
      mu, nu: r b numbers per matrix (m, n), b = max(m, n); key, found, overlap, norm: 20 bytes;
        Adam's two moments of the other leaves.

    Raises:
      ValueError: a rate or a rank outside its range; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.apollo(0.1, rank=1)
      >>> p = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> u, state = tx.update(p, tx.init(p), p)
      >>> print(state.inner_states["matrix"].inner_state[0].inner.mu["kernel"].shape)
      (1, 8)

    Deviations:
      The random matrix is made anew from its key at every step, not kept. A zero gradient is not
      remembered as a norm: the released code never recovers from one. The order of scale and limit
      is that of scale_front=False.

    References:
      Zhu et al., APOLLO: SGD-like memory, AdamW-level performance, arXiv:2412.05270, 2024, Alg. 1;
      code: zhuhanqing/APOLLO at 76b3472.
    """
    adam = LateAdam(
        "apollo", learning_rate, b1, b2, eps, weight_decay, weight_decay_mask, mu_dtype, layout,
        fallback, fallback_learning_rate,
    )  # fmt: skip
    _checks.check_nonnegative("apollo", scale=scale)
    low = in_low_rank(
        inner or adam.moments(),
        random_projector() if projector is None else projector,
        rank=rank,
        every=every,
        scale=0.0,
        residual=column_scaled_residual(inside=0.0, per=per),
        seed=seed,
        layout=layout,
        shardings=shardings,
    )
    limiter = norm_growth_limiter(growth, layout=layout, shardings=shardings)
    return adam.route(low, limiter, optax.scale(scale**0.5))


@_checks.explain_calls
def conda(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = "full",
    every: int | Refresh = 2000,
    scale: ArrayLike = 0.25,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    projector: Projector | None = None,
    stagger: bool = False,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Policy = _layout.flax,
    fallback: optax.GradientTransformation | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    shardings: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adam in the basis of the momentum's singular vectors (Conda).

    mu <- b1 mu + (1 - b1) G in full;  every `every` steps B is the basis of mu's left singular
    vectors on its short side;   nu <- b2 nu + (1 - b2) (B^T G)^2, p <- p - lr sqrt(1 - b2^t)/(1 -
    b1^t) scale B (B^T mu/(sqrt(nu) + eps)). A preconditioner, no saving of memory: SOAP with one
    side, from the momentum.

    Args:
      learning_rate: step size, >= 0, or a schedule; 0.01 with scale 0.25 in the paper's
        pre-training.
      rank: "full": a rotation by all of the short side; less as in `optlab.in_low_rank`. (static)
      every: steps between two subspaces, >= 1, or a rule. (static)
      scale: factor of the step, >= 0; the released class has 1.
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root of the uncorrected second moment, >= 0.
      projector: None for `power_projector(oversample=0)`: QR only; `svd_projector()` is the
        released code's. (static)
      stagger: spread the refreshes over the steps between. (static)
      weight_decay: decay of all leaves after the step, p <- (1 - lr weight_decay) p, >= 0.
      weight_decay_mask: leaves that decay. (static)
      mu_dtype: dtype of the first moment; None for the parameter's. (static)
      layout: which axes are inputs and outputs, and which leaves are no matrices. (static)
      fallback: optimizer of the other leaves; None for the same Adam without a subspace.
      fallback_learning_rate: rate of that Adam, or a schedule; None for `learning_rate`.
      shardings: `optlab.shardings_of(params)`, needed on Auto meshes only. (static)
      seed: of what is random in the projector. (static)

    Returns:
      An optimizer; entries of a step in the basis are about lr scale in size.

    State:
      mu: the parameter's shape; nu: r b numbers; basis: a r: if full 12 bytes per float32 parameter
      of a square matrix, 8 + 4 a/b of another; Adam's two moments of the other leaves.

    Raises:
      ValueError: a rate or a rank outside its range; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.conda(0.1)
      >>> p = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> u, state = tx.update(p, tx.init(p), p)
      >>> print(state.inner_states["matrix"].inner_state[0].inner.kept[0].basis.shape)
      (1, 4, 4)

    Deviations:
      The basis comes from power iteration: within it directions of nearly equal singular values
      mix, which changes nothing of the subspace. A zero momentum leaves the basis to the next step.

    References:
      Conda: column-normalized Adam for training large language models faster, arXiv:2509.24218,
      2025; code: jie040109/Conda at 449af71.
    """
    adam = LateAdam(
        "conda", learning_rate, b1, b2, eps, weight_decay, weight_decay_mask, mu_dtype, layout,
        fallback, fallback_learning_rate,
    )  # fmt: skip
    low = in_low_rank(
        scale_by_raw_gradient(b2, eps=eps),
        power_projector(oversample=0) if projector is None else projector,
        rank=rank,
        every=every,
        stagger=stagger,
        scale=scale,
        project=("raw_gradient",),
        seed=seed,
        layout=layout,
        shardings=shardings,
    )
    momentum = interpolate_momentum(b1, b1, mu_dtype=mu_dtype)
    return adam.route(with_raw_gradient(momentum, low))


@_checks.explain_calls
def grad_norm_lorp(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    every: int | Refresh = 200,
    scale: ArrayLike = 0.25,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    official: bool = False,
    inner: optax.GradientTransformation | None = None,
    projector: Projector | None = None,
    stagger: bool = False,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Policy = _layout.flax,
    fallback: optax.GradientTransformation | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    shardings: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """GaLore on the directions of the neurons' weights, Adam on their lengths (GradNormLoRP).

    The step of `optlab.in_weight_norm`: the part of the gradient that turns a neuron's weights goes
    through `galore`, the part that lengthens them through plain Adam, each with the learning rate.

    Args:
      learning_rate: step size, >= 0, or a schedule.
      rank: a number, a fraction of the projected side, or as in `optlab.in_low_rank`. A quarter is
        the paper's 1024 of 4096 for 7B parameters. (static)
      every: steps between two subspaces, >= 1, or a rule. (static)
      scale: factor of the part that comes back from the subspace, >= 0; the released class has 1.
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root of the uncorrected second moment, >= 0.
      official: as the released class: see `optlab.in_weight_norm`. (static)
      inner: None for raw Adam; any transformation to run on the coordinates, such as one whose
        state is compressed. (static)
      projector: None for `power_projector()`, which costs a fraction of the exact `svd_projector()`
        of the released code. (static)
      stagger: spread the refreshes over the steps between. (static)
      weight_decay: decay of directions, lengths and other leaves, after the step, >= 0.
      weight_decay_mask: leaves that decay. (static)
      mu_dtype: dtype of the first moment; None for the parameter's. (static)
      layout: which axes are inputs and outputs, and which leaves are no matrices. (static)
      fallback: optimizer of the other leaves; None for the same Adam without a subspace.
      fallback_learning_rate: rate of that Adam, or a schedule; None for `learning_rate`.
      shardings: `optlab.shardings_of(params)`, needed on Auto meshes only. (static)
      seed: of what is random in the projector. (static)

    Returns:
      An optimizer; a neuron's length changes by about lr, its direction as by `galore`.

    State:
      basis: a r numbers per matrix (m, n), a = min(m, n); mu, nu: r b each, b = max(m, n), nu in
      float32 or wider; Adam's two moments of the other leaves.
      mu, nu of one number per neuron; with `official` v, the parameter's shape.

    Raises:
      ValueError: a rate or a rank outside its range; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.grad_norm_lorp(0.1, rank=1)
      >>> p = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> u, state = tx.update(p, tx.init(p), p)
      >>> print(state.inner_states["matrix"].inner_state.magnitude[0].mu["kernel"].shape)
      (1, 8)

    Deviations:
      The low-rank weights of the paper are a change of the model and not here, and its basis has
      two sides, as `optlab.in_low_rank(side="both")`. The released class keeps a copy of the
      weights, takes the whole gradient for the direction, and forgets the length it trained:
      `official`.

    References:
      Huang et al., GradNormLoRP: gradient weight-normalized low-rank projection for efficient LLM
      training, arXiv:2412.19616, 2024; code: Jhhuangkay's repository of that name at 66c8e76.
    """
    adam = LateAdam(
        "grad_norm_lorp", learning_rate, b1, b2, eps, weight_decay, weight_decay_mask, mu_dtype,
        layout, fallback, fallback_learning_rate,
    )  # fmt: skip
    low = in_low_rank(
        inner or adam.moments(),
        projector,
        rank=rank,
        every=every,
        stagger=stagger,
        scale=scale,
        seed=seed,
        layout=layout,
        shardings=shardings,
    )
    direction, magnitude = (adam.finish(x, rate=learning_rate) for x in (low, adam.moments()))
    return adam.beside(in_weight_norm(direction, magnitude, official=official, layout=layout))
