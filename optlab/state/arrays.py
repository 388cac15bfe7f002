"""The arrays of a checkpoint on the disk, as orbax writes them: a flat tree named by position."""

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optlab.state.folders import CheckpointError, listed
from optlab.state.manifest import Leaf

_FOLDER = "arrays"


def _orbax() -> types.ModuleType:
    # An extra of the package; and half of a second of imports that training need not wait for.
    try:
        import orbax.checkpoint
    except ImportError:
        raise ImportError(
            "checkpoint: orbax is needed to write and to read arrays, got none installed. "
            "Install it with pip install 'optlab[checkpoint]'."
        ) from None
    return orbax.checkpoint


def _name(index: int) -> str:
    return f"{index:05d}"


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def refuse_unstorable(leaves: Sequence[Leaf], arrays: Sequence[Any]) -> None:
    """Refuse, by its path, a leaf that would not come back bit for bit."""
    _orbax()
    for leaf, array in zip(leaves, arrays, strict=True):
        fault = _fault(array)
        if fault:
            what, instead = fault
            raise CheckpointError(
                f"checkpoint: leaf {leaf.path!r} must be an array that can be stored, got one that "
                f"{what}. {instead}"
            )


def _fault(array: Any) -> tuple[str, str] | None:
    if isinstance(array, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return "has no values", "Save arrays, outside of jax.jit."
    if isinstance(array, jax.Array) and array.is_deleted():
        return "was donated", "Save what the step returned, not what it was given."
    if isinstance(array, jax.Array) and jax.process_count() > 1 and array.is_fully_addressable:
        return "only this process has", "Put it on the mesh: make the state under jax.jit."
    if not _is_key(array) and not _storable(array.dtype):
        return f"has dtype {array.dtype}", "Save array.astype(another), and convert it back after."
    if _is_key(array) and not array.size:
        return "has no keys in it", "Leave it out."
    return None


def _storable(dtype: np.dtype) -> bool:
    import tensorstore

    try:
        tensorstore.dtype(dtype.name)
    except ValueError:
        return False
    return True


def write(folder: Path, arrays: Sequence[Any]) -> None:
    """Write arrays; every process takes part."""
    # Orbax refuses arrays without elements, and trees without arrays.
    stored = {_name(index): x for index, x in enumerate(arrays) if x.size}
    if stored:
        with _orbax().StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / _FOLDER, stored)


def read(folder: Path, leaves: Sequence[Leaf], likes: Sequence[Any]) -> list[Any]:
    """Read arrays of the shapes and dtypes of `likes`, onto their devices."""
    wanted = {_name(index): _target(like) for index, like in enumerate(likes) if like.size}
    found = {}
    if wanted:
        try:
            with _orbax().StandardCheckpointer() as checkpointer:
                stored = checkpointer.metadata(folder / _FOLDER).item_metadata.tree
                _refuse_others(leaves, wanted, stored)
                found = checkpointer.restore(folder / _FOLDER, wanted)
        except CheckpointError:
            raise
        except Exception as error:  # of many kinds, and of other kinds in the next version
            raise CheckpointError(
                f"checkpoint: orbax cannot read {str(folder)!r}, got {type(error).__name__}: "
                f"{error}. Read it with the orbax that its manifest.json names."
            ) from error
    return [
        placed(found[_name(index)], like) if like.size else _empty(like)
        for index, like in enumerate(likes)
    ]


def read_on_host(folder: Path, leaves: Sequence[Leaf]) -> dict[str, Any]:
    """Read whole arrays by their paths: NumPy arrays, and typed keys on one device."""
    likes = [_host_like(leaf) for leaf in leaves]
    return {
        leaf.path: array for leaf, array in zip(leaves, read(folder, leaves, likes), strict=True)
    }


def _host_like(leaf: Leaf) -> Any:
    key = _KEYS.get(leaf.dtype)
    if key is None:
        return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
    return jax.ShapeDtypeStruct(
        leaf.shape, jax.eval_shape(lambda: jax.random.key(0, impl=key)).dtype
    )


# The names that jax prints of the three implementations it has.
_KEYS = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}


def _refuse_others(leaves: Sequence[Leaf], wanted: dict[str, Any], stored: Any) -> None:
    """Refuse arrays that are not those of the manifest: orbax would pad, cut or convert them."""
    if stored.keys() != wanted.keys():
        differences = (f"{len(wanted)} arrays in the manifest, {len(stored)} in orbax's files",)
    else:
        differences = tuple(
            f"{leaf.path}: {leaf.dtype}{list(leaf.shape)} in the manifest, "
            f"{stored[name].dtype}{list(stored[name].shape)} in orbax's files"
            for index, leaf in enumerate(leaves)
            if (name := _name(index)) in wanted
            and not leaf.dtype.startswith("key<")
            and (str(stored[name].dtype), tuple(stored[name].shape)) != leaf[1:3]
        )
    if differences:
        raise CheckpointError(
            f"checkpoint: the manifest is of other arrays, got:\n  {listed(differences)}\n"
            "Restore from a copy.",
            differences,
        )


def _sharding(like: Any) -> jax.sharding.Sharding | None:
    """Return where `like` must be, or None if jax may move it."""
    if isinstance(like, jax.Array) and not like.committed:
        return None
    return like.sharding


def _target(like: Any) -> Any:
    """Return what tells orbax where to put an array."""
    if isinstance(like, np.ndarray):
        return like
    sharding = _sharding(like)
    if sharding is None and not _is_key(like):
        return np.broadcast_to(np.zeros((), like.dtype), like.shape)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)


def placed(array: Any, like: Any) -> Any:
    """Return an array where `like` is."""
    if isinstance(like, np.ndarray):
        return np.asarray(array)
    sharding = _sharding(like)
    if sharding is not None:
        return jax.device_put(array, sharding)
    # Orbax ties what it restores to a device. A step count that is tied to one device cannot go
    # into a jitted step with parameters on a mesh; a fresh one can.
    if _is_key(array):
        data = jnp.array(np.asarray(jax.random.key_data(array)))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    return jnp.array(np.asarray(array))


def _empty(like: Any) -> Any:
    if isinstance(like, np.ndarray):
        return np.zeros(like.shape, like.dtype)
    return placed(jnp.zeros(like.shape, like.dtype), like)
