"""Real gradients, of the race's model, and matrices of other sizes with spectra like theirs."""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from optlab.lab import config, data, model, train

SEED = 0
LEARNING_RATE = 3e-3
KERNELS = ("query", "value", "up", "down")
BLOCK = 1

Gradients = dict[tuple[int, str], np.ndarray]


def race_gradients(wanted: Iterable[int]) -> Gradients:
    """Train the race's quick model with AdamW; return gradients of a block's kernels, by step."""
    sizes = config.preset("quick")
    setup = config.Config(
        **sizes,
        preset="quick",
        workload="gpt",
        optimizers=("adamw",),
        learning_rates={"adamw": LEARNING_RATE},
        schedule="wsd",
        text=None,
        text_sha256="",
        seed=SEED,
    )
    problem = train.make_problem(setup, data.read_text(None))
    tx, params, found = optax.adamw(LEARNING_RATE), problem.params, {}
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, at: jax.Array) -> tuple[Any, Any, Any]:
        windows = data.batch(problem.corpus.train, SEED, at, setup)
        grads = jax.grad(lambda p: model.loss(problem.structure, p, windows))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    wanted = set(wanted)
    for at in range(max(wanted) + 1):
        params, state, grads = step(params, state, np.int32(at))
        if at in wanted:
            found |= {(at, name): x for name, x in _kernels(grads)}
    return found


def _kernels(grads: Any) -> Iterator[tuple[str, np.ndarray]]:
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        path = jax.tree_util.keystr(key_path)
        name = next((name for name in KERNELS if f"'{name}'" in path), None)
        if name and f"[{BLOCK}]" in path:
            yield name, np.asarray(leaf).reshape(leaf.shape[0], -1)


def left(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return left singular vectors and singular values, the short side first, in float64."""
    x = x if x.shape[0] <= x.shape[1] else x.T
    return np.linalg.svd(x.astype(np.float64), full_matrices=False)[:2]


def random_basis(rows: int, cols: int) -> np.ndarray:
    """Return orthonormal columns, the same every time."""
    return np.linalg.qr(np.random.default_rng(SEED).normal(size=(rows, cols)))[0]


def stretched(values: np.ndarray, size: int) -> np.ndarray:
    """Return a spectrum as that of a matrix of more rows: log s over the place, interpolated."""
    places = np.linspace(0, 1, len(values))
    logs = np.log(np.maximum(values / values[0], 1e-7))
    return np.exp(np.interp(np.linspace(0, 1, size), places, logs))


def turned(u: np.ndarray, rank: int, share: float) -> np.ndarray:
    """Return a basis with this share of every direction in the subspace of u's first vectors."""
    rest = u[:, rank:] @ random_basis(u.shape[1] - rank, rank)
    return np.sqrt(share) * u[:, :rank] + np.sqrt(1 - share) * rest
