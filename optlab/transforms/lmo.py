"""Linear minimization oracles: the largest step of a unit ball along a gradient, and dual norms.

The spectral ball needs whole matrices and is `orthogonalize` before `scale_by_shape("spectral")`;
the balls here need sums only.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.linalg import norms

_View = _layout.MatrixView | None


def _sides(view: _View, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the input and the output axes; a leaf without a view has one input, the constant 1."""
    return ((), tuple(range(ndim))) if view is None else (view.rows, view.cols)


def _mean_of_squares(g: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.mean(g * g, axes, keepdims=True)


def _inputs(g: jax.Array, view: _View) -> int:
    """Return what an entry's sign is divided by: the inputs, or the length of an embedding."""
    return math.prod(g.shape[axis] for axis in view.within_channel) if view else 1


def _over(g: jax.Array, size: jax.Array, eps: ArrayLike) -> jax.Array:
    return norms.safe_divide(g, size + eps)


def _per_input(g: jax.Array, view: _View, eps: ArrayLike) -> jax.Array:
    return _over(g, jnp.sqrt(_mean_of_squares(g, _sides(view, g.ndim)[1])), eps)


def _per_output(g: jax.Array, view: _View, eps: ArrayLike) -> jax.Array:
    rows, _ = _sides(view, g.ndim)
    inputs = math.prod(g.shape[axis] for axis in rows)
    return _over(g, inputs * jnp.sqrt(_mean_of_squares(g, rows)), eps)


def _rms(g: jax.Array, view: _View, eps: ArrayLike) -> jax.Array:
    rows, cols = _sides(view, g.ndim)
    return _over(g, jnp.sqrt(_mean_of_squares(g, (*rows, *cols))), eps)


_DIRECTIONS: dict[str, Callable[[jax.Array, _View, ArrayLike], jax.Array]] = {
    "sign": lambda g, view, eps: jnp.sign(g) / _inputs(g, view),
    "max": lambda g, view, eps: jnp.sign(g),
    "per_input": _per_input,
    "per_output": _per_output,
    "rms": _rms,
}
NORMS = tuple(_DIRECTIONS)


def dual_norm(norm: str, g: jax.Array, view: _View) -> jax.Array:
    """Return max <g, d> over the unit ball, which its LMO attains, per matrix: the batch axes."""
    rows, cols = _sides(view, g.ndim)
    return jnp.sum(g * _DIRECTIONS[norm](g, view, 0.0), (*rows, *cols))


def as_matrices(layout: _layout.Policy) -> _layout.Policy:
    """Return the policy with the role "matrix" for all it has a view of."""

    def policy(path: str, leaf: Any) -> _View:
        view = layout(path, leaf)
        return view if view is None else view._replace(role="matrix")

    return policy


@_checks.explain_calls
def scale_by_lmo(
    norm: str, *, eps: ArrayLike = 1e-8, layout: _layout.Policy = _layout.flax
) -> optax.GradientTransformationExtraArgs:
    """Replace every matrix by the point of a unit ball that is furthest along it.

    d = argmax <u, d> over |d| <= 1: uphill, of the same size whatever the size of u. With m inputs,
    n outputs and the weights w_i of input i, w_j of output j:

    | norm | unit ball | d | dual norm |
    |---|---|---|---|
    | "sign" | entries up to 1/m | sign(u)/m | sum of abs(u), over m |
    | "max" | entries up to 1 | sign(u) | sum of abs(u) |
    | "per_input" | rms(w_i) <= 1 | u_i/rms(u_i) | sum of sqrt(n) norm(u_i) |
    | "per_output" | norm(w_j) <= 1/sqrt(m) | u_j/(sqrt(m) norm(u_j)) | sum of norm(u_j)/sqrt(m) |
    | "rms" | rms(w) <= 1 | u/rms(u) | sqrt(m n) norm(u) |

    Scion's ColNorm is "per_input", its RowNorm "per_output"; for its other scaling of either,
    `scale_by_shape` with a function follows. In an embedding the vocabulary is the input side, as
    Scion's `transpose` has it; "sign" there divides by the length of a vector, as its authors' code
    and a table tied to the head do. A leaf without a view has one input, the constant 1: a bias.

    Args:
      norm: one of the names above. (static)
      eps: added to what divides, >= 0; the signs have none.
      layout: which axes are inputs and outputs; stacked matrices get balls of their own, stacked
        vectors, which have no view, share one. (static)

    Returns:
      A stateless transformation with an output of norm 1; zero stays zero.

    State:
      None.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.scale_by_lmo("per_input")
      >>> u, _ = tx.update({"kernel": jnp.array([[3.0, -3.0], [0.5, 0.5]])}, optax.EmptyState())
      >>> print(u["kernel"])
      [[ 1. -1.]
       [ 1.  1.]]
    """
    name = "scale_by_lmo"
    _checks.check_choice(name, "norm", norm, NORMS)
    _checks.check_nonnegative(name, eps=eps)
    _checks.check_callable(name, layout=layout)

    def leaf(path: str, u: jax.Array, p: Any) -> jax.Array:
        del p
        return _DIRECTIONS[norm](u, _layout.view_of(path, u, layout), eps)

    return _leafwise.stateless(name, leaf)
