"""Steps to the boundary of a unit ball, a norm for each role: Scion, LANTON."""

from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.linalg.polar import PolarFn
from optlab.recipes import routing
from optlab.transforms.decay import add_decay
from optlab.transforms.lmo import as_matrices, scale_by_lmo
from optlab.transforms.momentum import interpolate_momentum
from optlab.transforms.noise import NORMS, Groups, check_norms, noise_adaptive
from optlab.transforms.orthogonalize import orthogonalize
from optlab.transforms.shape_scale import ShapeMode, scale_by_shape

Balls = Mapping[str, tuple[str | optax.GradientTransformation, float]]
"""The norm and the radius of each role."""

SCION_BALLS: Balls = MappingProxyType(
    {
        "matrix": ("spectral", 50.0),
        "embedding": ("sign", 3000.0),
        "head": ("sign", 3000.0),
        "vector": ("rms", 1.0),
        "scalar": ("rms", 1.0),
    }
)
"""The radii of the authors' GPT, whose head is its embedding; biases as in their golden case."""


def _directions(
    name: str,
    norms: Balls,
    scale: ShapeMode,
    polar: PolarFn | str,
    layout: _layout.Policy,
    shardings: Any,
) -> optax.GradientTransformationExtraArgs:
    """Return what takes each role to the surface of its ball."""
    matrices = as_matrices(layout)

    def lmo(norm):
        if not isinstance(norm, str):
            return norm
        if norm != "spectral":
            return scale_by_lmo(norm, layout=layout)
        return optax.chain(
            orthogonalize(polar, layout=matrices, shardings=shardings),
            scale_by_shape(scale, layout=matrices),
        )

    steps = {r: optax.chain(lmo(norm), optax.scale(size)) for r, (norm, size) in norms.items()}
    return routing.by_role(name, steps, optax.identity(), layout)


def _or_fallback(
    name: str,
    steps: optax.GradientTransformation,
    roles: Container[str],
    fallback: optax.GradientTransformation,
    layout: _layout.Policy,
) -> optax.GradientTransformationExtraArgs:
    """Give the leaves of some roles to one method, which then sees all of them together."""
    label_of = lambda role: "lmo" if role in roles else routing.FALLBACK  # noqa: E731
    return routing.by_role(name, {"lmo": steps}, fallback, layout, label_of)


def _check_balls(name: str, norms: Any) -> None:
    if not isinstance(norms, Mapping):
        must, fix = "a mapping from roles to balls", ' Write {"matrix": ("spectral", 50.0)}.'
        raise _checks.refusal(TypeError, name, "norms", must, norms, fix)
    for role, ball in norms.items():
        if not (isinstance(ball, tuple) and len(ball) == 2):
            must, fix = f"(norm, radius) for role {role!r}", ' Write ("spectral", 50.0).'
            raise _checks.refusal(TypeError, name, "norms", must, ball, fix)
        norm, radius = ball
        _checks.check_positive(name, norms=radius)
        if isinstance(norm, str):
            check_norms(name, {role: norm})
        else:
            _checks.check_transform(name, "norms", norm)


