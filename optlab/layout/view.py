"""`MatrixView`, leaf paths, and the one place where a policy is asked."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey


class MatrixView(NamedTuple):
    """Read a leaf as a batch of matrices: which axes are the input side, which the output side.

    All axes named in neither are batch axes: scan-stacked layers, experts, heads if asked. A view
    holds no shape, so one view fits a parameter, its gradient and its momentum alike.

    Args:
        rows: input (reduction) axes of the leaf, in the order in which they merge; may be negative.
        cols: output axes, likewise.
        role: "matrix"; "embedding" (a table of vectors, one per row); "head" (the map to the
            logits); "depthwise" (one small filter per column: a table, not one linear map).
    """

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    role: str = "matrix"

    @property
    def channels(self) -> tuple[int, ...]:
        """Axes of which each index is one unit: the output axes, or the vectors of an embedding."""
        return self.rows if self.role == "embedding" else self.cols

    @property
    def within_channel(self) -> tuple[int, ...]:
        """Axes of one matrix that a norm of one channel sums over."""
        return tuple(a for a in (*self.rows, *self.cols) if a not in self.channels)

    def batch(self, ndim: int) -> tuple[int, ...]:
        """Axes of a leaf of rank `ndim` that are in neither `rows` nor `cols`."""
        used = {axis % ndim for axis in (*self.rows, *self.cols)}
        return tuple(axis for axis in range(ndim) if axis not in used)

    def dims(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(m, n): sizes of the input and of the output side of a leaf of this shape."""
        return math.prod(shape[i] for i in self.rows), math.prod(shape[i] for i in self.cols)

    def resolve(self, ndim: int) -> "MatrixView":
        """Return the view with non-negative axes.

        Raises:
            ValueError: an axis does not exist at rank `ndim`, is named twice, or one side is empty.
        """
        axes = (*self.rows, *self.cols)
        if not self.rows or not self.cols:
            raise ValueError(f"rows and cols must each name an axis, got {self.text()}")
        if not all(-ndim <= axis < ndim for axis in axes):
            raise ValueError(f"{self.text()} names an axis that a leaf of rank {ndim} has not")
        if len({axis % ndim for axis in axes}) < len(axes):
            raise ValueError(f"{self.text()} names an axis twice")
        return self._replace(
            rows=tuple(axis % ndim for axis in self.rows),
            cols=tuple(axis % ndim for axis in self.cols),
        )

    def insert_axis(self, at: int) -> "MatrixView":
        """Return the view, its axes non-negative, for a leaf with one more axis at `at`."""
        rows, cols = (
            tuple(axis + (axis >= at) for axis in side) for side in (self.rows, self.cols)
        )
        return self._replace(rows=rows, cols=cols)

    def text(self) -> str:
        """Return the view as it is written in a rule."""
        role = "" if self.role == "matrix" else f', role="{self.role}"'
        return f"MatrixView(rows={self.rows}, cols={self.cols}{role})"


Policy = Callable[[str, Any], MatrixView | None]


def _key_str(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
    return str(key)


def path_str(key_path: tuple[Any, ...]) -> str:
    """Join a key path of `jax.tree_util` into one string, the same for every kind of container.

    A trailing attribute `value` is the box of an NNX Variable or a Linen Partitioned, there at init
    and gone at update, so it is dropped. A dictionary key "value", or an attribute inside the path
    (an attention's value projection), stays.

    Example:
        >>> from jax.tree_util import DictKey, GetAttrKey
        >>> path_str((DictKey("attn"), DictKey("value"), DictKey("kernel"), GetAttrKey("value")))
        'attn/value/kernel'
    """
    if key_path and key_path[-1] == GetAttrKey("value"):
        key_path = key_path[:-1]
    return "/".join(_key_str(key) for key in key_path)


def paths(tree: Any) -> Any:
    """Return a tree of the same structure that holds each leaf's path."""
    return jax.tree_util.tree_map_with_path(lambda key_path, _: path_str(key_path), tree)


def view_of(path: str, leaf: Any, policy: Policy) -> MatrixView | None:
    """Ask `policy` for the view of one leaf, with non-negative axes.

    Raises:
        ValueError: the view does not fit the leaf, which is named.
    """
    view = policy(path, leaf)
    if view is None:
        return None
    if not isinstance(view, MatrixView):
        raise TypeError(
            f"layout: the policy gave {view!r} for leaf '{path}'. Return a MatrixView or None."
        )
    try:
        return view.resolve(np.ndim(leaf))
    except ValueError as error:
        raise ValueError(
            f"layout: the view of leaf '{path}' of shape {np.shape(leaf)} does not fit: {error}. "
            f'Narrow the rule, or put {{"{path}": None}} before it in layout.rules.'
        ) from None


def role(path: str, leaf: Any, policy: Policy) -> str:
    """Return the role of one leaf: that of its view, or "vector" or "scalar" where it has none."""
    view = view_of(path, leaf, policy)
    if view is not None:
        return view.role
    return "vector" if np.ndim(leaf) else "scalar"


def map_with_view(fn: Callable[..., Any], tree: Any, *rest: Any, policy: Policy) -> Any:
    """Map `fn(view_or_None, path, leaf, *rest_leaves)`; the policy sees the leaves of `tree`."""

    def one(key_path: tuple[Any, ...], leaf: Any, *others: Any) -> Any:
        path = path_str(key_path)
        return fn(view_of(path, leaf, policy), path, leaf, *others)

    return jax.tree_util.tree_map_with_path(one, tree, *rest)
