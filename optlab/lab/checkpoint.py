"""Checkpoints of a whole race: written whole or not at all, read whole or refused."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from optlab.lab.config import BadInput

FOLDER = "checkpoints"
ARRAYS, VALUES, SEAL = "arrays", "values.json", "sha256.json"
Arrays = dict[str, dict[str, jax.Array]]


def _fingerprints(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but the seal."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _shapes(arrays: Arrays) -> dict[str, dict[str, str]]:
    """Return what orbax must find: a string such as float32[3,4] for each array."""
    return {
        name: {key: f"{leaf.dtype}{list(leaf.shape)}" for key, leaf in leaves.items()}
        for name, leaves in arrays.items()
    }


class Checkpoints:
    """The checkpoints of the race in `out`, numbered folders of which only the last is kept.

    A checkpoint is written under another name, sealed with the SHA-256 of each of its files, and
    renamed. Whenever the process is killed, the last numbered folder is whole. A reader checks the
    seal first: neither orbax nor JSON notices every changed byte.
    """

    def __init__(self, out: Path):
        self.folder = (out / FOLDER).absolute()

    def save(self, arrays: Arrays, values: dict[str, Any]) -> None:
        """Write a checkpoint and drop the one before."""
        earlier = self._numbers()
        number = max(earlier, default=0) + 1
        part = self.folder / f"{number}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(part / ARRAYS, arrays)
        text = json.dumps({"shapes": _shapes(arrays), **values}, allow_nan=False)
        (part / VALUES).write_text(text)
        (part / SEAL).write_text(json.dumps(_fingerprints(part)))
        part.rename(self.folder / str(number))
        for old in earlier:
            shutil.rmtree(self.folder / str(old))

    def read_values(self) -> dict[str, Any]:
        """Return the plain values of the last checkpoint, after a look at every byte of it."""
        latest = self._latest()
        try:
            seal = json.loads((latest / SEAL).read_bytes())
        except (OSError, ValueError):
            raise self._corrupt() from None
        if seal != _fingerprints(latest):
            raise self._corrupt()
        return json.loads((latest / VALUES).read_bytes())

    def read_arrays(self, like: Arrays, values: dict[str, Any]) -> Arrays:
        """Return the arrays of the last checkpoint, whose values are `values`."""
        if values["shapes"] != _shapes(like):
            raise BadInput(
                "race: the checkpoint holds other arrays than these optimizers have now, got "
                f"{str(self.folder)!r}. Another version wrote it: resume with that one."
            )
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(self._latest() / ARRAYS, shapes)

    def clear(self) -> None:
        """Drop what an earlier race left."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def exists(self) -> bool:
        """Whether there is a checkpoint to resume."""
        return bool(self._numbers())

    def _numbers(self) -> list[int]:
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        return [int(path.name) for path in folders if path.name.isdigit()]

    def _latest(self) -> Path:
        if not self.exists():
            raise BadInput(
                f"race: --resume found no checkpoint, got {str(self.folder)!r}. "
                "Start the race without --resume, or name its folder with --out."
            )
        return self.folder / str(max(self._numbers()))

    def _corrupt(self) -> BadInput:
        return BadInput(
            f"race: the checkpoint is corrupt or truncated, got {str(self._latest())!r}. "
            "Delete that folder and start the race again without --resume."
        )
