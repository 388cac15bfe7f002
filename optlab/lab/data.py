"""What is learned: bytes read once, kept on the device, cut into batches inside jit."""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optlab.lab import config as configs
from optlab.lab.config import BadInput, Config

# 8 MiB are eight times what the quick race reads. What is left out is not source code to learn
# from: tests, installed packages, and tables of character codes and help texts.
STANDARD_LIBRARY_BYTES = 8 * 2**20
_LEFT_OUT = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"]
)
HELD_OUT_SHARE = 0.05


IMAGE_BYTES = 65  # 8 x 8 greys from 0 to 16, and the digit
HELD_OUT_IMAGES = 599  # a third


class Corpus(NamedTuple):
    """Training data and held-out batches, uint8.

    Of a text, bytes (n,) and windows (batches, batch_size, context + 1); of images, rows of 64
    greys and a label, (n, 65) and (batches, batch_size, 65).
    """

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


def digits() -> bytes:
    """Return scikit-learn's handwritten digits, in an order that no one chose."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise BadInput(
            "race: this workload needs scikit-learn, got an environment without. "
            'Run: pip install "optlab[race]"'
        ) from None
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    rows = np.column_stack([images, labels]).astype(np.uint8)
    # Knuth's multiplicative hash: no version of NumPy draws it otherwise.
    order = np.argsort(np.arange(len(rows), dtype=np.uint64) * 2654435761 % 2**32)
    return rows[order].tobytes()


def read(workload: str, path: str | None) -> bytes:
    """Return what a workload learns, as bytes."""
    return read_text(path) if configs.workload(workload).own_text else digits()


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


def describe(config: Config) -> str:
    """Return what a figure or a summary calls this text, or these images."""
    return describe_text(config.text) if config.work.own_text else "handwritten digits"


def describe_text(path: str | None) -> str:
    """Return what a figure or a summary calls this text."""
    if path is None:
        return f"the Python {sysconfig.get_python_version()} standard library"
    return Path(path).name


def make_corpus(text: bytes, config: Config) -> Corpus:
    """Put it on the device: of a text all but its last twentieth to train on, of images two thirds.

    The rest is held out.
    """
    if not config.work.own_text:
        return _split_images(np.frombuffer(text, np.uint8).reshape(-1, IMAGE_BYTES), config)
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


def _split_images(rows: np.ndarray, config: Config) -> Corpus:
    batches = max(1, config.eval_windows // config.batch_size)
    held_out = rows[-HELD_OUT_IMAGES:][: batches * config.batch_size]
    return Corpus(
        jnp.asarray(rows[:-HELD_OUT_IMAGES]),
        jnp.asarray(held_out.reshape(batches, config.batch_size, IMAGE_BYTES)),
    )


def _windows(held_out: np.ndarray, config: Config) -> np.ndarray:
    """Cut evenly spaced windows, the same for every optimizer and every evaluation."""
    window = config.context + 1
    batches = max(1, config.eval_windows // config.batch_size)
    starts = np.linspace(0, len(held_out) - window, batches * config.batch_size).astype(int)
    windows = held_out[starts[:, None] + np.arange(window)]
    return windows.reshape(batches, config.batch_size, window)


def batch(train: jax.Array, seed: ArrayLike, step: jax.Array, config: Config) -> jax.Array:
    """Return the windows (batch_size, context + 1) of one step, or its images (batch_size, 65).

    The key depends on (seed, step) alone, so every optimizer sees the same batches and a resumed
    race goes on with the batch it would have had.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    if not config.work.own_text:
        return train[jax.random.randint(key, (config.batch_size,), 0, len(train))]
    window = config.context + 1
    starts = jax.random.randint(key, (config.batch_size,), 0, train.size - window + 1)
    return jax.vmap(lambda start: jax.lax.dynamic_slice(train, (start,), (window,)))(starts)
