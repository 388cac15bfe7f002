"""Ranks of the matrices of a tree from their singular values."""

from typing import Any, NamedTuple

import jax
import numpy as np

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed.shardings import everywhere
from optlab.layout.apply import open_leaf
from optlab.linalg import ranks as _ranks

_NAME = "rank_by_energy"


class RanksByEnergy(NamedTuple):
    """What `rank_by_energy` returns."""

    ranks: Any  # int for a matrix, the full one for "nlrc"; None for other leaves
    labels: Any  # "lrc", "nlrc" or "other"
    threshold: float
    reduction: float  # share of the ranks of all matrices, low or not, below the threshold


def _check_call(threshold: Any, reduction: Any, min_ratio: Any) -> None:
    if (threshold is None) == (reduction is None):
        raise ValueError(
            f"{_NAME}: give either threshold or reduction, got threshold={threshold!r}, "
            f"reduction={reduction!r}. Write rank_by_energy(params, reduction=0.5)."
        )
    if threshold is not None:
        must = "a number in [0, 1]"
        _checks.check_range(_NAME, must, lambda x: 0 <= x <= 1, threshold=threshold)
    else:
        _checks.check_decay(_NAME, reduction=reduction)
    _checks.check_decay(_NAME, min_ratio=min_ratio)


def _spectra(path: str, leaf: Any, view: _layout.MatrixView) -> np.ndarray:
    """Return the normalized singular values (..., min(m, n)) of the matrices of one leaf."""
    if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
        raise TypeError(
            f"{_NAME}: ranks must be known before a step is compiled, got leaf '{path}' traced, or "
            "as a shape. Call it outside jax.jit, on the arrays themselves."
        )
    groups = (*((axis,) for axis in view.batch(leaf.ndim)), view.rows, view.cols)
    x = everywhere(open_leaf(leaf, groups).matrices)  # no decomposition takes a part of a matrix
    found = _ranks.normalized_spectrum(x.astype(_leafwise.widen(x.dtype)))
    if not np.all(np.isfinite(found)):
        raise ValueError(
            f"{_NAME}: leaf '{path}' has no singular values, got NaN or infinite entries in it. "
            "Take finite weights, or a later gradient."
        )
    return found


def _choice(spectra: np.ndarray, threshold: float, min_ratio: float) -> tuple[int, str]:
    """Return rank and label of one leaf."""
    full, k = spectra.shape[-1], _ranks.kept_rank(spectra, threshold)
    return (k, "lrc") if (full - k) / full > min_ratio else (full, "nlrc")


def _threshold_for(spectra: list[np.ndarray], reduction: float) -> float:
    found = _ranks.threshold_for(spectra, reduction) if spectra else 0.0
    if found is None:
        most = _ranks.reduction_of(spectra, 1.0)
        raise ValueError(
            f"{_NAME}: reduction must be at most {most:.4g} here, where every matrix keeps its "
            f"largest singular values, got {reduction}. Ask for less."
        )
    return found


@_checks.explain_calls
def rank_by_energy(
    tree: Any,
    *,
    threshold: float | None = None,
    reduction: float | None = None,
    min_ratio: float = 0.4999,
    layout: _layout.Policy = _layout.flax,
) -> RanksByEnergy:
    """Choose a rank for every matrix by one threshold on its singular values (WeLore).

    s~ = (s - min s)/(max s - min s) of each matrix;   k = number of s~ >= threshold
    rank = k and "lrc", low rank, where 1 - k/min(m, n) > min_ratio; else min(m, n) and "nlrc".
    One threshold for all matrices makes ranks as unequal as spectra are: a long tail is cut, a flat
    spectrum stays.

    Of gradients the ranks suit `in_low_rank(inner, rank=found.ranks)`. Of weights, train only what
    is low rank, as a product of `factorize`: `optax.partition({"lrc": tx, "nlrc":
    optax.set_to_zero(), "other": optax.set_to_zero()}, found.labels)`.

    Args:
      tree: weights or gradients.
      threshold: in [0, 1]; 0 keeps all, 1 keeps the largest value only.
      reduction: instead of a threshold, the share of min(m, n), summed over all matrices, that
        lies below it, in [0, 1): the least threshold with as much is found by bisection.
      min_ratio: a low-rank matrix drops more than this share, in [0, 1). 0.4999 for fine-tuning as
        in the paper; 0, where matrices are only compressed, makes low what drops anything.
      layout: which leaves are matrices. Embeddings, heads and vectors are "other".

    Returns:
      `ranks`: a tree of ints, None for leaves that are no matrices; stacked layers and experts
      share one k, the largest of theirs. `labels`: a tree of "lrc", "nlrc", "other". `threshold`:
      the one used. `reduction`: the share below it, also in matrices that are not low rank.

    Raises:
      TypeError: called inside `jax.jit`: ranks are shapes, and must be known before.
      ValueError: entries that are not finite; a reduction that no threshold reaches.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> params = {"kernel": jnp.diag(jnp.array([8.0, 5.0, 1.0, 0.5])), "bias": jnp.zeros(4)}
      >>> found = optlab.rank_by_energy(params, threshold=0.175)
      >>> print(found.ranks, found.labels)
      {'bias': None, 'kernel': 2} {'bias': 'other', 'kernel': 'lrc'}

    Deviations:
      A constant spectrum, such as that of an orthogonal matrix, keeps its full rank; in the
      official code it divides 0 by 0, to the same effect, or cuts at random where rounding makes
      the values differ. The reduction counts what stacked layers drop together.

    References:
      Jaiswal et al., "From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from
      Low-Rank Gradients", arXiv:2407.11239, 2024; VITA-Group/welore@f69f015c.
    """
    _check_call(threshold, reduction, min_ratio)
    _checks.check_callable(_NAME, layout=layout)
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_leafwise.is_none)
    found: list[np.ndarray | None] = []
    for key_path, leaf in keyed:
        path = _layout.path_str(key_path)
        view = None if leaf is None or not np.size(leaf) else _layout.view_of(path, leaf, layout)
        found.append(_spectra(path, leaf, view) if view and view.role == "matrix" else None)
    spectra = [s for s in found if s is not None]
    used = _threshold_for(spectra, reduction) if reduction is not None else float(threshold or 0.0)
    chosen = [(None, "other") if s is None else _choice(s, used, min_ratio) for s in found]
    ranks, labels = (jax.tree.unflatten(treedef, [pair[i] for pair in chosen]) for i in range(2))
    return RanksByEnergy(ranks, labels, used, _ranks.reduction_of(spectra, used))
