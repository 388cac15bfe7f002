"""Scores of single weights, and the masks that keep the best of them."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed.shardings import partitioned
from optlab.linalg import sparsity


def _spread(what: str, given: Any, params: Any) -> Any:
    try:
        return jax.tree.broadcast(given, params, is_leaf=_leafwise.is_none)
    except ValueError:
        raise ValueError(
            f"gblm_scores: {what} is no prefix of the parameter tree. Give an array for every "
            "matrix, and None for leaves or subtrees without one."
        ) from None


def _along_inputs(path: str, x: Any, view: _layout.MatrixView, shape: tuple[int, ...]) -> jax.Array:
    """Return norms (*batch, m) shaped so that they multiply a leaf."""
    batch = view.batch(len(shape))
    wanted = (*(shape[a] for a in batch), view.dims(shape)[0])
    if jnp.shape(x) != wanted:
        raise ValueError(
            f"gblm_scores: x_norms of leaf '{path}' of shape {shape} must have shape {wanted}, one "
            f"norm per input, got {jnp.shape(x)}. Flatten the input axes, keep the layers'."
        )
    axes = (*batch, *view.rows)
    x = jnp.asarray(x).reshape([shape[a] for a in axes])
    return jnp.expand_dims(x.transpose(sorted(range(len(axes)), key=axes.__getitem__)), view.cols)


@_checks.explain_calls
def gblm_scores(
    params: Any,
    sums: Any = None,
    x_norms: Any = None,
    *,
    alpha: float = 100.0,
    p: Literal[1, 2] = 1,
    layout: _layout.Policy = _layout.flax,
) -> Any:
    """Score every weight by its size, the activations it meets and its gradients (GBLM-Pruner).

    score_ij = |W_ij| (|X_j|_2 + alpha |G_ij|_p),   |G|_1 = sum |g|,  |G|_2 = sqrt(sum g^2)
    for input j, over the samples of a calibration set. Without `sums` it is Wanda's score, without
    `x_norms` only the gradients count.

    Args:
      params: the weights.
      sums: what `accumulate_importance(p)` has in its state after one update per sample; or None.
      x_norms: of every matrix the norms of its inputs over the calibration set, (*batch, m): a
        tree like the parameters with None where there is none, or a prefix of one. The official
        code has sqrt(sum over tokens of x_j^2 / samples).
      alpha: weight of the gradients, >= 0; 100 in the official code.
      p: the norm that was accumulated.
      layout: which leaves are matrices, and which of their axes are inputs.

    Returns:
      A tree like the parameters: float32 scores of matrices; None for embeddings, heads, vectors,
      which are not pruned.

    Raises:
      ValueError: x_norms of another shape, by leaf.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.0]])}
      >>> print(optlab.gblm_scores(params, x_norms={"kernel": jnp.array([1.0, 2.0])})["kernel"])
      [[1. 2.]
       [6. 0.]]

    Deviations:
      Sums are taken in float32: the official code's float16 overflows at 65504.

    References:
      Das et al., "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models",
      arXiv:2311.04902, 2023; VILA-Lab/GBLM-Pruner@9e8aea22.
    """
    name = "gblm_scores"
    _checks.check_nonnegative(name, alpha=alpha)
    _checks.check_range(name, "1 or 2", lambda x: x in (1, 2), p=p)
    _checks.check_callable(name, layout=layout)
    if sums is None and x_norms is None:
        raise ValueError(
            f"{name}: sums or x_norms is needed, got None for both. Pass "
            "accumulate_importance's state.sums, or norms of activations."
        )

    def leaf(view, path, w, total, x):
        if view is None or view.role != "matrix":
            return None
        dtype = _leafwise.widen(w.dtype)
        factor = jnp.zeros(w.shape, dtype)
        if x is not None:
            factor = factor + _along_inputs(path, x, view, w.shape).astype(dtype)
        if total is not None:
            factor = factor + alpha * (total if p == 1 else jnp.sqrt(total)).astype(dtype)
        return jnp.abs(w.astype(dtype)) * factor

    others = (_spread("sums", sums, params), _spread("x_norms", x_norms, params))
    return _layout.map_with_view(leaf, params, *others, policy=layout)


@_checks.explain_calls
def importance_mask(
    scores: Any,
    ratio: float | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    layout: _layout.Policy = _layout.flax,
) -> Any:
    """Keep the weights of the highest scores, the same number for every output of a matrix.

    Of the m inputs of each output the int(ratio m) with the lowest scores are dropped; or with
    pattern=(n, m) the n lowest of every m consecutive inputs. Of equal scores the first go.

    Args:
      scores: a tree of scores; None for leaves to keep whole.
      ratio: share to drop, in [0, 1).
      pattern: (n, m), instead of a ratio: n zeros in every m inputs, 2:4 is (2, 4).
      layout: which axes are inputs. Leaves without a view are kept whole.

    Returns:
      A tree of bools, True where a weight is kept, for `keep_sparsity`; None for leaves kept whole.

    Raises:
      ValueError: m does not divide the inputs of a matrix, by leaf.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> scores = {"kernel": jnp.array([[1.0, 4.0], [2.0, 3.0]])}
      >>> print(optlab.importance_mask(scores, 0.5)["kernel"])
      [[False  True]
       [ True False]]

    Deviations:
      None; the official code's third way, a threshold per output, is not here.

    References:
      Das et al., arXiv:2311.04902, 2023; VILA-Lab/GBLM-Pruner@9e8aea22.
    """
    name = "importance_mask"
    _checks.check_callable(name, layout=layout)
    if (ratio is None) == (pattern is None):
        raise ValueError(
            f"{name}: give either ratio or pattern, got ratio={ratio!r}, pattern={pattern!r}. "
            "Write importance_mask(scores, 0.5) or importance_mask(scores, pattern=(2, 4))."
        )
    if pattern is None:
        _checks.check_range(name, "a number in [0, 1)", lambda x: 0 <= x < 1, ratio=ratio)
    else:
        sparsity.check_pattern(name, pattern)

    def keep(x):
        if pattern is not None:
            return sparsity.keep_by_pattern(x, *pattern)
        return sparsity.keep_by_ratio(x, ratio or 0.0)

    def leaf(view, path, score):
        if view is None:
            return None
        inputs = view.dims(score.shape)[0]
        if pattern is not None and inputs % pattern[1]:
            raise ValueError(
                f"{name}: leaf '{path}' of shape {score.shape} has {inputs} inputs, which "
                f"{pattern[1]} does not divide. Set its score to None to keep it whole."
            )
        # Sorting along a sharded axis is left to the partitioner, Explicit meshes do not have it.
        mask = _layout.on_matrix(keep, lambda *_: view)
        return partitioned(mask, jax.typeof(score).sharding.spec, jnp.asarray(score))

    return _layout.map_with_view(leaf, scores, policy=layout)
