"""Muon and NorMuon: momentum, orthogonalized matrix by matrix."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed.options import resolve_polar
from optlab.linalg import polar as _polar
from optlab.recipes import routing
from optlab.transforms.momentum import debiased_ema, heavy_ball, interpolate_momentum
from optlab.transforms.neurons import normalize_neurons
from optlab.transforms.orthogonalize import orthogonalize
from optlab.transforms.shape_scale import ShapeMode, resolve_shape_mode, scale_by_shape

# Rates of AdamW in the released code, 3e-4, and of the matrices, 0.02. Steps that are scaled to
# Adam's size share its rate.
_FALLBACK_RATIO = {"keller": 0.015, "spectral": 0.015, "moonlight": 1.0}
ACCUMULATIONS = ("ema", "sum", "debiased")


def _momentum(
    name: str, b1: ArrayLike, accumulation: str, nesterov: bool, mu_dtype: DTypeLike | None
) -> optax.GradientTransformationExtraArgs:
    """Return the momentum of that form, so that all of them look ahead alike."""
    _checks.check_choice(name, "accumulation", accumulation, ACCUMULATIONS)
    _checks.check_decay(name, b1=b1)
    if accumulation == "sum":
        return heavy_ball(b1, nesterov=nesterov, mu_dtype=mu_dtype)
    if accumulation == "debiased":
        return debiased_ema(b1, nesterov=nesterov, mu_dtype=mu_dtype)
    # (1 - b) g + b mu_t with mu_t = b mu_{t-1} + (1 - b) g is an interpolation with b^2.
    return interpolate_momentum(b1**2 if nesterov else b1, b1, mu_dtype=mu_dtype)


def _in_bfloat16(name: str, polar: _polar.PolarFn | str) -> _polar.PolarFn:
    function = resolve_polar(name, polar)
    named = isinstance(polar, str) and isinstance(function, _polar.NewtonSchulz)
    # The Gram form rounds elsewhere: half as much again off the official iteration.
    return dataclasses.replace(function, dtype=jnp.bfloat16, form="direct") if named else function


def _without_convolutions(layout: _layout.Policy) -> _layout.Policy:
    """Return the policy without a view for rank-4 convolutions, which then keep the factor 1."""

    def policy(path: str, leaf: Any) -> _layout.MatrixView | None:
        view = _layout.view_of(path, leaf, layout)
        return None if view is None or len(view.rows) == 3 else view

    return policy


@_checks.explain_calls
def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.95,
    nesterov: bool = True,
    accumulation: str = "ema",
    polar: _polar.PolarFn | str = "keller",
    scale: ShapeMode = "keller",
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    cautious: bool = False,
    official: bool = False,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Policy = _layout.flax,
    fallback: optax.GradientTransformation | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    shardings: Any = None,
    comm_dtype: DTypeLike | None = None,
    chunk_bytes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum with all singular values of a matrix's step set to about 1 (Muon).

    mu <- b1 mu + (1 - b1) g,  u = b1 mu + (1 - b1) g with nesterov, else mu;
    p <- p - lr (c(m, n) polar(u) + weight_decay p),  c = sqrt(max(1, n/m)) for m inputs, n outputs.

    For the hidden matrices: embeddings, heads, norms and biases go to `fallback`, as
    `optlab.describe(params, muon(...))` shows. On a mesh, whole matrices travel, two collectives
    for all of a shape; see `optlab.plan`.

    Args:
      learning_rate: step size, >= 0, or a schedule; 0.02 is the released code's.
      b1: rate of the momentum, in [0, 1).
      nesterov: look one step ahead. (static)
      accumulation: "ema"; "sum", mu <- b1 mu + g, as Moonlight and Dion (the same direction);
        "debiased", as `optax.contrib.muon`, which differs in the first 1/(1 - b1) steps. (static)
      polar: as in `optlab.orthogonalize`; `optlab.polar.keller(dtype=jnp.bfloat16)` halves the
        memory and the traffic. (static)
      scale: c(m, n), as in `optlab.scale_by_shape`: "keller"; "moonlight", 0.2 sqrt(max(m, n)),
        steps of Adam's size for Adam's rates; "spectral", sqrt(n/m), as Dion. (static)
      weight_decay: decoupled decay, >= 0, of all leaves.
      weight_decay_mask: leaves that decay. (static)
      cautious: decay only where it agrees with the step, as Dion. (static)
      official: as the released code: iterate in bfloat16, if `polar` is a name, and leave the
        factor of rank-4 convolutions at 1, which is theirs for square kernels. (static)
      mu_dtype: dtype of the momentum; None for the parameter's. (static)
      layout: which axes are inputs and outputs, and which leaves are no matrices. (static)
      fallback: optimizer of the other leaves; None for AdamW (b1 0.9, b2 0.95, eps 1e-10).
      fallback_learning_rate: rate of that AdamW, or a schedule; None for 0.015 times
        `learning_rate` (3e-4 beside 0.02), for all of it with scale="moonlight". AdamW's own best
        is worth a try: in 500 steps of `optlab race` 0.003 beside 0.01 came to 1.76 nats, the
        default to 1.88.
      shardings: `optlab.shardings_of(params)`, needed on Auto meshes only. (static)
      comm_dtype: as in `optlab.orthogonalize`. (static)
      chunk_bytes: as in `optlab.orthogonalize`. (static)

    Returns:
      An optimizer; a step of a matrix has spectral norm lr c(m, n), up to the band of `polar`.

    State:
      mu: the parameter's shape, 4 bytes per float32 parameter of a matrix; AdamW's 8 of the others.

    Raises:
      ValueError: a rate outside its range; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.muon(0.1, polar="svd")
      >>> p = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
      >>> g = {"kernel": jnp.array([[3.0, 0.0], [0.0, 0.1]]), "bias": jnp.zeros(2)}
      >>> u, state = tx.update(g, tx.init(p), p)
      >>> print((u["kernel"] @ u["kernel"].T).round(4))
      [[0.01 0.  ]
       [0.   0.01]]

    Deviations:
      The iteration runs in float32, and in the Gram form for aspects above 1.5, which is equal up
      to rounding. A convolution's factor is that of the merged matrix. For both see `official`.
      Moonlight's AdamW adds eps before the bias correction; this one after, as optax.

    References:
      Jordan et al., Muon, kellerjordan.github.io/posts/muon, 2024; code: KellerJordan/Muon at
      857d1ad. Liu et al., Muon is scalable for LLM training, arXiv:2502.16982, 2025.
    """
    name = "muon"
    _checks.check_nonnegative(name, learning_rate=learning_rate, schedule=True)
    resolve_shape_mode(name, "scale", scale)
    if official:
        polar = _in_bfloat16(name, polar)
    matrix = optax.chain(
        _momentum(name, b1, accumulation, nesterov, mu_dtype),
        orthogonalize(
            polar,
            layout=layout,
            shardings=shardings,
            comm_dtype=comm_dtype,
            chunk_bytes=chunk_bytes,
        ),
        scale_by_shape(scale, layout=_without_convolutions(layout) if official else layout),
        routing.decay(name, weight_decay, weight_decay_mask, cautious=cautious),
        optax.scale_by_learning_rate(learning_rate),
    )
    ratio = _FALLBACK_RATIO.get(scale, 0.015) if isinstance(scale, str) else 0.015
    rate = routing.rate_of_fallback(name, learning_rate, fallback_learning_rate, ratio)
    if fallback is None:
        fallback = routing.adamw(name, rate, weight_decay, weight_decay_mask, mu_dtype)
    return routing.by_role(name, {"matrix": matrix}, fallback, layout)


