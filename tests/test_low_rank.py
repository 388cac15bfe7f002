"""The low-rank recipes against their references: matrices of either side and a vector."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import low_rank as reference
from sharded import QUICK

import optlab
from optlab.transforms.subspace import Projector

SHAPES = {
    "bias": (4,),
    "square/kernel": (7, 7),
    "tall/kernel": (9, 6),
    "wide/kernel": (6, 9),
}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2]
STEPS, RANK, EVERY = 8, 3, 3
# Absolute, on parameters of size 1: roundings, which a basis amplifies by 1/gap of its spectrum.
TOLERANCE = {"float32": 2e-5, "float64": 1e-11}


def spectral(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return a random matrix with singular values 3 0.7^i: its vectors are well conditioned."""
    x = np.random.default_rng(seed).normal(size=shape)
    if x.ndim == 2:
        u, s, v = np.linalg.svd(x, full_matrices=False)
        x = (u * 3 * 0.7 ** np.arange(len(s))) @ v
    return np.asarray(x, "f4").astype("f8")


PARAMS = {name: spectral(0, shape) for name, shape in SHAPES.items()}
GRADS = [{name: spectral(t + 1, shape) for name, shape in SHAPES.items()} for t in range(STEPS)]

ADAM = {"b1": 0.8, "b2": 0.95, "eps": 1e-2}
SVD = {"rank": RANK, "projector": optlab.svd_projector()}
singular = reference.every(EVERY, reference.singular(RANK))
whole = reference.every(STEPS, lambda g, t: np.eye(len(g)))


@dataclasses.dataclass(frozen=True)
class FirstColumns(Projector):
    """The first columns of the gradient: in the place of random numbers, and no projection."""

    def find(self, x, old, rank, key, first):
        del old, key, first
        return x[..., :rank]


def first_columns(g, t):
    del t
    return g[:, :RANK] / np.max(np.abs(g))


def largest_rows(g, t):
    """Return the coordinates of a quarter of the rows, those with the largest norms."""
    del t
    chosen = np.argsort(-np.linalg.norm(g, axis=1))[: round(0.25 * len(g))]
    return np.eye(len(g))[:, np.sort(chosen)]


@dataclasses.dataclass(frozen=True)
class Row:
    """A recipe beside the reference of a matrix; `theirs` is made anew, it may remember."""

    ours: Callable[..., Any]
    theirs: Callable[[], Callable[..., list]]
    alone: Callable[..., list] = reference.galore  # what vectors get
    side: str = "short"
    tolerance: float = TOLERANCE["float64"]


def _fira(inside):
    def make():
        rest = reference.scaled_rest(inside, limit=reference.growth_limit(1.01))
        return functools.partial(reference.galore, find=singular, scale=0.25, rest=rest)

    return make


def _apollo(per):
    def make():
        limit, full = reference.growth_limit(1.01), reference.scaled_rest(0, per=per)
        rest = lambda *arrays: 2 * limit(full(*arrays))  # noqa: E731
        find = reference.every(EVERY, first_columns)
        return functools.partial(reference.galore, find=find, scale=0, rest=rest)

    return make


def _lazy():
    find = lambda g, t: reference.rounded(reference.singular(RANK)(g, t), 4, 8)  # noqa: E731
    lazy = reference.lazily(2, find, queue=2, threshold=0.4, growth=2)
    return functools.partial(reference.adam, find=lazy, scale=0.25)


def _plain(fn, **arguments):
    return lambda: functools.partial(fn, **arguments)


