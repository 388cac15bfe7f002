"""Train the length and the direction of every neuron's weights apart (weight normalization)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.linalg.norms import frobenius, safe_divide


class InWeightNormState(NamedTuple):
    """State of `in_weight_norm`."""

    direction: optax.OptState
    magnitude: optax.OptState  # for one number per neuron
    v: Any  # weights whose direction is trained, in the released form; else None


@_checks.explain_calls
def in_weight_norm(
    direction: optax.GradientTransformation,
    magnitude: optax.GradientTransformation,
    *,
    official: bool = False,
    layout: _layout.Policy = _layout.flax,
) -> optax.GradientTransformationExtraArgs:
    """Run one optimizer on the directions of the neurons' weights and one on their lengths.

    For the weights w of one neuron, l = |w|, e = w/l, and their gradient g:
    dl = <g, e>,  dw = g - dl e;   w <- (l + magnitude(dl)) v/|v|,  v = w + direction(dw).

    Both are whole optimizers, with their learning rates in them: what they emit is added.

    Args:
      direction: sees the part of the gradient that turns the weights, in the leaf's shape.
      magnitude: sees the part that lengthens them, with 1 in place of every input axis.
      official: as GradNormLoRP's released code: v is kept beside w with a length of its own, is
        moved by the whole gradient at w, and gives l at every step. (static)
      layout: which axes are inputs and which are neurons; leaves without a view get `direction`
        alone. (static)

    Returns:
      A wrapper for the end of a chain. Needs params. A neuron of zeros just gets v.

    State:
      That of `direction`, and of `magnitude` for one number per neuron; with `official` v, the
      parameter's shape.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.in_weight_norm(optax.sgd(0.0), optax.sgd(1.0))
      >>> p = {"kernel": jnp.array([[3.0], [4.0]])}
      >>> u, _ = tx.update({"kernel": jnp.array([[3.0], [4.0]])}, tx.init(p), p)
      >>> print(f"{u['kernel'][0, 0]:.3f} {u['kernel'][1, 0]:.3f}")
      -3.000 -4.000

    References:
      Huang et al., GradNormLoRP, arXiv:2412.19616, 2024; Salimans and Kingma, Weight normalization,
      arXiv:1602.07868, 2016, eq. 3.
    """
    name = "in_weight_norm"
    _checks.check_transform(name, "direction", direction)
    _checks.check_transform(name, "magnitude", magnitude)
    _checks.check_callable(name, layout=layout)
    direction, magnitude = map(optax.with_extra_args_support, (direction, magnitude))

    def init(params):
        _leafwise.check_tree(name, params)
        lengths = [_length(path, p, layout) for path, p in _named(params)]
        grown = magnitude.init(_unboxed(params, lengths))
        v = jax.tree.map(_copied, params) if official else None
        return InWeightNormState(direction.init(params), grown, v)

    def update(updates, state, params=None, **extra_args):
        _leafwise.require_params(name, params)
        _leafwise.check_tree(name, updates)
        weights = state.v if official else params
        _leafwise.aligned(name, updates, ("the parameters", weights))
        gs, ws = _leaves(updates), _named(weights)
        lengths = [_length(path, w, layout) for path, w in ws]
        split = [_split(g, w, n, official) for g, (_, w), n in zip(gs, ws, lengths, strict=True)]
        turning, along = zip(*split, strict=True) if split else ((), ())
        turn, first = direction.update(
            _reboxed(updates, turning), state.direction, weights, **extra_args
        )
        grow, second = magnitude.update(
            _unboxed(updates, along), state.magnitude, _unboxed(weights, lengths), **extra_args
        )
        columns = zip(ws, _leaves(turn), lengths, _leaves(grow), _leaves(params), strict=True)
        moved = [_moved(path, w, u, n, d, p, layout, official) for (path, w), u, n, d, p in columns]
        new, v = zip(*moved, strict=True) if moved else ((), ())
        kept = _reboxed(weights, v) if official else None
        return _reboxed(updates, new), InWeightNormState(first, second, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_leafwise.is_hole)


def _named(tree: Any) -> list[tuple[str, Any]]:
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_leafwise.is_hole)
    return [(_layout.path_str(path), leaf) for path, leaf in keyed]


def _reboxed(tree: Any, leaves: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=_leafwise.is_hole), leaves)


def _unboxed(tree: Any, leaves: Any) -> Any:
    """Return the tree with leaves of other shapes, out of Flax's boxes."""
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=_leafwise.is_hole_or_box), leaves)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(_leafwise.widen(x.dtype))


def _view(path: str, leaf: Any, layout: _layout.Policy) -> _layout.MatrixView | None:
    absent = _leafwise.is_hole(leaf) or not leaf.size
    view = None if absent else _layout.view_of(path, leaf, layout)
    return view if view is not None and view.role == "matrix" else None


def _length(path: str, w: Any, layout: _layout.Policy) -> Any:
    """Return the lengths of a leaf's neurons; a hole where it has none."""
    view = _view(path, w, layout)
    if view is None:
        return optax.MaskedNode()
    if isinstance(w, jax.ShapeDtypeStruct):
        shape = tuple(1 if axis in view.rows else n for axis, n in enumerate(w.shape))
        return jnp.zeros(shape, w.dtype)
    return frobenius(_wide(w), view.rows, keepdims=True).astype(w.dtype)


def _split(g: Any, w: Any, length: Any, official: bool) -> tuple[Any, Any]:
    """Return the part of a gradient that turns, and that which lengthens."""
    if _leafwise.is_hole(g) or _leafwise.is_hole(length):
        return g, (None if g is None else optax.MaskedNode())
    axes = tuple(a for a, n in enumerate(w.shape) if n != length.shape[a])
    unit = safe_divide(_wide(w), _wide(length))
    along = jnp.sum(_wide(g) * unit, axes, keepdims=True)
    turning = g if official else (_wide(g) - along * unit).astype(g.dtype)
    return turning, along.astype(g.dtype)


def _moved(path, w, turn, length, grow, p, layout, official) -> tuple[Any, Any]:
    """Return the update of a leaf, and its v."""
    view = _view(path, w, layout)
    if _leafwise.is_hole(turn) or view is None:
        return turn, w if _leafwise.is_hole(turn) else w + turn
    rows = view.rows
    wide, t, n, d = (_wide(x) for x in (w, turn, length, grow))
    v = wide + t
    size = frobenius(v, rows, keepdims=True)
    # (n + d)/|v| - 1, by |v|^2 - n^2 = <2 w + t, t>: the difference of two lengths rounds.
    longer = safe_divide(jnp.sum((2 * wide + t) * t, rows, keepdims=True), n + size)
    factor = safe_divide(d - longer, size)
    new = jnp.where(n == 0, t, factor * wide + (1 + factor) * t)
    if official:  # the weights are not v
        new = new + (wide - _wide(p))
    return new.astype(p.dtype), v.astype(p.dtype)


def _copied(p: Any) -> jax.Array:
    """Return a copy: no two leaves may share a buffer that is donated."""
    if isinstance(p, jax.ShapeDtypeStruct):
        return jnp.zeros(p.shape, p.dtype)
    return jnp.array(p, copy=True)