@_checks.explain_calls
def normuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-10,
    nesterov: bool = True,
    accumulation: str = "ema",
    polar: _polar.PolarFn | str = "keller",
    rms: ArrayLike = 0.2,
    scale: ShapeMode | None = None,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    cautious: bool = False,
    official: bool = False,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Policy = _layout.flax,
    fallback: optax.GradientTransformation | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    shardings: Any = None,
    comm_dtype: DTypeLike | None = None,
    chunk_bytes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon with every neuron's step divided by its running root mean square (NorMuon).

    O = polar(momentum) as in `muon`;  nu_i <- b2 nu_i + (1 - b2) mean_j O_ij^2 for every output i,
    O' = O/(sqrt(nu) + eps);  p <- p - lr (rms O'/RMS(O') + weight_decay p).

    Steps have the root mean square `rms` whatever the shape and the rank, so Adam's rates do.
    With `scale` it is the released code's form: O' is put back to |O| and multiplied by c(m, n).

    Args:
      learning_rate: step size, >= 0, or a schedule.
      b1: rate of the momentum, in [0, 1).
      b2: rate of the mean squares, in [0, 1).
      eps: guards the divisions, > 0.
      nesterov: look one step ahead. (static)
      accumulation: as in `muon`. (static)
      polar: as in `optlab.orthogonalize`. (static)
      rms: root mean square of a matrix's step before the rate, > 0; unused with `scale`.
      scale: None, or c(m, n) as in `optlab.scale_by_shape`. (static)
      weight_decay: decoupled decay, >= 0, of all leaves.
      weight_decay_mask: leaves that decay. (static)
      cautious: decay only where it agrees with the step. (static)
      official: as the released code: scale="keller" and, if `polar` is a name, iterate in
        bfloat16. (static)
      mu_dtype: dtype of the momentum; None for the parameter's. (static)
      layout: which axes are inputs and outputs, and which leaves are no matrices. (static)
      fallback: optimizer of the other leaves; None for AdamW (b1 0.9, b2 0.95, eps 1e-10).
      fallback_learning_rate: rate of that AdamW, or a schedule; None for `learning_rate`, with
        `scale` as in `muon`.
      shardings: `optlab.shardings_of(params)`, needed on Auto meshes only. (static)
      comm_dtype: as in `optlab.orthogonalize`. (static)
      chunk_bytes: as in `optlab.orthogonalize`. (static)

    Returns:
      An optimizer; a matrix's step has root mean square lr rms, or Muon's norm with `scale`.

    State:
      mu: the parameter's shape, 4 bytes per float32 parameter of a matrix; nu: 4 bytes per neuron;
      AdamW's 8 of the others.

    Raises:
      ValueError: a rate outside its range; a leaf that the layout cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.normuon(0.1, polar="svd")
      >>> p = {"kernel": jnp.eye(2), "bias": jnp.zeros(2)}
      >>> g = {"kernel": jnp.array([[3.0, 0.0], [0.0, 0.1]]), "bias": jnp.zeros(2)}
      >>> u, state = tx.update(g, tx.init(p), p)
      >>> print(jnp.sqrt(jnp.mean(u["kernel"] ** 2)).round(4))
      0.02

    Deviations:
      As in `muon`. Of a convolution the released code normalizes rows of the kernel's width; here
      a neuron is an output channel. Dion's port takes norms shard by shard; these are whole.

    References:
      Li et al., NorMuon: making Muon more efficient and scalable, arXiv:2510.05491, 2025, Alg. 1;
      code: zichongli5/NorMuon at d45c9a4.
    """
    name = "normuon"
    _checks.check_nonnegative(name, learning_rate=learning_rate, schedule=True)
    _checks.check_positive(name, rms=rms)
    if official:
        polar, scale = _in_bfloat16(name, polar), scale or "keller"
    links = [
        _momentum(name, b1, accumulation, nesterov, mu_dtype),
        orthogonalize(
            polar,
            layout=layout,
            shardings=shardings,
            comm_dtype=comm_dtype,
            chunk_bytes=chunk_bytes,
        ),
        normalize_neurons(
            b2, eps=eps, rms=None if scale else rms, layout=layout, shardings=shardings
        ),
        routing.decay(name, weight_decay, weight_decay_mask, cautious=cautious),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if scale is not None:
        resolve_shape_mode(name, "scale", scale)
        links.insert(3, scale_by_shape(scale, layout=layout))
    ratio = _FALLBACK_RATIO.get(scale, 0.015) if isinstance(scale, str) else 1.0
    rate = routing.rate_of_fallback(name, learning_rate, fallback_learning_rate, ratio)
    if fallback is None:
        fallback = routing.adamw(name, rate, weight_decay, weight_decay_mask, mu_dtype)
    return routing.by_role(name, {"matrix": optax.chain(*links)}, fallback, layout)
