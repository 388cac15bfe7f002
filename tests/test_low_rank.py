"""The low-rank recipes against their references, and the identities of `in_low_rank`."""

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
from stepping import steps

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


@pytest.mark.parametrize("name", [name for name in ROWS if "ldadam" not in name])
def test_recipe_follows_its_reference_in_float64_under_a_schedule_and_a_decay_mask(name):
    row, decay = ROWS[name], {key: 0.3 * (key != "wide/kernel") for key in PARAMS}
    mask = {key: rate > 0 for key, rate in decay.items()}
    rate = lambda t: 0.1 / (1 + t)  # noqa: E731
    tx = row.ours(rate, weight_decay=0.3, weight_decay_mask=mask, **ADAM)
    with jax.enable_x64(True):
        found = ours(tx, "float64")
    compare(found, theirs(row, [rate(t) for t in range(STEPS)], decay), "float64", row.tolerance)


def coordinates(**given):
    """Return the shapes of what inner sees, without running anything."""
    tx = optlab.in_low_rank(optax.trace(0.9), **given)
    state = jax.eval_shape(tx.init, {key: jnp.asarray(x, "f4") for key, x in PARAMS.items()})
    return [state.inner.trace[key].shape for key in MATRICES]


BY_TREE = {"bias": 1, "square/kernel": 2, "tall/kernel": None, "wide/kernel": "full"}


@pytest.mark.parametrize(
    ("given", "square", "tall", "wide"),
    [
        ({"rank": 2}, (2, 7), (9, 2), (2, 9)),
        ({"rank": 6}, (6, 7), (9, 6), (6, 9)),
        ({"rank": 0.5}, (4, 7), (9, 3), (3, 9)),  # halves to even
        ({"rank": 0.01}, (1, 7), (9, 1), (1, 9)),
        ({"rank": "full"}, (7, 7), (9, 6), (6, 9)),
        ({"rank": None}, (7, 7), (9, 6), (6, 9)),
        ({"rank": lambda path, leaf: len(path) % 3 + leaf.ndim}, (3, 7), (9, 4), (4, 9)),
        ({"rank": BY_TREE}, (2, 7), (9, 6), (6, 9)),
        ({"rank": 2, "side": "long"}, (7, 2), (2, 6), (6, 2)),
        ({"rank": 0.5, "side": "long"}, (7, 4), (4, 6), (6, 4)),
        ({"rank": 6, "side": "long"}, (7, 6), (9, 6), (6, 9)),
        ({"rank": 2, "side": "rows"}, (2, 7), (2, 6), (2, 9)),
        ({"rank": 2, "side": "cols"}, (7, 2), (9, 2), (6, 2)),
        ({"rank": 2, "side": "both"}, (2, 2), (2, 2), (2, 2)),
        ({"rank": 0.4, "side": "both"}, (3, 3), (4, 2), (2, 4)),
        ({"rank": 2, "side": lambda m, n: "rows" if m > n else "cols"}, (7, 2), (2, 6), (6, 2)),
    ],
)
def test_rank_and_side_say_what_shape_coordinates_have(given, square, tall, wide):
    assert coordinates(**given) == [square, tall, wide]


def test_a_rank_as_large_as_the_matrix_leaves_inner_as_it_is():
    inner = optlab.heavy_ball(0.9)
    params, grads = ({k: jnp.asarray(x, "f4") for k, x in t.items()} for t in (PARAMS, GRADS[0]))
    compiled = lambda tx: optax.GradientTransformation(tx.init, jax.jit(tx.update))  # noqa: E731
    alone = steps(compiled(inner), [grads, params], params)
    for rank, equal in ((6, {"bias", "tall/kernel", "wide/kernel"}), (7, set(SHAPES))):
        low = compiled(optlab.in_low_rank(inner, rank=rank, every=1))
        found = steps(low, [grads, params], params)
        for got, want in zip(found, alone, strict=True):
            same = {key for key in SHAPES if np.array_equal(got[key], want[key])}
            assert same == equal
    assert optlab.in_low_rank(inner, rank=7).init(params).kept == ()


