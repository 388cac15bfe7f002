"""The states of links in the state of a whole optimizer, and the way to each."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from optlab import _leafwise

Path = tuple[str, ...]


def _is_box(x: Any) -> bool:
    return _leafwise.is_hole_or_box(x) and not _leafwise.is_hole(x)


def unboxed(tree: Any) -> Any:
    """Return the tree with the arrays of Flax's boxes in the boxes' places.

    A box around several arrays stays: it is no box of one leaf.
    """

    def content(x: Any) -> Any:
        inside = jax.tree.leaves(x) if _is_box(x) else ()
        return inside[0] if len(inside) == 1 else x

    return jax.tree.map(content, tree, is_leaf=_is_box)


def children(node: Any) -> list[tuple[Any, ...]]:
    """Return what a node of a tree holds, under its keys; nothing for a leaf."""
    flat, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(*keys(path), child) for path, child in flat if path]


def keys(path: Sequence[Any]) -> Path:
    """Return the keys of a path of `jax.tree_util` as text."""
    return tuple(map(_key, path))


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def states(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every NamedTuple in a state and the way to it, the outer before the inner."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        yield path, node
    for key, child in children(node):
        yield from states(child, (*path, key))
