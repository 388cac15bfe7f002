"""Checkpoints of any tree of arrays: written whole or not at all, read whole or refused.

>>> import tempfile
>>> import jax, jax.numpy as jnp, optax, optlab
>>> from optlab import checkpoint
>>> params = {"kernel": jnp.ones((8, 4))}
>>> tx = optlab.lion(1e-3)
>>> config = {"method": "lion", "learning_rate": 1e-3}
>>> folder = tempfile.mkdtemp()
>>> path = checkpoint.save(folder, (params, tx.init(params)), step=100, config=config, keep=3)
>>> like = jax.eval_shape(lambda p: (p, tx.init(p)), params)
>>> params, opt_state = checkpoint.restore(folder, like, config=config)
>>> checkpoint.read(folder).step
100

A step is a folder: the arrays as orbax writes them, a manifest, and a seal. Orbax alone restores
what is there: fewer leaves, other shapes and dtypes, the moments of another method. Here the
manifest has the path, shape and dtype of every leaf, the classes of the state, the configuration
and the versions, and any difference is refused with a list of what differs. The seal has the
SHA-256 of every file, for neither orbax nor JSON notices every changed byte.

Where the arrays lie is no part of it: a restored array gets the sharding of its leaf in `like`,
on any mesh. With several processes, all call `save` and `restore` with the same arguments on a file
system they share; each writes its own shards, the first one names and deletes folders. One run
writes into a folder at a time. A path is one of a local or mounted file system, which renames
folders atomically; object stores do not.
"""

import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from optlab.state import arrays, folders, manifest
from optlab.state.folders import CheckpointError
from optlab.state.manifest import Leaf, Manifest

__all__ = ["CheckpointError", "Leaf", "Manifest", "read", "restore", "save", "steps"]

Leaves = dict[str, Any]
Migration = Callable[[Leaves, Any], tuple[Leaves, Any]]


