"""Factors from the shape of a matrix: what turns singular values of 1 into a step of known size."""

import math
from collections.abc import Callable
from typing import Any

import optax

from optlab import _checks, _leafwise
from optlab import layout as _layout

ShapeMode = str | Callable[[int, int], float]
"""A name of `modes`, or a function of the sizes of the input and of the output side."""

modes: dict[str, Callable[[int, int], float]] = {
    "keller": lambda m, n: math.sqrt(max(1, n / m)),
    "moonlight": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral": lambda m, n: math.sqrt(n / m),
}


def resolve_shape_mode(name: str, argument: str, mode: ShapeMode) -> Callable[[int, int], float]:
    """Return the function meant by a name or a function, or refuse it."""
    if callable(mode):
        return mode
    if not isinstance(mode, str):
        must = "a name or a function (inputs, outputs) -> factor"
        raise _checks.refusal(TypeError, name, argument, must, mode)
    _checks.check_choice(name, argument, mode, tuple(modes))
    return modes[mode]


@_checks.explain_calls
def scale_by_shape(
    mode: ShapeMode = "keller", *, layout: _layout.Policy = _layout.flax
) -> optax.GradientTransformationExtraArgs:
    """Multiply every matrix by a factor of its shape.

    For m inputs and n outputs, u <- c(m, n) u:
      "keller":     sqrt(max(1, n/m)), Muon's own; Scion's for a first layer;
      "moonlight":  0.2 sqrt(max(m, n)), a polar factor of RMS 0.2, which is about Adam's;
      "spectral":   sqrt(n/m), one unit of the norm from RMS to RMS; Scion's, Dion's.

    The factor is a constant of the compiled program. For a factor of other axes than those that are
    orthogonalized, give another layout: the authors of Muon and NorMuon merge the axes of a
    PyTorch convolution (out, in, height, width), but take the factor of the last two, which is

    >>> from optlab import MatrixView, layout
    >>> last_two = layout.rules({"": MatrixView(rows=(-1,), cols=(-2,))})

    Args:
      mode: a name, or a function (inputs, outputs) -> factor. (static)
      layout: which axes are inputs and outputs. (static)

    Returns:
      A stateless transformation. Leaves that are no matrix of role "matrix", and empty ones, pass
      untouched.

    State:
      None.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.scale_by_shape("spectral")
      >>> u, _ = tx.update({"kernel": jnp.ones((2, 8))}, optax.EmptyState())
      >>> print(u["kernel"][0, 0])
      2.0
    """
    name = "scale_by_shape"
    factor = resolve_shape_mode(name, "mode", mode)
    _checks.check_callable(name, layout=layout)

    def leaf(path: str, u: Any, p: Any) -> Any:
        del p
        view = _layout.view_of(path, u, layout)
        if view is None or view.role != "matrix" or not u.size:
            return u
        return u * factor(*view.dims(u.shape))

    return _leafwise.stateless(name, leaf)
