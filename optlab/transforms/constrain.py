"""Updates held to a set: a given subspace, or the zeros of sparse weights."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed.shardings import partitioned
from optlab.linalg.sparsity import check_pattern, has_pattern
from optlab.linalg.subspace import product

Basis = Any | Callable[[str, Any], Any]
"""Orthonormal columns: an array, a tree or prefix of them with None, a function (path, leaf)."""
SparsityMask = Any | Callable[[Any], Any] | None
"""Bools that are True where entries are kept: a tree or prefix, a function of params, or None."""

_SUBSPACE, _SPARSITY = "project_onto_subspace", "keep_sparsity"


def _check_projector(path: str, columns: Any) -> None:
    """Refuse a basis U whose U U^T is no projector; zero columns are allowed, and traced ones."""
    if isinstance(columns, jax.core.Tracer) or not getattr(columns, "is_fully_addressable", True):
        return
    u = np.asarray(columns)
    gram = np.matmul(np.swapaxes(u, -1, -2), u, dtype=np.float32)
    # 1e-3 lets a basis pass that came from any decomposition in float32; bfloat16 rounds more.
    bound = max(1e-3, 2 * float(jnp.finfo(u.dtype).eps))
    error = np.max(np.abs(np.matmul(gram, gram) - gram), initial=0)
    if not error <= bound:
        raise ValueError(
            f"{_SUBSPACE}: the columns of the basis at '{path}' must be orthonormal, or zero, got "
            f"U^T U off by {error:.2g}. Pass jnp.linalg.qr(basis)[0]."
        )


def _check_bases(basis: Any) -> None:
    """Refuse what cannot be a basis, as far as that shows without a leaf."""
    for key_path, columns in jax.tree_util.tree_leaves_with_path(basis):
        path = _layout.path_str(key_path)
        dtype = getattr(columns, "dtype", int)
        if not jnp.issubdtype(dtype, jnp.floating) or columns.ndim < 2:
            raise TypeError(
                f"{_SUBSPACE}: the basis at '{path}' must be a floating array of shape (size, k), "
                f"got {getattr(columns, 'shape', type(columns).__name__)}. Give None to leave a "
                "leaf alone."
            )
        _check_projector(path, columns)


def _check_fit(path: str, leaf: Any, view: _layout.MatrixView, columns: Any, side: str) -> None:
    size = view.dims(leaf.shape)[side == "cols"]
    batch = tuple(leaf.shape[axis] for axis in view.batch(leaf.ndim))
    shape = columns.shape
    if len(shape) < 2 or shape[-2] != size or shape[:-2] not in ((), batch):
        own = f" or {(*batch, size, 'k')}" if batch else ""
        raise ValueError(
            f"{_SUBSPACE}: leaf '{path}' of shape {leaf.shape} has matrices with {size} {side}, "
            f"got a basis of shape {shape}. Give {(size, 'k')}{own}, None to leave the leaf alone, "
            "or the other side."
        )


def _spread(name: str, what: str, given: Any, tree: Any) -> Any:
    """Return a tree like `tree` from a prefix of it, in which None is a leaf."""
    try:
        return jax.tree.broadcast(given, tree, is_leaf=_leafwise.is_none)
    except ValueError:
        ours, theirs = (
            [_layout.path_str(k) for k, _ in jax.tree_util.tree_leaves_with_path(t)][:3]
            for t in (given, tree)
        )
        raise ValueError(
            f"{name}: {what} is no prefix of the parameter tree: it has the leaves {ours}, the "
            f"parameters {theirs}. Give an entry, or None, for every leaf or subtree."
        ) from None


@_checks.explain_calls
def project_onto_subspace(
    basis: Basis,
    *,
    away: bool = False,
    side: Literal["rows", "cols"] = "rows",
    layout: _layout.Policy = _layout.flax,
) -> optax.GradientTransformationExtraArgs:
    """Project updates onto a given subspace, or away from it.

    With orthonormal columns U, for every matrix u (m inputs by n outputs), side="rows":
      u <- U U^T u,     away: u <- u - U U^T u;
    side="cols" likewise from the right: u <- u U U^T. The projector is never formed: 4 k m n FLOPs.

    Away from what other tasks need: DOGE (`shared_basis`, "cols"), gradient projection memory
    ("rows"). Onto a fixed subspace: GaLore without its saving; `in_low_rank` has that.

    Only after the inner transformation, and after decay, does every step lie in the subspace:
    dividing by Adam's second moment leaves it again. Before, as in DOGE's code, the moments see
    nothing else; both together do no harm. For SGD and momentum both places are the same.

    Args:
      basis: U of shape (size of the side, k), shared by all matrices of a leaf, or (*batch, size,
        k) with one for each scan-stacked layer or expert; columns of zeros do nothing. A tree of
        these like the parameters, or a prefix of one, with None for leaves left alone; or a
        function (path, leaf) -> U or None. Large ones that are captured become constants of the
        compiled step: build the transformation inside the step, from bases that it is given.
        (static)
      away: remove the subspace instead of all else. (static)
      side: "rows" are the inputs of a matrix, "cols" its outputs. (static)
      layout: which axes are which. Leaves without a view are left alone. (static)

    Returns:
      A stateless transformation; the output norm is at most the input's.

    State:
      None.

    Raises:
      ValueError: a basis that is not orthonormal (unless it is traced or comes from a function), or
        that does not fit its leaf, which is named at the first update.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.project_onto_subspace(jnp.array([[1.0], [0.0]]), away=True)
      >>> u, _ = tx.update({"kernel": jnp.ones((2, 3))}, tx.init({"kernel": jnp.ones((2, 3))}))
      >>> print(u["kernel"])
      [[0. 0. 0.]
       [1. 1. 1.]]

    Deviations:
      DOGE's code forms the projector and places it before Adam only; its abstract speaks of
      projecting within the shared subspace, its code projects away from it, as here with `away`.

    References:
      Wei et al., "Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent",
      arXiv:2501.01230, 2025; after its port, tanganke/fusion_bench@10660306.
    """
    _checks.check_choice(_SUBSPACE, "side", side, ("rows", "cols"))
    _checks.check_callable(_SUBSPACE, layout=layout)
    if not callable(basis):
        _check_bases(basis)

    def leaf(path, u, _, given):
        view = _layout.view_of(path, u, layout) if u.size else None
        columns = basis(path, u) if callable(basis) and view is not None else given
        if view is None or columns is None:
            return (u,)
        _check_fit(path, u, view, columns, side)

        def project(u, columns):
            columns = columns.astype(u.dtype)

            def matrices(x):
                y = x if side == "rows" else x.mT
                y = product(columns, product(columns.mT, y))
                y = y if side == "rows" else y.mT
                return x - y if away else y

            return _layout.on_matrix(matrices, lambda *_: view)(u)

        return (partitioned(project, jax.typeof(u).sharding.spec, u, jnp.asarray(columns)),)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        bases = None if callable(basis) else basis
        others = (_spread(_SUBSPACE, "the basis", bases, updates),)
        (updates,) = _leafwise.leafwise(_SUBSPACE, leaf, updates, others=others)
        return updates, state

    return optax.GradientTransformationExtraArgs(_leafwise.init_checked(_SUBSPACE), update)


class KeepSparsityState(NamedTuple):
    """State of `keep_sparsity`."""

    held: Any  # bool, the parameters' shapes: True where the parameter is to be zero


def _held(path: str, p: Any, kept: Any, view: _layout.MatrixView | None, given: bool) -> jax.Array:
    """Return which entries of one leaf are held at zero, placed like the leaf."""
    nothing = _leafwise.zeros_like(p, bool)
    if not given:
        abstract = isinstance(p, jax.ShapeDtypeStruct)
        return nothing if abstract or view is None else jnp.equal(p, 0)
    if kept is None or isinstance(kept, bool):
        return nothing if kept in (None, True) else ~nothing
    if getattr(kept, "shape", None) != p.shape or not jnp.issubdtype(kept.dtype, jnp.bool_):
        found = f"{getattr(kept, 'dtype', type(kept).__name__)}{getattr(kept, 'shape', '')}"
        raise ValueError(
            f"{_SPARSITY}: the mask of leaf '{path}' must be bools of shape {p.shape}, got "
            f"{found}. True keeps an entry; write mask != 0."
        )
    return nothing | ~jnp.asarray(kept)


def _check_held(path: str, held: Any, view: _layout.MatrixView | None, pattern: Any) -> None:
    if view is None or view.role != "matrix" or isinstance(held, jax.core.Tracer):
        return
    if not getattr(held, "is_fully_addressable", True) or not np.any(held):
        return
    n, m = pattern
    moved = np.moveaxis(np.asarray(held), view.rows, range(len(view.rows)))
    if not has_pattern(moved.reshape(view.dims(held.shape)[0], -1), n, m):
        raise ValueError(
            f"{_SPARSITY}: leaf '{path}' of shape {held.shape} must have {n} zeros in every {m} "
            f"consecutive inputs, got a group with fewer, or a rest. Prune it with "
            f"importance_mask(scores, pattern=({n}, {m})), or keep it dense."
        )


@_checks.explain_calls
def keep_sparsity(
    mask: SparsityMask = None,
    *,
    pattern: tuple[int, int] | None = None,
    layout: _layout.Policy = _layout.flax,
) -> optax.GradientTransformationExtraArgs:
    """Keep pruned weights at exactly zero.

    With held = not mask, or p_0 == 0 at init:   u <- -p where held, else u.
    So p + u is exactly zero where held: from the first step on, if a given mask meets weights that
    are not. An update of lower precision than p takes a few steps. What is not finite in u does
    not get through (it would in a product with the mask).

    It comes last in the chain, after momentum, decay and the rate. Moments then see the gradients
    of held entries, as in retraining after pruning. To hide these from the moments, and from a clip
    by the global norm, put one in front too: `optax.chain(keep_sparsity(), tx, keep_sparsity())`.

    Args:
      mask: True where an entry is kept, as `importance_mask` returns: a tree of bool arrays, or a
        prefix of one with bools (or None: keep all) for whole leaves, or a function of params.
        None: what is not zero at init is kept, in leaves with a view. Biases and norm scales, which
        often start at zero, then all move; so give a mask for a matrix that starts at zero, such as
        LoRA's. The mask is not taken from later params: a weight that happens to meet zero would
        never leave it. (static)
      pattern: (n, m) to check at init that of every m consecutive inputs at least n are held, in
        every matrix that holds any: 2:4 is (2, 4). Where init is traced nothing is checked.
        (static)
      layout: which leaves are matrices, and which of their axes are inputs. (static)

    Returns:
      A transformation that must come last. Needs params.

    State:
      held: bool, 1 byte per parameter, where the parameter is.

    Raises:
      ValueError: at init, by leaf: a mask of another shape, zeros that are not in the pattern.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optax.chain(optax.sgd(0.25), optlab.keep_sparsity())
      >>> params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> u, _ = tx.update({"kernel": jnp.ones((2, 2))}, tx.init(params), params)
      >>> print(optax.apply_updates(params, u)["kernel"])
      [[0.75 0.  ]
       [0.   0.75]]

    Deviations:
      PERP's code reads the mask as p == 0 at run time. Vectors are not pruned by either paper, so
      their zeros are not kept without a mask.

    References:
      Zimmer et al., "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs",
      arXiv:2312.15230, 2023; ZIB-IOL/PERP@0d4554b5.
    """
    if pattern is not None:
        check_pattern(_SPARSITY, pattern)
    _checks.check_callable(_SPARSITY, layout=layout)
    if callable(mask):
        _checks.check_takes(_SPARSITY, "the mask", "params", mask)

    def kept_of(params):
        # `optax.tree.map_params` asks for the state of a tree without leaves.
        if mask is None or not jax.tree.leaves(params):
            return jax.tree.map(lambda _: None, params, is_leaf=_leafwise.is_none)
        return _spread(_SPARSITY, "the mask", mask(params) if callable(mask) else mask, params)

    def init(params):
        _leafwise.check_tree(_SPARSITY, params)

        def leaf(key_path, p, kept):
            if p is None:
                return None
            path = _layout.path_str(key_path)
            view = _layout.view_of(path, p, layout)
            held = _held(path, p, kept, view, mask is not None)
            if pattern is not None:
                _check_held(path, held, view, pattern)
            return held

        return KeepSparsityState(
            jax.tree_util.tree_map_with_path(
                leaf, params, kept_of(params), is_leaf=_leafwise.is_none
            )
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        _leafwise.require_params(_SPARSITY, params)
        # The shell gives the bools as numbers.
        pick = lambda _, u, p, held: (jnp.where(held != 0, -p, u),)  # noqa: E731
        (updates,) = _leafwise.leafwise(_SPARSITY, pick, updates, (), params, others=(state.held,))
        return updates, state

    return optax.GradientTransformationExtraArgs(init, update)
