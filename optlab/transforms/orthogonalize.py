"""Replace every matrix by its polar factor, bucketed by shape."""

from typing import Any

import optax
from jax.typing import DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.linalg import polar as _polar


def resolve_polar(name: str, polar: _polar.PolarFn | str) -> _polar.PolarFn:
    """Return the function meant by a name or a function, or refuse it."""
    if callable(polar):
        return polar
    if not isinstance(polar, str):
        must = "a name or a function of (..., m, n) matrices"
        raise _checks.refusal(TypeError, name, "polar", must, polar)
    if polar not in _polar.by_name:
        must = f"one of {', '.join(map(repr, _polar.by_name))} or a function of matrices"
        fix = " Build your own with optlab.polar.NewtonSchulz(table)."
        raise _checks.refusal(ValueError, name, "polar", must, polar, fix)
    return _polar.by_name[polar]


@_checks.explain_calls
def orthogonalize(
    polar: _polar.PolarFn | str = "keller",
    *,
    layout: _layout.Policy = _layout.flax,
    shardings: Any = None,
    comm_dtype: DTypeLike | None = None,
    chunk_bytes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replace every matrix by its polar factor."""
    function = resolve_polar("orthogonalize", polar)
    _checks.check_callable("orthogonalize", layout=layout)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return _layout.on_matrix(function, layout)(updates), state

    return optax.GradientTransformationExtraArgs(_leafwise.init_checked("orthogonalize"), update)
