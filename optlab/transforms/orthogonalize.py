"""Replace every matrix by its polar factor, bucketed by shape, on one device or on a mesh."""

from typing import Any

import jax
import optax
from jax.typing import DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed import apply
from optlab.distributed import plan as _plan
from optlab.distributed.options import matrix_options
from optlab.linalg import polar as _polar


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