@_checks.explain_calls
def scion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    norms: Balls = SCION_BALLS,
    constrained: bool = True,
    polar: PolarFn | str = "keller",
    fallback: optax.GradientTransformation | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Policy = _layout.flax,
    shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Step towards the furthest point of a norm ball, a norm for each role (Scion).

    m <- b1 m + (1 - b1) g from zero,   d = argmax <m, d> over |d| <= 1,
    p <- p - lr radius d,  and constrained  p <- (1 - lr) p - lr radius d.

    Constrained is Frank-Wolfe: p moves on the line from p to -radius d, stays in its ball, and the
    decay follows the schedule of the rate; start inside. One rate serves every layer, and
    carries over between widths. Take lr in [2^-12, 2^-4].

    Args:
      learning_rate: step size, in [0, 1] if constrained, or a schedule.
      b1: rate of the average, in [0, 1); the authors' argument `momentum` is 1 - b1.
      norms: (norm, radius) of every role; roles left out go to the fallback. A norm is "spectral",
        from RMS to RMS, a name of `scale_by_lmo`, or a stateless transformation of your own.
        (static)
      constrained: decay by the rate. (static)
      polar: how the spectral norm's direction is computed, see `orthogonalize`. (static)
      fallback: a whole optimizer for the roles left out, such as depthwise filters; None: AdamW
        (b1 0.9, b2 0.95, eps 1e-10) without decay. (static)
      fallback_learning_rate: rate of that AdamW, or a schedule; None for `learning_rate`.
      mu_dtype: dtype of the average; None for the parameter's. (static)
      layout: which axes are inputs and outputs, and the role of each leaf. (static)
      shardings: of the parameters, for an Auto mesh. (static)

    Returns:
      An optimizer whose steps have the size lr radius in the norm of each leaf, plus the decay.

    State:
      mu: the parameter's shape; 4 bytes per float32 parameter.

    Raises:
      ValueError: a number outside its range, a norm that does not exist; a leaf that the layout
        cannot read, by name.
      TypeError: norms that are no mapping to pairs.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.scion(0.5, norms={"vector": ("rms", 2.0)})
      >>> p = jnp.array([1.0, 1.0])
      >>> u, state = tx.update(jnp.array([3.0, -3.0]), tx.init(p), p)
      >>> print(optax.apply_updates(p, u))
      [-0.5  1.5]

    Deviations:
      Weights are not initialized here; the authors' code draws them on the sphere of each ball.
      A convolution is read as a matrix of k k m inputs like everywhere in optlab: its d is k times
      that of their SpectralConv, which divides by k^2 but not under the root. Give radius/k. The
      polar factor is taken in float32, not bfloat16. The default norms are those of their GPT; a
      first layer of images takes "spectral" with max(1, .), `scale_by_shape("keller")`.

    References:
      Pethick et al., Training deep learning models with norm-constrained LMOs, arXiv:2502.07529,
      2025, Alg. 1 and 2, Table 2; code: LIONS-EPFL/scion at f58a393.
    """
    name = "scion"
    _checks.check_nonnegative(name, learning_rate=learning_rate, schedule=True)
    _check_balls(name, norms)
    steps = optax.chain(
        interpolate_momentum(b1, b1, mu_dtype=mu_dtype),
        _directions(name, norms, "spectral", polar, layout, shardings),
        # lr times 1 p: Frank-Wolfe's own decay.
        *([add_decay(name, 1.0, None)] if constrained else []),
        optax.scale_by_learning_rate(learning_rate),
    )
    if fallback is None:
        rate = routing.rate_of_fallback(name, learning_rate, fallback_learning_rate, 1.0)
        fallback = routing.adamw(name, rate, 0.0, None, mu_dtype)
    return _or_fallback(name, steps, norms, fallback, layout)


@_checks.explain_calls
def lanton(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.9,
    alpha: ArrayLike = 1.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    norms: Mapping[str, str] = NORMS,
    groups: Groups = None,
    scale: ShapeMode = "spectral",
    dual_scale: ShapeMode | None = "spectral",
    polar: PolarFn | str = "keller",
    exact_noise: bool = False,
    fallback: optax.GradientTransformation | None = None,
    fallback_learning_rate: optax.ScalarOrSchedule | None = None,
    mu_dtype: DTypeLike | None = None,
    layout: _layout.Policy = _layout.flax,
    shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Norm-constrained steps that are smaller for layers with noisier gradients (LANTON).

    m <- b1 m + (1 - b1) g,   d = argmax <m, d> over |d| <= 1, the norm chosen by role,
    H <- b2 H + (1 - b2) |g_t - g_{t-1}|_*^2  with the dual norm, one number per matrix, from t = 2,
    a = alpha/sqrt(alpha^2 + H),   p <- p - lr (sqrt(a/max a over the group) d + weight_decay p).

    The quietest matrix of a group moves at the scheduled rate, the others below it.
    `noise_adaptive` is the part that adapts, for any other inner.

    Args:
      learning_rate: step size, >= 0, or a schedule.
      b1: rate of the momentum, in [0, 1).
      b2: rate of the noise, in [0, 1).
      alpha: what the noise is compared with, > 0; it has the size of a gradient's dual norm.
      weight_decay: decoupled decay at the full rate, >= 0, or a schedule.
      weight_decay_mask: leaves that decay. (static)
      norms: norm of every role, see `noise_adaptive`; roles left out go to the fallback. (static)
      groups: what is compared; None: leaves of one norm. (static)
      scale: factor of the spectral direction, see `scale_by_shape`; "moonlight" as in the paper's
        D-Muon. (static)
      dual_scale: factor of its dual norm; None for the nuclear norm itself. (static)
      polar: how the direction and the noise are computed, see `orthogonalize`. (static)
      exact_noise: take nuclear norms from eigenvalues. (static)
      fallback: a whole optimizer for the roles left out; None: AdamW (b1 0.9, b2 0.95, eps 1e-10)
        with the same decay. (static)
      fallback_learning_rate: rate of that AdamW, or a schedule; None for 0.015 times
        `learning_rate`, for all of it with scale="moonlight".
      mu_dtype: dtype of the momentum and of the gradient remembered; None for the parameter's.
        (static)
      layout: which axes are inputs and outputs, and the role of each leaf. (static)
      shardings: of the parameters, for an Auto mesh. (static)

    Returns:
      An optimizer whose steps have at most the size lr in the norm of each leaf, plus the decay.

    State:
      mu, previous: the parameter's shape; 8 bytes per float32 parameter. noise: one float32 per
      matrix.

    Raises:
      ValueError: a number outside its range, a norm that does not exist; a leaf that the layout
        cannot read, by name.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.lanton(0.5)
      >>> p = jnp.array([1.0, 1.0])
      >>> u, state = tx.update(jnp.array([3.0, -3.0]), tx.init(p), p)
      >>> print(optax.apply_updates(p, u).round(4))
      [0.5 1.5]

    Deviations:
      No code by the authors was found, and the formula of a, the factor sqrt(a/max a) and the
      defaults of b1, b2 and alpha are not confirmed by a primary source: summaries and reviews of
      the paper support the rest. An embedding or head takes sign(m)/m_in. The noise is that of
      successive gradients, the paper's practical option, not that of two batches.

    References:
      Hao et al., noise-adaptive layerwise learning rates for geometry-aware optimization (LANTON),
      arXiv:2510.14009, 2025, Alg. 1.
    """
    name = "lanton"
    _checks.check_nonnegative(
        name, learning_rate=learning_rate, weight_decay=weight_decay, schedule=True
    )
    check_norms(name, norms)
    balls = {role: (norm, 1.0) for role, norm in norms.items()}
    inner = optax.chain(
        interpolate_momentum(b1, b1, mu_dtype=mu_dtype),
        _directions(name, balls, scale, polar, layout, shardings),
    )
    adaptive = noise_adaptive(
        inner,
        alpha=alpha,
        b2=b2,
        norms=norms,
        groups=groups,
        dual_scale=dual_scale,
        polar=None if exact_noise else polar,
        layout=layout,
        shardings=shardings,
        mu_dtype=mu_dtype,
    )
    steps = optax.chain(
        adaptive,
        add_decay(name, weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    if fallback is None:
        ratio = 1.0 if scale == "moonlight" else 0.015
        rate = routing.rate_of_fallback(name, learning_rate, fallback_learning_rate, ratio)
        fallback = routing.adamw(name, rate, weight_decay, weight_decay_mask, mu_dtype)
    return _or_fallback(name, steps, norms, fallback, layout)
