"""Numbered folders on a disk: each is there whole and sealed, or not there at all.

A folder is written as `7.part`, sealed with the SHA-256 of each of its files, and renamed to `7`;
one that goes is renamed to `7.gone` before its files are deleted. A folder written anew steps
aside as `7.before`, which stands for `7` for as long as there is no other `7`. So a kill between
any two calls of the system leaves every number that is read complete.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SEAL = "sha256.json"
_PART, _BEFORE, _GONE = ".part", ".before", ".gone"
_NUMBER = re.compile(r"0|[1-9][0-9]*")
_LEFT_OVER = re.compile(rf"(\d+)({_PART}|{_BEFORE}|{_GONE})".replace(".", r"\."))


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read as asked; `differences` lists what differs, if any."""

    def __init__(self, message: str, differences: tuple[str, ...] = ()):
        super().__init__(message)
        self.differences = differences


def numbers(root: Path) -> list[int]:
    """Return the numbers that can be read, ascending."""
    names = [path.name.removesuffix(_BEFORE) for path in root.iterdir()] if root.is_dir() else []
    return sorted({int(name) for name in names if _NUMBER.fullmatch(name)})


def locate(root: Path, number: int | None) -> Path:
    """Return the folder of a number, of the last one without a number."""
    there = numbers(root)
    if not there:
        raise CheckpointError(
            f"checkpoint: there is no complete checkpoint, got {str(root)!r} with "
            f"{_names(root)}. Give the folder that save was given."
        )
    wanted = there[-1] if number is None else number
    if wanted not in there:
        raise CheckpointError(
            f"checkpoint: step {wanted} is not in {str(root)!r}, got steps {there}. Ask for one of "
            "them, or leave out step for the last."
        )
    folder = root / str(wanted)
    return folder if folder.exists() else root / f"{wanted}{_BEFORE}"


def _names(root: Path) -> str:
    if not root.is_dir():
        return "no such folder"
    return ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing in it"


def part_of(root: Path, number: int) -> Path:
    """Return the folder in which a number is written."""
    return root / f"{number}{_PART}"


def begin(part: Path, overwrite: bool) -> None:
    """Make the folder to write in, after tidying up what a kill left behind."""
    root, number = part.parent, int(part.stem)
    last = max(numbers(root), default=-1)
    if number < last or (number == last and not overwrite):
        raise CheckpointError(
            f"checkpoint: step must be above the last one saved, {last}, got {number}. Choose "
            "another folder for another run, or pass overwrite=True to replace the last step."
        )
    _tidy(root)
    part.mkdir(parents=True)


def _tidy(root: Path) -> None:
    for path in root.iterdir() if root.is_dir() else ():
        left = _LEFT_OVER.fullmatch(path.name)
        if not left:
            continue
        whole = root / left[1]
        if left[2] == _BEFORE and not whole.exists():
            path.rename(whole)
        else:
            shutil.rmtree(path)


def publish(part: Path, keep: int | None) -> None:
    """Give a written folder its number, and drop all but the last `keep` numbers."""
    root, final = part.parent, part.with_suffix("")
    _seal(part)
    before = root / f"{final.name}{_BEFORE}"
    if final.exists():
        final.rename(before)
    part.rename(final)
    _flush(root)
    shutil.rmtree(before, ignore_errors=True)
    for number in numbers(root)[:-keep] if keep else ():
        _drop(root / str(number))


def _drop(folder: Path) -> None:
    # What another program numbered and did not seal is not ours to delete.
    if (folder / SEAL).is_file():
        gone = folder.with_suffix(_GONE)
        folder.rename(gone)
        shutil.rmtree(gone)


def _seal(folder: Path) -> None:
    (folder / SEAL).write_bytes(_canonical(fingerprints(folder)))
    # All of it is on the disk before the name that promises it is. Twenty files wait for the disk
    # as long as one.
    with ThreadPoolExecutor() as pool:
        list(pool.map(_flush, (folder, *folder.rglob("*"))))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL)


def fingerprints(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but the seal."""
    files = list(_files(folder))
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to the others
        sums = pool.map(_sha256, files)
        return {
            path.relative_to(folder).as_posix(): digest
            for path, digest in zip(files, sums, strict=True)
        }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _canonical(sums: dict[str, str]) -> bytes:
    return json.dumps(sums, indent=1, sort_keys=True).encode()


def check_seal(folder: Path) -> None:
    """Refuse a folder in which any byte differs from what was sealed, and name the files."""
    try:
        sealed = (folder / SEAL).read_bytes()
    except OSError:
        raise CheckpointError(
            f"checkpoint: {str(folder)!r} has no seal, got no {SEAL} in it. It is no checkpoint of "
            f"optlab, or not all of one. {_elsewhere(folder)}"
        ) from None
    there = fingerprints(folder)
    if sealed != _canonical(there):
        differences = tuple(_changes(sealed, there))
        raise CheckpointError(
            f"checkpoint: {str(folder)!r} is corrupt or truncated, got {len(differences)} changes "
            f"since it was sealed:\n  {listed(differences)}\n{_elsewhere(folder)}",
            differences,
        )


def _changes(sealed: bytes, there: dict[str, str]) -> Iterator[str]:
    try:
        wanted = dict(json.loads(sealed))
    except (ValueError, TypeError):
        wanted = {}
    if _canonical(wanted) != sealed:
        yield f"{SEAL}: the seal itself"
        return
    for name in sorted(wanted.keys() | there.keys()):
        if name not in there:
            yield f"{name}: missing"
        elif name not in wanted:
            yield f"{name}: added"
        elif wanted[name] != there[name]:
            yield f"{name}: other bytes"


def _elsewhere(folder: Path) -> str:
    here = int(folder.name.removesuffix(_BEFORE))
    others = [number for number in numbers(folder.parent) if number != here]
    return f"Restore another step, there are {others}." if others else "Restore from a copy."


def listed(lines: tuple[str, ...], most: int = 20) -> str:
    """Join lines, no more than can be read."""
    more = [f"... and {len(lines) - most} more"] * (len(lines) > most)
    return "\n  ".join([*lines[:most], *more])
