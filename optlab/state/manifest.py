"""What a checkpoint says of itself, and how two such descriptions differ."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from optlab import layout as _layout
from optlab.state.folders import CheckpointError, listed

MANIFEST = "manifest.json"
# Of the folder: raised when what is written here is not what an older optlab can read.
FORMAT = 1
_PACKAGES = ("optlab", "jax", "optax", "orbax-checkpoint")


class Leaf(NamedTuple):
    """One array of the saved tree."""

    path: str
    dtype: str  # as jax prints it: float32, int4, key<fry>
    shape: tuple[int, ...]
    sharding: str  # for information: a restore takes that of its `like`


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself: `step`, `config` and `values` are what `save` was given."""

    step: int
    version: int
    config: Any
    values: Any
    packages: dict[str, str]
    leaves: tuple[Leaf, ...]
    nodes: dict[str, str]  # path -> class, of the nodes whose class says what their fields mean


def describe(tree: Any) -> tuple[tuple[Leaf, ...], dict[str, str]]:
    """Return the leaves, in order, and the nodes of a tree of arrays or of their shapes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = tuple(_leaf(_layout.path_str(path), leaf) for path, leaf in flat)
    seen = set()
    for leaf in leaves:
        if leaf.path in seen:
            raise CheckpointError(
                f"checkpoint: two leaves have one path, got {leaf.path!r} twice. "
                "Rename one: no key may contain a '/'."
            )
        seen.add(leaf.path)
    return leaves, dict(_nodes(tree))


def _leaf(path: str, leaf: Any) -> Leaf:
    if not isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        raise CheckpointError(
            f"checkpoint: leaf {path!r} must be an array, got a {type(leaf).__name__}. "
            "Convert it with jnp.asarray, or put it into values=."
        )
    return Leaf(path, str(leaf.dtype), tuple(leaf.shape), _sharding(leaf))


def _sharding(leaf: Any) -> str:
    if isinstance(leaf, (np.ndarray, jax.core.Tracer)):
        return "none"
    sharding = leaf.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return f"{sharding.spec} on {dict(sharding.mesh.shape)}"
    return type(sharding).__name__


def _nodes(tree: Any, above: tuple = ()) -> Iterator[tuple[str, str]]:
    """Yield what paths leave out: the classes of named tuples, dataclasses and holes.

    The moments of Adam and of AdaBelief have the same fields; a leaf that is masked and one that is
    missing have the same path.
    """
    children, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if any(not path for path, _ in children):
        return
    if not children or hasattr(tree, "_fields") or dataclasses.is_dataclass(tree):
        yield _layout.path_str(above), type(tree).__name__
    for path, child in children:
        yield from _nodes(child, (*above, *path))


def plain(what: str, value: Any) -> Any:
    """Return `value` as JSON gives it back, or refuse it."""
    try:
        return json.loads(_text(value))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint: {what} must be what JSON can hold, got this: {error}. "
            "Write functions as their names, arrays as lists or numbers, nan as None."
        ) from None


def _text(value: Any) -> str:
    return json.dumps(value, allow_nan=False, sort_keys=True)


def _digest(config: Any) -> str:
    return hashlib.sha256(_text(config).encode()).hexdigest()


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into the folder of a checkpoint."""
    fields = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    record = {"format": FORMAT, "config_sha256": _digest(manifest.config), **fields}
    (folder / MANIFEST).write_text(json.dumps(record, allow_nan=False, indent=1))


def versions() -> dict[str, str]:
    """Return the versions of the packages that wrote the checkpoint."""
    return {name: metadata.version(name) for name in _PACKAGES}


def read(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint whose seal is whole."""
    try:
        record = json.loads((folder / MANIFEST).read_bytes())
        written = record.pop("format")
        if written != FORMAT:
            raise CheckpointError(
                f"checkpoint: {str(folder)!r} has another format than this optlab reads, {FORMAT}, "
                f"got {written}. Read it with optlab {record['packages']['optlab']}, which wrote "
                "it."
            )
        if record.pop("config_sha256") != _digest(record["config"]):
            raise CheckpointError(
                f"checkpoint: {str(folder)!r} has another config than it was saved with, got one "
                "that does not match its SHA-256. Restore from a copy."
            )
        leaves = tuple(Leaf(p, d, tuple(shape), s) for p, d, shape, s in record.pop("leaves"))
        return Manifest(**record, leaves=leaves)
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"checkpoint: {str(folder)!r} has no manifest that can be read, got {error!r}. "
            "Restore from a copy."
        ) from None


def refuse_config(saved: Any, config: Any) -> None:
    """Refuse a configuration that is not the saved one, key by key."""
    if config is None:
        return
    ours, theirs = _keys(plain("config", config)), _keys(saved)
    differences = tuple(_unequal(theirs, ours))
    if differences:
        raise CheckpointError(
            f"checkpoint: it was saved with another config, got {len(differences)} differences:\n"
            f"  {listed(differences)}\nMake them equal, or leave out config to restore regardless.",
            differences,
        )


def _keys(config: Any, above: str = "config") -> dict[str, str]:
    """Return the JSON of each value, under its dotted key."""
    if not isinstance(config, dict) or not config:
        return {above: _text(config)}
    found = {}
    for key, value in config.items():
        found |= _keys(value, f"{above}.{key}")
    return found


def _unequal(theirs: dict[str, str], ours: dict[str, str]) -> Iterator[str]:
    for key in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(key, "nothing"), ours.get(key, "nothing")
        if there != here:
            yield f"{key}: {there} in the checkpoint, {here} here"


def refuse_tree(saved: tuple[Leaf, ...], like: tuple[Leaf, ...], nodes: Any = None) -> None:
    """Refuse a tree that is not the saved one, leaf by leaf, and, if given, node by node."""
    differences = (*_leaf_differences(saved, like), *(_unequal(*nodes) if nodes else ()))
    if differences:
        raise CheckpointError(
            "checkpoint: the saved tree is not that of `like`, got "
            f"{len(differences)} differences:\n  {listed(differences)}\n"
            "Build `like` by the model and the optimizer that were saved, or save the new tree "
            "under a new version= and pass migrations=.",
            differences,
        )


def _leaf_differences(saved: tuple[Leaf, ...], like: tuple[Leaf, ...]) -> Iterator[str]:
    theirs, ours = ({leaf.path: leaf for leaf in leaves} for leaves in (saved, like))
    for path, leaf in theirs.items():
        if path not in ours:
            yield f"{path}: only in the checkpoint, {leaf.dtype}{list(leaf.shape)}"
    for path, leaf in ours.items():
        if path not in theirs:
            yield f"{path}: only here, {leaf.dtype}{list(leaf.shape)}"
        elif leaf[1:3] != theirs[path][1:3]:
            there = theirs[path]
            yield (
                f"{path}: {there.dtype}{list(there.shape)} in the checkpoint, "
                f"{leaf.dtype}{list(leaf.shape)} here"
            )
    if theirs.keys() == ours.keys() and list(theirs) != list(ours):
        moved = [path for path, other in zip(theirs, ours, strict=True) if path != other]
        yield f"in another order: {', '.join(moved[:5])}"
