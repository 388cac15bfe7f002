"""Replace every matrix by its polar factor, bucketed by shape, on one device or on a mesh."""

from typing import Any

import jax
import optax
from jax.typing import DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed import apply, cost
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


@_checks.explain_calls
def orthogonalize(
    polar: _polar.PolarFn | str = "keller",
    *,
    layout: _layout.Policy = _layout.flax,
    shardings: Any = None,
    comm_dtype: DTypeLike | None = None,
    chunk_bytes: int | None = None,
    scheme: str = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Replace every matrix by its polar factor: all singular values near 1, directions kept.

    u <- polar(u), for every matrix that the layout finds in a leaf: scan-stacked layers, experts
    and split heads one by one. Embeddings, heads, depthwise filters and vectors stay as they are.

    Equal matrices are stacked and processed together, m x n beside the transposes of n x m, so
    compile time grows with the number of shapes. On a mesh whole matrices travel to their owners
    and back, two collectives for all matrices of a shape; `plan` shows and explains what is done.
    The numbers are those of one device, up to float32 rounding, for every sharding.

    Args:
      polar: a name of `optlab.polar.by_name` ("keller", "you", "polar_express", "turbo", "cans",
        "svd", "eigh"), what a function there returns (`optlab.polar.polar_express(8)`), or any
        function of stacks (..., m, n), matrix by matrix, with f(P X Q) = P f(X) Q for permutations
        and f(X^T) = f(X)^T. (static)
      layout: which axes are rows and columns. (static)
      shardings: `optlab.shardings_of(params)`, needed on Auto meshes; None reads the types, which
        Explicit meshes have. (static)
      comm_dtype: dtype in which parts of matrices travel, bfloat16 for half the bytes; None for
        the leaf's, or the iteration's if narrower. (static)
      chunk_bytes: most bytes of matrices processed at a time, on one device; None for a sixth of
        all. Less saves memory, more launches fewer kernels. (static)
      scheme: "auto", or the one to use where it can run: "local", "split", "all_to_all", "gram",
        "hybrid". (static)

    Returns:
      A stateless transformation; singular values in the band of `polar`.

    State:
      None.

    Raises:
      ValueError: a leaf that the layout cannot read, or that has no or uneven shardings, by name.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.orthogonalize("svd")
      >>> g = {"kernel": jnp.array([[3.0, 0.0], [0.0, 0.1]])}
      >>> u, _ = tx.update(g, tx.init(g))
      >>> print(u["kernel"].round(4))
      [[1. 0.]
       [0. 1.]]
    """
    name = "orthogonalize"
    options = matrix_options(name, polar, layout, comm_dtype, chunk_bytes, scheme)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        _leafwise.check_tree(name, updates)
        leaves = apply.map_matrices(name, _plan.named_leaves(updates), shardings, options)
        treedef = jax.tree.structure(updates, is_leaf=_leafwise.is_none)
        return jax.tree.unflatten(treedef, leaves), state

    return optax.GradientTransformationExtraArgs(_leafwise.init_checked(name), update)
