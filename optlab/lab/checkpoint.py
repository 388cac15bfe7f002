"""Checkpoints of a whole race: written whole or not at all, read whole or refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from optlab.lab.config import BadInput

FOLDER = "checkpoints"
Arrays = dict[str, dict[str, jax.Array]]


def _manager(out: Path) -> ocp.CheckpointManager:
    """Return orbax's manager: it writes beside and renames, then drops the one before."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return ocp.CheckpointManager((out / FOLDER).absolute(), options=options)


def _digest(arrays: Arrays, values: dict[str, Any]) -> str:
    """Return a SHA-256 over every byte saved: storage formats do not notice a changed one."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, leaves in sorted(arrays.items()):
        for key, leaf in sorted(leaves.items()):
            array = np.asarray(leaf)
            digest.update(f"{name} {key} {array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of the race in `out`; only the latest is kept."""

    def __init__(self, out: Path):
        self.folder = out / FOLDER
        self._manager = _manager(out)

    def save(self, arrays: Arrays, values: dict[str, Any]) -> None:
        """Write a checkpoint. A process killed meanwhile leaves the one before."""
        number = (self._manager.latest_step() or 0) + 1
        sealed = {"sha256": _digest(arrays, values), **values}
        self._manager.save(
            number,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays), values=ocp.args.JsonSave(sealed)
            ),
        )

    def read_values(self) -> dict[str, Any]:
        """Return the plain values of the latest checkpoint."""
        number = self._latest()
        try:
            args = ocp.args.Composite(values=ocp.args.JsonRestore())
            values = dict(self._manager.restore(number, args=args)["values"])
            values["config"], values["runners"], values["versions"]
        except Exception as error:
            raise self._corrupt() from error
        return values

    def read_arrays(self, like: Arrays, values: dict[str, Any]) -> Arrays:
        """Return the arrays of the latest checkpoint, in the shapes of `like`."""
        values = dict(values)
        sealed = values.pop("sha256", None)
        try:
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
            args = ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes))
            arrays = self._manager.restore(self._latest(), args=args)["arrays"]
        except Exception as error:
            raise self._corrupt() from error
        if _digest(arrays, values) != sealed:
            raise self._corrupt()
        return arrays

    def exists(self) -> bool:
        """Whether there is a checkpoint to resume."""
        return self._manager.latest_step() is not None

    def close(self) -> None:
        """Release orbax's threads."""
        self._manager.close()

    def _latest(self) -> int:
        number = self._manager.latest_step()
        if number is None:
            raise BadInput(
                f"race: --resume found no checkpoint, got {str(self.folder)!r}. "
                "Start the race without --resume, or name its folder with --out."
            )
        return number

    def _corrupt(self) -> BadInput:
        return BadInput(
            f"race: the checkpoint is corrupt or truncated, got {str(self.folder)!r}. "
            "Delete that folder and start the race again without --resume."
        )
