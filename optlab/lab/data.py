"""The text: bytes read once, kept on the device, cut into batches inside jit."""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optlab.lab.config import BadInput, Config

# 8 MiB are eight times what the quick race reads. What is left out is not source code to learn
# from: tests, installed packages, and tables of character codes and help texts.
STANDARD_LIBRARY_BYTES = 8 * 2**20
_LEFT_OUT = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"]
)
HELD_OUT_SHARE = 0.05


class Corpus(NamedTuple):
    """Training bytes (n,) uint8 and held-out windows (batches, batch_size, context + 1) uint8."""

    train: jax.Array
    held_out: jax.Array


def standard_library() -> bytes:
    """Return the source code of the running Python's standard library, the same every time."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    files = [path for path in files if not _LEFT_OUT.intersection(path.parts)]
    pieces, total = [], 0
    for path in sorted(files, key=lambda path: path.as_posix()):
        pieces.append((root / path).read_bytes())
        total += len(pieces[-1])
        if total >= STANDARD_LIBRARY_BYTES:
            break
    return b"".join(pieces)[:STANDARD_LIBRARY_BYTES]


def read_text(path: str | None) -> bytes:
    """Return the bytes of a file, or of the standard library when there is no path."""
    if path is None:
        return standard_library()
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise BadInput(
            f"race: --text cannot be read ({error.strerror}), got {path!r}. Give a readable file."
        ) from None
    if not text:
        raise BadInput(f"race: --text is empty, got {path!r}. Give a file with some text in it.")
    return text


def fingerprint(text: bytes) -> str:
    """Return the SHA-256 of the text: a resumed race must read the same one."""
    return hashlib.sha256(text).hexdigest()


def describe_text(path: str | None) -> str:
    """Return what a figure or a summary calls this text."""
    if path is None:
        return f"the Python {sysconfig.get_python_version()} standard library"
    return Path(path).name


def make_corpus(text: bytes, config: Config) -> Corpus:
    """Put the text on the device: all but its last twentieth to train on, the rest held out."""
    held = int(len(text) * HELD_OUT_SHARE)
    window = config.context + 1
    if held < window:
        least = int(np.ceil(window / HELD_OUT_SHARE))
        raise BadInput(
            f"race: --text is too short, got {len(text)} bytes. A context of {config.context} "
            f"needs at least {least} bytes: give a longer text or a smaller --context."
        )
    data = np.frombuffer(text, np.uint8)
    return Corpus(jnp.asarray(data[:-held]), jnp.asarray(_windows(data[-held:], config)))


def _windows(held_out: np.ndarray, config: Config) -> np.ndarray:
    """Cut evenly spaced windows, the same for every optimizer and every evaluation."""
    window = config.context + 1
    batches = max(1, config.eval_windows // config.batch_size)
    starts = np.linspace(0, len(held_out) - window, batches * config.batch_size).astype(int)
    windows = held_out[starts[:, None] + np.arange(window)]
    return windows.reshape(batches, config.batch_size, window)


def batch(train: jax.Array, seed: int, step: jax.Array, config: Config) -> jax.Array:
    """Return the windows (batch_size, context + 1) of one step.

    The key depends on (seed, step) alone, so every optimizer sees the same batches and a resumed
    race goes on with the batch it would have had.
    """
    window = config.context + 1
    key = jax.random.fold_in(jax.random.key(seed), step)
    starts = jax.random.randint(key, (config.batch_size,), 0, train.size - window + 1)
    return jax.vmap(lambda start: jax.lax.dynamic_slice(train, (start,), (window,)))(starts)