def save(
    path: Any,
    tree: Any,
    *,
    step: int,
    config: Any = None,
    values: Any = None,
    version: int = 1,
    keep: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a tree of arrays as one step of the checkpoints in a folder.

    Until the step is whole and on the disk it has no name that is read, and no earlier step goes;
    a process that is killed at any moment leaves the steps it had.

    Args:
        path: the folder of a run's checkpoints; created if it is not there.
        tree: any tree of `jax.Array`s and NumPy arrays: parameters, optimizer state, PRNG keys, or
            a tuple of them. Holes (`None`, `optax.MaskedNode`) are kept.
        step: the number of the checkpoint; above the last one saved.
        config: what the run is: method and hyperparameters, anything JSON can hold. `restore`
            compares it.
        values: what else goes on from here, anything JSON can hold: the position in the data, the
            losses so far. Not compared; `read` returns it.
        version: counts the changes you made to the tree's structure, for `restore`'s migrations.
        keep: how many of the last steps to keep; None keeps all.
        overwrite: replace the last step if it is this one; without it, that is refused.

    Returns:
        The step's own folder.

    Raises:
        CheckpointError: a leaf that would not come back bit for bit (by its path), a step that is
            not above the last, a config or values that JSON cannot hold.
    """
    root, step = _root(path), _number("step", step, 0)
    if keep is not None:
        keep = _number("keep", keep, 1)
    leaves, nodes = manifest.describe(tree)
    saved = jax.tree.leaves(tree)
    arrays.refuse_unstorable(leaves, saved)
    described = Manifest(
        step=step,
        version=_number("version", version, 0),
        config=manifest.plain("config", config),
        values=manifest.plain("values", values),
        packages=manifest.versions(),
        leaves=leaves,
        nodes=nodes,
    )
    part = folders.part_of(root, step)
    _on_first(lambda: folders.begin(part, overwrite))
    arrays.write(part, saved)
    _on_first(lambda: (manifest.write(part, described), folders.publish(part, keep)))
    return root / str(step)


def restore(
    path: Any,
    like: Any,
    *,
    step: int | None = None,
    config: Any = None,
    version: int = 1,
    migrations: Mapping[int, Migration] | None = None,
) -> Any:
    """Read a step back into the structure, and onto the devices, of another tree.

    Args:
        path: the folder that `save` was given.
        like: a tree of the structure, shapes and dtypes that were saved: a fresh
            `(params, tx.init(params))`, or its `jax.ShapeDtypeStruct`s. Each array gets the
            sharding of its leaf here, on whatever mesh. Where a leaf names none (no sharding, or an
            array that jax may move) it is put on the default device, and jax may move it.
        step: the step to read; None for the last.
        config: the configuration to compare with the saved one, key by key; None to not compare.
        version: the version of the tree that `like` has.
        migrations: `{version: fn}`, each bringing a checkpoint of its version to the next one by
            `leaves, config = fn(leaves, config)`. `leaves` maps the paths to NumPy arrays (typed
            keys: to jax arrays), whole ones, so this is for one process.

    Returns:
        The saved tree, every bit of it; a leaf that is a NumPy array in `like` is one here. Only
        weak types, those of arrays made from Python numbers, come back as strong ones.

    Raises:
        CheckpointError: no such step, any changed byte, another tree, config or version. Its
            `differences` lists what differs.
    """
    folder = folders.locate(_root(path), step)
    found = _opened(folder)
    here, nodes = manifest.describe(like)
    likes, structure = jax.tree.flatten(like)
    if found.version == version:
        manifest.refuse_config(found.config, config)
        manifest.refuse_tree(found.leaves, here, (found.nodes, nodes))
        return structure.unflatten(arrays.read(folder, here, likes))
    leaves, saved_config = _migrated(folder, found, version, migrations or {})
    manifest.refuse_config(manifest.plain("config", saved_config), config)
    manifest.refuse_tree(manifest.describe(leaves)[0], tuple(sorted(here)))
    pairs = zip(here, likes, strict=True)
    return structure.unflatten(arrays.placed(leaves[leaf.path], like) for leaf, like in pairs)


def read(path: Any, *, step: int | None = None) -> Manifest:
    """Return what a checkpoint says of itself, after a look at every byte of it.

    Args:
        path: the folder that `save` was given.
        step: the step to read; None for the last.

    Returns:
        A `Manifest`: `step`, `version`, `config` and `values` as they were given to `save`, the
        versions of the `packages`, the `leaves` with their paths, dtypes, shapes and shardings.

    Raises:
        CheckpointError: no such step, or any changed byte.
    """
    return _opened(folders.locate(_root(path), step))


def steps(path: Any) -> list[int]:
    """Return the steps saved in a folder, ascending; none if there is no such folder."""
    return folders.numbers(_root(path))


def _root(path: Any) -> Path:
    if "://" in str(path):
        raise CheckpointError(
            f"checkpoint: path must be on a local or mounted file system, got {str(path)!r}. "
            "Save to a local folder and copy whole steps from there."
        )
    return Path(path).absolute()


def _number(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise CheckpointError(
            f"checkpoint: {name} must be an integer >= {least}, got {value!r}. Pass {name}=int(...)"
        )
    return number


def _opened(folder: Path) -> Manifest:
    folders.check_seal(folder)
    return manifest.read(folder)


def _migrated(
    folder: Path, found: Manifest, version: int, migrations: Mapping[int, Migration]
) -> tuple[Leaves, Any]:
    """Return leaves and config, brought to `version` one version at a time."""
    chain = range(found.version, version)
    missing = [number for number in chain if number not in migrations]
    if missing or not chain:
        raise CheckpointError(
            f"checkpoint: {str(folder)!r} has another version than was asked for, {version}, got "
            f"{found.version}. Pass version={found.version}"
            + (f", or migrations= with a function for each of {missing}." if missing else ".")
        )
    if jax.process_count() > 1:
        raise CheckpointError(
            f"checkpoint: migrations need one process, got {jax.process_count()}. Restore and save "
            "in one process first, under the new version."
        )
    leaves, config = arrays.read_on_host(folder, found.leaves), found.config
    for number in chain:
        leaves, config = migrations[number](leaves, config)
    return leaves, config


def _on_first(act: Callable[[], Any]) -> None:
    """Act on the first process; the others wait until it is done, and fail if it failed."""
    error = None
    if jax.process_index() == 0:
        try:
            act()
        except Exception as caught:  # every kind: it is raised below, when the others know
            error = caught
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if failed and error is None:
            raise CheckpointError(
                "checkpoint: nothing was saved, got an error in process 0. Its output says which."
            )
    if error is not None:
        raise error
