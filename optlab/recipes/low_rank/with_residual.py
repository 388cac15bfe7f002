"""Adam in a subspace, and a rule for what is outside: Fira, FRUGAL."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.recipes.low_rank.assembly import LateAdam, PlainAdam
from optlab.transforms.clip import norm_growth_limiter
from optlab.transforms.low_rank import in_low_rank
from optlab.transforms.projection import Rank
from optlab.transforms.refresh import Refresh
from optlab.transforms.residual import column_scaled_residual, sign_residual
from optlab.transforms.subspace import (
    Projector,
    coordinate_projector,
)


@_checks.explain_calls
def fira(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    every: int | Refresh = 200,
    scale: ArrayLike = 0.25,
    growth: ArrayLike = 1.01,
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
    """GaLore that adds the rest of the gradient, scaled as Adam scaled what is inside (Fira).

    With B, R, N as in `galore`:  S = psi (G - B R),  psi_j = |N_j|/(|R_j| + 1e-8) for every slice j
    of the long side; |S| may grow by 1 % per step;   p <- p - lr sqrt(1 - b2^t)/(1 - b1^t) (scale B
    N + S).

    Args:
      learning_rate: step size, >= 0, or a schedule; 0.01 with scale 0.25 in the paper's
        pre-training.
      rank: a number, a fraction of the projected side, or as in `optlab.in_low_rank`. A quarter is
        the paper's 1024 of 4096 for 7B parameters. (static)
      every: steps between two subspaces, >= 1, or a rule. (static)
      scale: factor of the part that comes back from the subspace, >= 0.
      growth: largest growth of |S| in a step, > 0.
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root of the uncorrected second moment, >= 0.
      official: S from G - scale B R, as the released code, not G - B R. (static)
      inner: None for raw Adam; any transformation to run on the coordinates, such as one whose
        state is compressed. (static)
      projector: None for `power_projector()`, which costs a fraction of the exact `svd_projector()`
        of the released code. (static)
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
      An optimizer with steps of full rank.

    State:
      basis: a r numbers per matrix (m, n), a = min(m, n); mu, nu: r b each, b = max(m, n), nu in
      float32 or wider; Adam's two moments of the other leaves.
      norms: one float32 per matrix leaf.

    Raises:
      ValueError: a rate or a rank outside its range; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.fira(0.1, rank=1)
      >>> p = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> u, state = tx.update(p, tx.init(p), p)
      >>> print(state.inner_states["matrix"].inner_state[0].residual.norms.shape)
      (1,)

    Deviations:
      A zero gradient is not remembered as a norm: in the released code the residual is dead for
      some 1,800 steps after one. A slice without a gradient has no residual. For the subspace see
      `galore`.

    References:
      Chen et al., Fira: can we achieve full-rank training of LLMs under low-rank constraint?,
      arXiv:2410.01623, 2024, eq. 7-9; code: xichen-fy/Fira at 5c28b13.
    """
    adam = LateAdam(
        "fira", learning_rate, b1, b2, eps, weight_decay, weight_decay_mask, mu_dtype, layout,
        fallback, fallback_learning_rate,
    )  # fmt: skip
    limiter = norm_growth_limiter(growth, layout=layout, shardings=shardings)
    rest = column_scaled_residual(inside=scale if official else 1.0, then=limiter)
    low = in_low_rank(
        inner or adam.moments(),
        projector,
        rank=rank,
        every=every,
        stagger=stagger,
        scale=scale,
        residual=rest,
        seed=seed,
        layout=layout,
        shardings=shardings,
    )
    return adam.route(low)


@_checks.explain_calls
def frugal(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    every: int | Refresh = 200,
    factor: ArrayLike = 1.0,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    inner: optax.GradientTransformation | None = None,
    projector: Projector | None = None,
    side: Any = "rows",
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Policy = _layout.flax,
    fallback: optax.GradientTransformation | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    shardings: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adam on some columns, rows or directions, the sign of the gradient on all others (FRUGAL).

    Every `every` steps a new subspace, and Adam starts anew;   R = B^T G,
    p <- p - lr (B adam(R) + factor sign(G - B R) + weight_decay p).

    Args:
      learning_rate: step size, >= 0, or a schedule.
      rank: a fraction of the projected side, or as in `optlab.in_low_rank`. (static)
      every: steps between two subspaces, >= 1. (static)
      factor: size of the entries outside, >= 0; 1 for pre-training, 0.1 for fine-tuning in the
        paper.
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root of the corrected second moment, >= 0.
      inner: None for Adam; any transformation to run on the coordinates. (static)
      projector: None for `coordinate_projector()`, random columns; `power_projector()`,
        `svd_projector()` or `random_projector(orthonormal=True)` for the paper's others. (static)
      side: as in `optlab.in_low_rank`; "rows" are inputs, the columns of PyTorch's weights.
        (static)
      weight_decay: decoupled decay, >= 0, of all leaves.
      weight_decay_mask: leaves that decay. (static)
      mu_dtype: dtype of the first moment; None for the parameter's. (static)
      layout: which axes are inputs and outputs, and which leaves are no matrices. (static)
      fallback: optimizer of the other leaves; None for the same Adam without a subspace.
      fallback_learning_rate: rate of that Adam, or a schedule; None for `learning_rate`.
      shardings: `optlab.shardings_of(params)`, needed on Auto meshes only. (static)
      seed: of what is random in the projector. (static)

    Returns:
      An optimizer with entries of about lr in size, inside and outside.

    State:
      basis: r int32 per matrix, or a r numbers; mu, nu: r numbers per slice of the other side;
        Adam's two moments of the other leaves.

    Raises:
      ValueError: a rate or a rank outside its range; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.frugal(0.1, rank=2)
      >>> p = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> u, state = tx.update(p, tx.init(p), p)
      >>> print(u["kernel"].round(3)[0])
      [-0.1 -0.1 -0.1 -0.1 -0.1 -0.1 -0.1 -0.1]

    Deviations:
      A fraction is rounded, where the released code truncates that of columns. Entries that are
      roundings of the projection have no sign. Whole leaves as blocks are `optlab.select_blocks`.

    References:
      Zmushko et al., FRUGAL: memory-efficient optimization by reducing state overhead for scalable
      training, arXiv:2411.07837, 2024, Alg. 1; code: fzmushko/FRUGAL at c7ebe4c.
    """
    adam = PlainAdam(
        "frugal", learning_rate, b1, b2, eps, weight_decay, weight_decay_mask, mu_dtype, layout,
        fallback, fallback_learning_rate,
    )  # fmt: skip
    low = in_low_rank(
        inner or adam.moments(),
        coordinate_projector() if projector is None else projector,
        rank=rank,
        side=side,
        every=every,
        on_refresh="reset",
        residual=sign_residual(factor),
        seed=seed,
        layout=layout,
        shardings=shardings,
    )
    return adam.route(low)
