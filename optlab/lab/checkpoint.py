"""Checkpoints of a whole race, in words of its command line."""

import shutil
from pathlib import Path
from typing import Any

from optlab import checkpoint
from optlab.lab.config import BadInput

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of the race in `out`, numbered from 1, of which only the last is kept."""

    def __init__(self, out: Path):
        self.folder = (out / FOLDER).absolute()

    def save(self, arrays: Any, values: dict[str, Any]) -> None:
        """Write a checkpoint and drop the one before."""
        number = max(checkpoint.steps(self.folder), default=0) + 1
        checkpoint.save(self.folder, arrays, step=number, values=values, keep=1)

    def read_values(self) -> dict[str, Any]:
        """Return the plain values of the last checkpoint, after a look at every byte of it."""
        if not self.exists():
            raise BadInput(
                f"race: --resume found no checkpoint, got {str(self.folder)!r}. "
                "Start the race without --resume, or name its folder with --out."
            )
        try:
            return checkpoint.read(self.folder).values
        except checkpoint.CheckpointError:
            latest = self.folder / str(checkpoint.steps(self.folder)[-1])
            raise BadInput(
                f"race: the checkpoint is corrupt or truncated, got {str(latest)!r}. "
                "Delete that folder and start the race again without --resume."
            ) from None

    def read_arrays(self, like: Any) -> Any:
        """Return the arrays of the last checkpoint, where those of `like` are."""
        try:
            return checkpoint.restore(self.folder, like)
        except checkpoint.CheckpointError as error:
            raise BadInput(
                "race: the checkpoint holds other arrays than these optimizers have now, got "
                f"{str(self.folder)!r} with {', '.join(error.differences[:1])}. "
                "Another version wrote it: resume with that one."
            ) from None

    def clear(self) -> None:
        """Drop what an earlier race left."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def exists(self) -> bool:
        """Whether there is a checkpoint to resume."""
        return bool(checkpoint.steps(self.folder))