_svd = functools.partial(functools.partial, **SVD, every=EVERY)
_apollo_row = functools.partial(
    functools.partial, optlab.apollo, rank=RANK, every=EVERY, scale=4.0, projector=FirstColumns()
)
_exact = optlab.power_projector(1, oversample=0, start="svd")
_turning = {"rank": RANK, "rho": 0.6}
_lazily = {
    "every": optlab.lazy_refresh(2, threshold=0.4, queue=2),
    "scale": 0.25,
    "block": 8,
}
ROWS = {
    "galore": Row(
        _svd(optlab.galore, scale=0.25), _plain(reference.galore, find=singular, scale=0.25)
    ),
    "fira": Row(_svd(optlab.fira, scale=0.25), _fira(1.0)),
    "fira-official": Row(_svd(optlab.fira, scale=0.25, official=True), _fira(0.25)),
    "apollo": Row(_apollo_row(), _apollo("column")),
    "apollo-matrix": Row(_apollo_row(per="matrix"), _apollo("matrix")),
    "conda": Row(
        functools.partial(optlab.conda, projector=optlab.svd_projector(), every=EVERY, scale=0.25),
        lambda: (
            lambda p, *rest, **given: reference.conda(
                p, *rest, reference.every(EVERY, reference.singular(len(p))), scale=0.25, **given
            )
        ),
    ),
    "frugal-directions": Row(
        _svd(optlab.frugal, side="short", factor=0.5),
        _plain(reference.frugal, find=singular, factor=0.5),
        reference.adam,
    ),
    "frugal-inputs": Row(
        functools.partial(
            optlab.frugal, every=EVERY, projector=optlab.coordinate_projector(largest=True)
        ),
        _plain(reference.frugal, find=reference.every(EVERY, largest_rows), factor=1.0),
        reference.adam,
        "rows",
    ),
    # Codes are found, and scales kept, in float32.
    "q_galore": Row(_svd(optlab.q_galore, **_lazily), _lazy, reference.adam, tolerance=2e-6),
    "ldadam": Row(
        functools.partial(optlab.ldadam, projector=_exact, **_turning),
        _plain(reference.ldadam, feedback=True, **_turning),
        reference.adam,
    ),
    "ldadam-forgetful": Row(
        functools.partial(optlab.ldadam, projector=_exact, error_feedback=False, **_turning),
        _plain(reference.ldadam, feedback=False, **_turning),
        reference.adam,
    ),
}


def ours(tx, dtype):
    """Return the parameters after every step of one compiled function."""

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    cast = lambda tree: {k: jnp.asarray(x, dtype) for k, x in tree.items()}  # noqa: E731
    params, out = cast(PARAMS), []
    state = jax.jit(tx.init)(params)
    step = jax.jit(step).lower(params, state, params).compile(QUICK)
    for grads in GRADS:
        params, state = step(cast(grads), state, params)
        out.append(params)
    return out


def theirs(row, rates, decay):
    """Return the same by the reference, leaf by leaf, each with its projected side first."""
    columns = {}
    for name, p in PARAMS.items():
        matrix = p.ndim == 2
        turn = matrix and row.side == "short" and p.shape[0] > p.shape[1]
        view = (lambda x: x.T) if turn else (lambda x: x) if matrix else (lambda x: x[:, None])
        run = row.theirs() if matrix else functools.partial(row.alone, find=whole, scale=1.0)
        gs = [view(g[name]) for g in GRADS]
        found = run(view(p), gs, rates, weight_decay=decay[name], **ADAM)
        columns[name] = [x.T if turn else x.reshape(p.shape) for x in found]
    return [{name: column[t] for name, column in columns.items()} for t in range(STEPS)]


def compare(found, expected, dtype, tolerance):
    """Hold every leaf of every step to the reference."""
    for t, (got, want) in enumerate(zip(found, expected, strict=True)):
        for name in PARAMS:
            assert got[name].dtype == dtype
            np.testing.assert_allclose(
                got[name], want[name], rtol=0, atol=tolerance, err_msg=f"{name}, step {t}"
            )
    moved = {name: np.abs(expected[-1][name] - x).max() for name, x in PARAMS.items()}
    assert min(moved.values()) > 1e-2, moved


@pytest.mark.parametrize("name", ROWS)
def test_recipe_follows_its_reference_in_float32(name):
    row = ROWS[name]
    tx = row.ours(0.1, weight_decay=0.3, **ADAM)
    expected = theirs(row, [0.1] * STEPS, dict.fromkeys(PARAMS, 0.3))
    compare(ours(tx, "float32"), expected, "float32", TOLERANCE["float32"])


@pytest.mark.parametrize("name", ROWS)
def test_recipe_follows_its_reference_in_float64_under_a_schedule_and_a_decay_mask(name):
    row, decay = ROWS[name], {key: 0.3 * (key != "wide/kernel") for key in PARAMS}
    mask = {key: rate > 0 for key, rate in decay.items()}
    rate = lambda t: 0.1 / (1 + t)  # noqa: E731
    tx = row.ours(rate, weight_decay=0.3, weight_decay_mask=mask, **ADAM)
    with jax.enable_x64(True):
        found = ours(tx, "float64")
    compare(found, theirs(row, [rate(t) for t in range(STEPS)], decay), "float64", row.tolerance)
