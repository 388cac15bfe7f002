"""Adam in a subspace of the gradient: GaLore, Q-GaLore, LDAdam."""

from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.linalg import codecs
from optlab.linalg.codecs import Codec
from optlab.recipes.low_rank.assembly import LateAdam, PlainAdam
from optlab.transforms.ldadam import scale_by_ldadam
from optlab.transforms.low_rank import in_low_rank
from optlab.transforms.projection import Rank
from optlab.transforms.quantize import quantize_state
from optlab.transforms.refresh import Refresh, lazy_refresh
from optlab.transforms.subspace import (
    Projector,
    power_projector,
    quantized,
)

_EIGHT_BITS = codecs.int8()


@_checks.explain_calls
def galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    every: int | Refresh = 200,
    scale: ArrayLike = 0.25,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
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
    """Adam in the dominant subspace of the gradient, refreshed now and then (GaLore).

    Every `every` steps B (a, r) is the basis of G's largest singular directions, on the short side;
    R = B^T G,  N = mu/(sqrt(nu) + eps) of R;   p <- p - lr sqrt(1 - b2^t)/(1 - b1^t) scale B N.
    The moments stay as they are when B changes. For hidden matrices; all else gets Adam.

    Args:
      learning_rate: step size, >= 0, or a schedule; 0.01 with scale 0.25 in the paper's
        pre-training.
      rank: a number, a fraction of the projected side, or as in `optlab.in_low_rank`. A quarter is
        the paper's 1024 of 4096 for 7B parameters. (static)
      every: steps between two subspaces, >= 1, or a rule. (static)
      scale: factor of the part that comes back from the subspace, >= 0; the released class has 1.
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root of the uncorrected second moment, >= 0.
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
      An optimizer; entries of a step in the basis are about lr scale in size.

    State:
      basis: a r numbers per matrix (m, n), a = min(m, n); mu, nu: r b each, b = max(m, n), nu in
      float32 or wider; Adam's two moments of the other leaves.

    Raises:
      ValueError: a rate or a rank outside its range; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.galore(0.1, rank=1)
      >>> p = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> u, state = tx.update(p, tx.init(p), p)
      >>> print(state.inner_states["matrix"].inner_state[0].inner.mu["kernel"].shape)
      (1, 8)

    Deviations:
      The subspace comes from power iteration; `projector=optlab.svd_projector()` is the released
      code's, up to signs: here a vector's largest entry is positive, and the released code keeps
      what its SVD returns. A refresh at a zero gradient keeps the old subspace.
      `optax.contrib.galore` projects the long side: `in_low_rank(..., side="long")`.

    References:
      Zhao et al., GaLore: memory-efficient LLM training by gradient low-rank projection,
      arXiv:2403.03507, 2024, Alg. 1 and 2; code: jiaweizzhao/GaLore at 2cc66f8.
    """
    adam = LateAdam(
        "galore", learning_rate, b1, b2, eps, weight_decay, weight_decay_mask, mu_dtype, layout,
        fallback, fallback_learning_rate,
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
    return adam.route(low)


@_checks.explain_calls
def q_galore(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    every: int | Refresh = 200,
    scale: ArrayLike = 0.25,
    bits: int = 4,
    block: int = 256,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    inner: optax.GradientTransformation | None = None,
    projector: Projector | None = None,
    state_codec: Codec | None = _EIGHT_BITS,
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
    """GaLore with its basis in 4 bits, renewed the more seldom, the less it changes (Q-GaLore).

    As `galore`, with B rounded to 4 bits in blocks of 256 numbers, an interval per matrix that
    doubles while the last five subspaces overlap by 0.4 or more with the ones before, and moments
    in 8 bits.

    Args:
      learning_rate: step size, >= 0, or a schedule; 0.015 with scale 0.25 in the paper's
        pre-training.
      rank: a number, a fraction of the projected side, or as in `optlab.in_low_rank`. A quarter is
        the paper's 1024 of 4096 for 7B parameters. (static)
      every: steps between two subspaces at first, >= 1, or a rule; a number is for
        `lazy_refresh(every)`. (static)
      scale: factor of the part that comes back from the subspace, >= 0.
      bits: of a number of the basis, 4 or 8. (static)
      block: numbers that share a scale, even. (static)
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root of the corrected second moment, >= 0.
      inner: None for Adam; any transformation to run on the coordinates. (static)
      projector: of which basis to keep; None for `power_projector()`. (static)
      state_codec: how moments of at least 4096 numbers are kept between steps, those of `fallback`
        too; None for as they are. See `optlab.quantize_state`. (static)
      stagger: spread the refreshes over the steps between. (static)
      weight_decay: decoupled decay, >= 0, of all leaves.
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
      That of `optlab.quantize_state`. basis: a r/2 bytes per matrix (m, n), a = min(m, n), and 8
      per block; mu, nu: r b codes of a byte, b = max(m, n), and 4 bytes for each 128; Adam's two
      moments of the other leaves likewise.

    Raises:
      TypeError: `state_codec` is no codec.
      ValueError: a rate or a rank outside its range; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.q_galore(0.1, rank=1)
      >>> p = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> u, state = tx.update(p, tx.init(p), p)
      >>> print(state.inner.inner_states["matrix"].inner_state[0].kept[0].basis.codes.dtype)
      uint8

    Deviations:
      Overlap is that of the subspaces, not the cosine of their first vectors, whose signs are
      arbitrary; `lazy_refresh(official=True)` is that. Weights stay as they are: the paper keeps
      them in 8 bits. The released code decays after the step, and its moments are those of
      bitsandbytes: the same codes in blocks of 256 of the flattened tensor.

    References:
      Zhang et al., Q-GaLore: quantized GaLore with INT4 projection and layer-adaptive low-rank
      gradients, arXiv:2407.08296, 2024; code: VITA-Group/Q-GaLore at 5bd2f1c.
    """
    if not (state_codec is None or isinstance(state_codec, Codec)):
        must, fix = "a codec or None", " Write optlab.codecs.int8()."
        raise _checks.refusal(TypeError, "q_galore", "state_codec", must, state_codec, fix)
    rule = every if isinstance(every, Refresh) else lazy_refresh(every)
    base = power_projector() if projector is None else projector
    adam = PlainAdam(
        "q_galore", learning_rate, b1, b2, eps, weight_decay, weight_decay_mask, mu_dtype, layout,
        fallback, fallback_learning_rate,
    )  # fmt: skip
    low = in_low_rank(
        inner or adam.moments(),
        quantized(base, bits, block=block),
        rank=rank,
        every=rule,
        stagger=stagger,
        scale=scale,
        seed=seed,
        layout=layout,
        shardings=shardings,
    )
    routed = adam.route(low)
    return routed if state_codec is None else quantize_state(routed, state_codec)


@_checks.explain_calls
def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: Rank = 0.25,
    rho: ArrayLike = 0.908,
    error_feedback: bool = True,
    b1: ArrayLike = 0.908,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    projector: Projector | None = None,
    side: Any = "short",
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    layout: _layout.Policy = _layout.flax,
    fallback: optax.GradientTransformation | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    shardings: Any = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adam in a subspace that turns at every step, with what is left out fed back (LDAdam).

    The step of `optlab.scale_by_ldadam`, whose docstring has the rule, and
    p <- p - lr (u + weight_decay p).

    Args:
      learning_rate: step size, >= 0, or a schedule.
      rank: a number, a fraction of the projected side, or as in `optlab.in_low_rank`. A quarter is
        the paper's 1024 of 4096 for 7B parameters. (static)
      rho: weight of the momentum in what the basis follows, in [0, 1].
      error_feedback: keep what the subspace leaves out and add it to the next gradient. (static)
      b1: rate of the first moment, in [0, 1).
      b2: rate of the second moment, in [0, 1).
      eps: added to the root of the corrected second moment, >= 0.
      projector: None for `power_projector(1, oversample=0)`, one iteration from the last basis; the
        released code begins with start="svd". (static)
      side: as in `optlab.in_low_rank`. (static)
      weight_decay: decoupled decay, >= 0, of all leaves.
      weight_decay_mask: leaves that decay. (static)
      layout: which axes are inputs and outputs, and which leaves are no matrices. (static)
      fallback: optimizer of the other leaves; None for the same Adam without a subspace.
      fallback_learning_rate: rate of that Adam, or a schedule; None for `learning_rate`.
      shardings: `optlab.shardings_of(params)`, needed on Auto meshes only. (static)
      seed: of what is random in the projector. (static)

    Returns:
      An optimizer; entries of a step in the basis are about lr in size.

    State:
      basis: a r numbers per matrix (m, n), a = min(m, n); mu, nu: r b, b = max(m, n); with
      error_feedback 4 bytes per float32 parameter; Adam's two moments of the other leaves.

    Raises:
      ValueError: a rate or a rank outside its range; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.ldadam(0.1, rank=1)
      >>> p = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> u, state = tx.update(p, tx.init(p), p)
      >>> print(state.inner_states["matrix"].inner_state[0].mu["kernel"].shape)
      (1, 8)

    Deviations:
      A square is projected on its inputs, in the released code on its outputs. The first basis is
      power iteration's, not SVD's: see `projector`.

    References:
      Robert et al., LDAdam: adaptive optimization from low-dimensional gradient statistics,
      arXiv:2410.16103, 2024, Alg. 1; code: IST-DASLab/LDAdam at f3c5daf.
    """
    adam = PlainAdam(
        "ldadam", learning_rate, b1, b2, eps, weight_decay, weight_decay_mask, None, layout,
        fallback, fallback_learning_rate,
    )  # fmt: skip
    low = scale_by_ldadam(
        b1,
        b2,
        eps,
        rank=rank,
        rho=rho,
        error_feedback=error_feedback,
        projector=projector,
        side=side,
        seed=seed,
        layout=layout,
        shardings=shardings,
    )
    return adam.route(low)
