"""What a plan is asked with, checked, and `plan` itself."""

from typing import Any

from jax.typing import DTypeLike

from optlab import _checks
from optlab import layout as _layout
from optlab.distributed import cost
from optlab.distributed import plan as _plan
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


def matrix_options(
    name: str,
    polar: _polar.PolarFn | str,
    layout: _layout.Policy,
    comm_dtype: DTypeLike | None = None,
    chunk_bytes: int | None = None,
    scheme: str = "auto",
) -> _plan.Options:
    """Check what a plan depends on, and return it."""
    _checks.check_callable(name, layout=layout)
    _checks.check_dtype(name, comm_dtype=comm_dtype)
    _checks.check_choice(name, "scheme", scheme, ("auto", *cost.SCHEMES))
    if chunk_bytes is not None:
        _checks.check_steps(name, 1, chunk_bytes=chunk_bytes)
    polar = resolve_polar(name, polar)
    return _plan.Options(polar, _matrices_of(layout), comm_dtype, chunk_bytes, scheme)


def _matrices_of(layout: _layout.Policy) -> _layout.Policy:
    """Return the policy without embeddings, heads and filters, which are no linear maps inside."""

    def policy(path: str, leaf: Any) -> _layout.MatrixView | None:
        view = _layout.view_of(path, leaf, layout)
        return view if view is not None and view.role == "matrix" else None

    return policy


@_checks.explain_calls
def plan(
    params: Any,
    shardings: Any = None,
    *,
    polar: _polar.PolarFn | str = "keller",
    layout: _layout.Policy = _layout.flax,
    comm_dtype: DTypeLike | None = None,
    chunk_bytes: int | None = None,
    scheme: str = "auto",
) -> _plan.Plan:
    """Say how `orthogonalize` would move and process the matrices of `params`.

    Nothing is computed. Per group of equal matrices: how many, what they are spread over, the
    scheme, and for one device the FLOPs of the products, the bytes that arrive, the collectives,
    and the share of the devices that have work.

    | scheme | each device | collectives of a group |
    |---|---|---|
    | local | all matrices it holds whole | none |
    | split | its share of replicated ones | 1 all-gather |
    | all_to_all | ceil(L/P) whole ones | 2 all-to-all, and 1 all-gather if replicas share |
    | gram | 1/P of the long side of all | a phase: all-reduce, or reduce-scatter and all-gather |
    | hybrid | part of the long side of some | those of both |

    The cheapest is chosen by FLOPs / 1500 + bytes + 100,000 per collective. Of L matrices on P
    devices, full rounds go by all_to_all and the rest as suits it best.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct`s, of the gradients' dtypes.
      shardings: as in `orthogonalize`; None reads the types, which Explicit meshes have.
      polar: as in `orthogonalize`.
      layout: as in `orthogonalize`.
      comm_dtype: as in `orthogonalize`.
      chunk_bytes: as in `orthogonalize`.
      scheme: as in `orthogonalize`.

    Returns:
      A `Plan`: `collectives` and `nbytes` by kind and `flops` for one device; print it for a table.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> print(optlab.plan({"kernel": jnp.ones((64, 256))}))
      matrices  of         spread over  scheme    GFLOP  MiB  collectives  busy
             1  (64, 256)  -            local   0.01573    0  -            100%
      <BLANKLINE>
      on one device: 0.01573 GFLOP, 0 MiB received; collectives: none
    """
    options = matrix_options("plan", polar, layout, comm_dtype, chunk_bytes, scheme)
    return _plan.make("plan", _plan.named_leaves(params), shardings, options)