@pytest.mark.parametrize("side", ["short", "long", "both"])
@pytest.mark.parametrize("name", MATRICES)
def test_descent_on_coordinates_is_the_gradient_projected(name, side):
    tx = optlab.in_low_rank(
        optax.identity(), optlab.svd_projector(), rank=2, side=side, scale=0.5, every=9
    )
    params = {name: jnp.asarray(PARAMS[name], "f4")}
    state = tx.init(params)
    (m, n), first = SHAPES[name], GRADS[0][name]
    u, _, vt = np.linalg.svd(first)
    left, right = u[:, :2] @ u[:, :2].T, vt[:2].T @ vt[:2]
    rows = side == "both" or (m <= n) == (side == "short")
    cols = side == "both" or not rows
    # The second gradient is projected on the subspace of the first.
    for g in (first, GRADS[1][name]):
        updates, state = tx.update({name: jnp.asarray(g, "f4")}, state)
        want = 0.5 * (left if rows else np.eye(m)) @ g @ (right if cols else np.eye(n))
        np.testing.assert_allclose(updates[name], want, rtol=0, atol=1e-5)


def test_updates_lie_in_the_subspace_whatever_inner_makes_of_coordinates():
    params, grads = ({k: jnp.asarray(x, "f4") for k, x in t.items()} for t in (PARAMS, GRADS[0]))
    tx = optlab.in_low_rank(optlab.apply_kappa(), rank=2)
    updates, state = tx.update(grads, tx.init(params), params)
    for (side, other), places in {(7, 7): {"square": 0}, (6, 9): {"tall": 0, "wide": 1}}.items():
        (kept,) = (k for k in state.kept if k.basis.shape[1] == side)
        for name, place in places.items():
            basis, u = kept.basis[place], updates[f"{name}/kernel"]
            u = u.T if name == "tall" else u
            assert u.shape == (side, other)
            assert np.linalg.matrix_rank(u, tol=1e-5) == 2
            np.testing.assert_allclose(basis @ (basis.T @ u), u, rtol=0, atol=1e-5)
            np.testing.assert_allclose(np.abs(basis.T @ u), 1, rtol=0, atol=1e-5)


def test_inner_sees_parameters_and_named_arguments_in_coordinates():
    key, svd = "wide/kernel", optlab.svd_projector()
    params, grads = ({key: jnp.asarray(t[key], "f4")} for t in (PARAMS, GRADS[0]))
    basis = reference.singular(2)(GRADS[0][key], 0)
    project = basis @ basis.T
    tx = optlab.in_low_rank(optax.add_decayed_weights(0.5), svd, rank=2)
    updates, _ = tx.update(grads, tx.init(params), params)
    want = project @ (GRADS[0][key] + 0.5 * PARAMS[key])
    np.testing.assert_allclose(updates[key], want, rtol=0, atol=1e-5)

    inner = optlab.scale_by_raw_gradient(0.75, eps=0.0)
    tx = optlab.in_low_rank(inner, svd, rank=2, project=("raw_gradient",))
    updates, _ = tx.update(grads, tx.init(params), params, raw_gradient=grads)
    # r/(|r|/2) = 2 sign(r)
    want = 2 * basis @ np.sign(basis.T @ GRADS[0][key])
    np.testing.assert_allclose(updates[key], want, rtol=0, atol=1e-5)


def test_one_subspace_of_the_long_side_is_optax_galore():
    ours = optlab.in_low_rank(
        optax.scale_by_adam(), optlab.svd_projector(), rank=RANK, side="long", scale=0.25, every=99
    )
    theirs = optax.contrib.scale_by_galore(
        RANK, update_proj_gap=99, scale=0.25, base_optimizer=optax.scale_by_adam()
    )
    grads = [{key: jnp.asarray(g[key], "f4") for key in ("tall/kernel",)} for g in GRADS[:4]]
    for got, want in zip(steps(ours, grads, grads[0]), steps(theirs, grads, grads[0]), strict=True):
        np.testing.assert_allclose(got["tall/kernel"], want["tall/kernel"], rtol=0, atol=1e-5)
