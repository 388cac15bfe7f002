"""Shapes of the parameters in a file: headers and metadata are read, arrays are not."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optlab import layout
from optlab.lab.config import BadInput

Shapes = dict[str, jax.ShapeDtypeStruct]
_LENGTH = 8  # bytes of the header's length, little-endian, at the start of a safetensors file
_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class Found(NamedTuple):
    """The float arrays of a file by path, and how many other leaves it has."""

    params: Shapes
    others: int


def read(name: str, *, subtree: str | None = None, dtype: str | None = None) -> Found:
    """Return the shapes in a file or a checkpoint folder.

    Takes .pkl and .pickle (a tree of arrays, `jax.ShapeDtypeStruct`s or shapes as tuples), .npz,
    .safetensors, a folder of .safetensors, and an orbax checkpoint. Unpickling runs code of the
    file: read your own only.

    Args:
        name: path of the file or folder.
        subtree: only what lies below this path, such as "params".
        dtype: of all parameters, instead of the file's.

    Raises:
        BadInput: what is wrong with which file, and what to write instead.
    """
    leaves = _flat(_load(Path(name)))
    chosen = _below(leaves, subtree, name)
    params = {key: leaf for key, leaf in chosen.items() if leaf is not None}
    if not params:
        raise BadInput(
            f"memory: {name!r} holds no array of floats, got {len(leaves)} other leaves. "
            "Save the parameters themselves, or their shapes as tuples."
        )
    if dtype is not None:
        params = {k: jax.ShapeDtypeStruct(leaf.shape, dtype) for k, leaf in params.items()}
    return Found(params, len(chosen) - len(params))


def _load(path: Path) -> Any:
    what, load = _format(path)
    try:
        return load(path)
    except BadInput:
        raise
    except Exception as error:  # a pickle may raise anything, and each format its own
        raise BadInput(
            f"memory: {str(path)!r} cannot be read as {what}, got {type(error).__name__}: {error}. "
            "Write it again, or give it the ending of what it is."
        ) from None


def _format(path: Path) -> tuple[str, Callable[[Path], Any]]:
    if not path.exists():
        raise BadInput(f"memory: --file does not exist, got {str(path)!r}. Check its path.")
    if path.is_dir():
        sharded = any(path.glob("*.safetensors"))
        return ("safetensors files", _shards) if sharded else ("an orbax checkpoint", _orbax)
    if path.suffix not in _FILES:
        raise BadInput(
            f"memory: --file has an unknown ending, got {str(path)!r}. "
            f"Give a file that ends in {', '.join(_FILES)}, or the folder of a checkpoint."
        )
    return _FILES[path.suffix]


def _pickle(path: Path) -> Any:
    with path.open("rb") as file:
        return pickle.load(file)


def _npz(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = [name for name in archive.namelist() if name.endswith(".npy")]
        return {_as_path(name[:-4]): _npy_header(archive, name) for name in members}


def _npy_header(archive: zipfile.ZipFile, name: str) -> jax.ShapeDtypeStruct:
    with archive.open(name) as file:
        major, _ = np.lib.format.read_magic(file)
        header = np.lib.format
        read_header = header.read_array_header_1_0 if major == 1 else header.read_array_header_2_0
        shape, _, dtype = read_header(file)
    # NumPy writes bfloat16, which it does not know, as two bytes without a meaning.
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16 if dtype == np.dtype("V2") else dtype)


def _safetensors(path: Path) -> Any:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if length > path.stat().st_size - _LENGTH:
            raise ValueError(f"a header of {length} bytes in a file of {path.stat().st_size}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        _as_path(name): jax.ShapeDtypeStruct(entry["shape"], _DTYPES.get(entry["dtype"], "int8"))
        for name, entry in header.items()
    }


def _shards(folder: Path) -> Any:
    parts = [_safetensors(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: leaf for part in parts for name, leaf in part.items()}


def _orbax(folder: Path) -> Any:
    import orbax.checkpoint as ocp

    depths = ("_METADATA", "*/_METADATA", "*/*/_METADATA")  # the item, the step, the manager
    items = next((found for depth in depths if (found := sorted(folder.glob(depth)))), [])
    if len(items) != 1:
        names = ", ".join(str(item.parent) for item in items) or "none"
        raise BadInput(
            f"memory: --file must name one orbax checkpoint, got {str(folder)!r} with {names}. "
            "Write the path of the one you mean."
        )
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(items[0].parent.absolute()).item_metadata.tree


_FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    ".npz": ("an .npz archive", _npz),
    ".pickle": ("a pickle", _pickle),
    ".pkl": ("a pickle", _pickle),
    ".safetensors": ("a safetensors file", _safetensors),
}


def _as_path(name: str) -> str:
    """Return a name such as model.layers.0.weight as the path that layouts read."""
    return name.replace(".", "/")


def _is_shape(node: Any) -> bool:
    return type(node) is tuple and all(isinstance(size, int) for size in node)


def _flat(tree: Any) -> dict[str, jax.ShapeDtypeStruct | None]:
    """Return the leaves by path; None for those that are no arrays of floats."""
    keyed, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_shape)
    return {layout.path_str(path): _struct(leaf) for path, leaf in keyed}


def _struct(leaf: Any) -> jax.ShapeDtypeStruct | None:
    if _is_shape(leaf):
        return jax.ShapeDtypeStruct(leaf, jnp.float32)
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None or dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return None
    # What JAX makes of it when it is loaded: float32 of float64, unless x64 is on.
    return jax.ShapeDtypeStruct(tuple(shape), jax.dtypes.canonicalize_dtype(dtype))


def _below(leaves: dict[str, Any], subtree: str | None, name: str) -> dict[str, Any]:
    if subtree is None:
        return leaves
    prefix = subtree.strip("/") + "/"
    chosen = {key[len(prefix) :]: leaf for key, leaf in leaves.items() if key.startswith(prefix)}
    if not chosen:
        tops = sorted({key.partition("/")[0] for key in leaves})
        raise BadInput(
            f"memory: --subtree finds nothing in {name!r}, got {subtree!r}. "
            f"It holds {', '.join(tops[:10])}."
        )
    return chosen
