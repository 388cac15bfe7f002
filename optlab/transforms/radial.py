"""The radial part of an update: its component along the weights, which changes their norm only."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.linalg import norms


class ProjectRadialState(NamedTuple):
    """State of `project_radial`."""

    inner: optax.OptState


class NormalizeAndProjectState(NamedTuple):
    """State of `normalize_and_project`."""

    count: jax.Array  # int32, (): steps seen
    rho: jax.Array  # float32 or wider, (leaves,): norm of each leaf at init, 0 for one left alone
    inner: optax.OptState


@_checks.explain_calls
def remove_radial(*, layout: _layout.Policy | None = None) -> optax.GradientTransformationExtraArgs:
    """Remove from every update its component along the parameter.

    u <- u - p <p, u>/<p, p>; a zero parameter leaves u as it is. <u, p> = 0 afterwards, so a step
    changes the norm of p only to second order. Use it on weights that a normalization follows;
    `project_radial` is AdamP's form, which decides by itself where that holds.

    Args:
      layout: None projects each leaf as one vector; a policy projects each output channel of its
        matrices by itself and leaves other leaves untouched. (static)

    Returns:
      A stateless transformation; the output norm is at most the input's. Needs params.

    State:
      None.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.remove_radial()
      >>> p = jnp.array([1.0, 0.0])
      >>> u, _ = tx.update(jnp.array([3.0, 4.0]), tx.init(p), p)
      >>> print(u)
      [0. 4.]
    """
    _checks.check_callable("remove_radial", layout=layout)

    def leaf(path, u, p):
        view = _layout.view_of(path, p, layout) if layout else None
        if layout and view is None:
            return u
        axes = view.within_channel if view else None
        inner, square = (jnp.sum(p * x, axis=axes, keepdims=True) for x in (u, p))
        return u - p * norms.safe_divide(inner, square)

    return _leafwise.stateless("remove_radial", leaf, needs_params=True)


def _radial_coefficient(g, p, u, view, delta, eps) -> tuple[jax.Array, jax.Array]:
    """Return c with u' = u - c p, and whether a view fired; AdamP's Algorithm 1 and eq. 11-12.

    The channel view is tried first, the whole matrix second, each on the raw gradient.
    """
    channel, whole = view.within_channel, (*view.rows, *view.cols)
    products = [jnp.sum(x * y, channel, keepdims=True) for x, y in ((g, p), (g, g), (p, p), (p, u))]
    coefficient, fired = jnp.zeros_like(products[0]), jnp.asarray(False)
    across = tuple(a for a in whole if a not in channel)
    for axes in (channel, whole):
        if axes == whole:
            products = [jnp.sum(x, across, keepdims=True) for x in products]
        gp, gg, pp, pu = products
        cosine = jnp.abs(gp) / jnp.maximum(jnp.sqrt(gg) * jnp.sqrt(pp), eps)
        width = math.prod(g.shape[a] for a in axes)
        worst = jnp.max(cosine, across, keepdims=True, initial=0.0)
        fires = (worst < delta / math.sqrt(max(width, 1))) & ~fired
        coefficient = jnp.where(fires, pu / (jnp.sqrt(pp) + eps) ** 2, coefficient)
        fired = fires | fired
    return coefficient, fired


@_checks.explain_calls
def project_radial(
    inner: optax.GradientTransformation,
    *,
    delta: ArrayLike = 0.1,
    wd_ratio: ArrayLike = 0.1,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: _leafwise.Mask = None,
    layout: _layout.Policy = _layout.flax,
    write_back: Callable[[Any, Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Remove the radial part of `inner`'s updates where the weights look scale-invariant (AdamP).

    A matrix is held for scale-invariant where its gradient is nearly orthogonal to it: for the
    channel view, then for the whole matrix,
      max |cos(g, p)| < delta/sqrt(width)  =>  u <- u - n <n, u>, n = p/(|p| + eps), q = wd_ratio;
    else u stays and q = 1. Emits u + weight_decay q p. The test reads the raw gradient, which no
    later link sees: hence a wrapper.

    Leaves that the layout gives no view (biases, norm scales) are never projected. Scan-stacked
    matrices are tested one by one. A zero gradient counts as orthogonal.

    Args:
      inner: gives the direction u from the gradient g, before any learning rate.
      delta: threshold, >= 0; 0 never projects.
      wd_ratio: share of the weight decay that projected weights get, >= 0.
      eps: guards the norms, > 0.
      weight_decay: decoupled decay, >= 0, added here since it depends on the test.
      weight_decay_mask: leaves that decay. (static)
      layout: which axes are channels. (static)
      write_back: `(inner_state, projected) -> inner_state`, for code that keeps the projected
        direction as its momentum. (static)

    Returns:
      A wrapper; output norm at most `inner`'s, plus the decay. Needs params.

    State:
      `inner`'s.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.project_radial(optlab.heavy_ball(0.9))
      >>> p = {"kernel": jnp.eye(2)}
      >>> g = {"kernel": jnp.array([[0.0, 1.0], [1.0, 0.0]])}
      >>> u, state = tx.update(g, tx.init(p), p)
      >>> print((u["kernel"] * p["kernel"]).sum())
      0.0
    """
    name = "project_radial"
    _checks.check_transform(name, "inner", inner)
    _checks.check_nonnegative(name, delta=delta, wd_ratio=wd_ratio, weight_decay=weight_decay)
    _checks.check_positive(name, eps=eps)
    _checks.check_callable(name, layout=layout, write_back=write_back)
    inner = optax.with_extra_args_support(inner)

    def project(path, u, p, g):
        view = _layout.view_of(path, p, layout)
        if view is None:
            return u, jnp.ones([], u.dtype)
        coefficient, fired = _radial_coefficient(g, p, u, view, delta, eps)
        return u - coefficient * p, jnp.where(fired, wd_ratio, 1.0)

    def init(params):
        _leafwise.check_tree(name, params)
        return ProjectRadialState(inner.init(params))

    def update(updates, state, params=None, **extra_args):
        _leafwise.require_params(name, params)
        decays = _leafwise.resolve_mask(name, weight_decay_mask, params)
        direction, inner_state = inner.update(updates, state.inner, params, **extra_args)

        def leaf(path, u, _, p, g, decays):
            u, ratio = project(path, u, p, g)
            return (u + weight_decay * ratio * p if decays else u), u

        new, projected = _leafwise.leafwise(
            name, leaf, direction, (direction,), params, others=(updates, decays)
        )
        if write_back is not None:
            inner_state = write_back(inner_state, projected)
        return new, ProjectRadialState(inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


@_checks.explain_calls
def normalize_and_project(
    inner: optax.GradientTransformation,
    *,
    every_k: int = 1,
    mask: _leafwise.Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Hold the norm of every weight at its initial value (the projection of NaP).

    Every k-th step, with rho = |p_0| of the whole leaf:  u <- rho (p + u)/|p + u| - p.
    Afterwards |p| = rho, and the schedule alone sets the effective learning rate.

    Args:
      inner: a whole optimizer, its learning rate included: u is added to p as it is.
      every_k: project at steps k, 2k, ...; >= 1. (static)
      mask: leaves to hold; None for every leaf of rank >= 2. Leave out the output layer, whose
        scale matters. (static)

    Returns:
      A wrapper; it must come last. Needs params. A leaf that was zero at init, or that a step takes
      to zero, is left alone.

    State:
      count: int32. rho: one float32 per leaf. inner: `inner`'s.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.normalize_and_project(optax.sgd(0.1))
      >>> p = jnp.eye(2)
      >>> u, _ = tx.update(jnp.ones((2, 2)), tx.init(p), p)
      >>> print(jnp.linalg.norm(p + u).round(4), jnp.linalg.norm(p).round(4))
      1.4142 1.4142
    """
    name = "normalize_and_project"
    _checks.check_transform(name, "inner", inner)
    _checks.check_steps(name, 1, every_k=every_k)
    inner = optax.with_extra_args_support(inner)

    def held(params):
        if mask is None:
            return jax.tree.map(lambda p: p.ndim >= 2, params)
        return _leafwise.resolve_mask(name, mask, params)

    def init(params):
        _leafwise.check_tree(name, params)
        keeps = iter(jax.tree.leaves(held(params)))

        def norm(path, p, _):
            del path
            keep = next(keeps) and not isinstance(p, jax.ShapeDtypeStruct)
            return norms.frobenius(p) if keep else jnp.zeros([], jnp.float32)

        rho = _leafwise.scalars(name, norm, params)
        return NormalizeAndProjectState(
            jnp.zeros([], jnp.int32),
            rho.astype(_leafwise.scalar_dtype(params)),
            inner.init(params),
        )

    def project(_, u, p, rho, held):
        if not held:
            return (u,)
        target = p + u
        factor = norms.safe_divide(rho, norms.frobenius(target))
        # A leaf left alone gets target - p, not u: to keep both costs another 100 % of temporary
        # memory on CPU.
        return (jnp.where(factor > 0, factor, 1) * target - p,)

    def update(updates, state, params=None, **extra_args):
        _leafwise.require_params(name, params)
        count = _leafwise.increment(state.count)
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        others = (_leafwise.spread(updates, state.rho), held(params))

        def projected():
            return _leafwise.leafwise(name, project, updates, (), params, others=others)[0]

        if every_k > 1:
            updates = jax.lax.cond(count % every_k == 0, projected, lambda: updates)
        else:
            updates = projected()
        return updates, NormalizeAndProjectState(count, state.rho, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
