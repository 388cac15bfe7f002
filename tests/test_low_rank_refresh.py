"""When a subspace is found anew, which gradients it is found in, and what becomes of the state."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import low_rank as reference
from sharded import QUICK

import optlab
from optlab import layout
from optlab.transforms.subspace import Projector

SVD = optlab.svd_projector()
STACK = layout.stacked("^layers")


def draw(seed, shape=(4, 6)):
    """Return matrices with singular values 1, 1/2, 1/4..."""
    u, _, vt = np.linalg.svd(np.random.default_rng(seed).normal(size=shape), full_matrices=False)
    return ((u * 0.5 ** np.arange(u.shape[-1])) @ vt).astype("f4")


def run(tx, grads, params=None):
    """Return updates and state of every step, by one compiled function."""
    params = grads[0] if params is None else params
    state, out = tx.init(params), []
    update = jax.jit(tx.update).lower(grads[0], state, params).compile(QUICK)
    for g in grads:
        updates, state = update(g, state, params)
        out.append((updates, state))
    return out


def changes(done, bucket=0):
    """Return the steps in which each side's basis became another one."""
    bases = [np.asarray(state.kept[bucket].basis) for _, state in done]
    found = {side: [0] for side in range(len(bases[0]))}
    for t, (old, new) in enumerate(itertools.pairwise(bases), start=1):
        for side, steps in found.items():
            steps += [t] * (not np.array_equal(old[side], new[side]))
    return found


def kernels(seed, count, shape=(4, 6)):
    return {f"{i}/kernel": draw(100 * seed + i, shape) for i in range(count)}


def low_rank(inner=None, **given):
    return optlab.in_low_rank(inner or optax.identity(), **{"projector": SVD, "rank": 2} | given)


def test_all_sides_are_refreshed_at_multiples_of_the_period():
    done = run(low_rank(every=3), [kernels(t, 2) for t in range(8)])
    assert changes(done) == {0: [0, 3, 6], 1: [0, 3, 6]}
    (kept,) = done[-1][1].kept
    np.testing.assert_array_equal(kept.found, [3, 3])
    assert done[-1][1].count == 8


@pytest.mark.parametrize(("every", "spread"), [(8, 2), (4, 1), (2, 0.5)])
def test_staggered_sides_take_turns_once_per_period(every, spread):
    done = run(low_rank(every=every, stagger=True), [kernels(t, 4) for t in range(2 * every)])
    found = changes(done)
    for side, steps in found.items():
        turn = (every - int(side * spread)) % every
        assert steps == sorted({0, turn, turn + every} & set(range(2 * every))), side


def test_stagger_spreads_over_buckets_too():
    trees = [{**kernels(t, 2), "x/kernel": draw(t, (3, 8))} for t in range(6)]
    done = run(low_rank(every=3, stagger=True), trees)
    assert changes(done, 0) == {0: [0, 3], 1: [0, 2, 5]}
    assert changes(done, 1) == {0: [0, 1, 4]}


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_basis_stays_where_the_gradient_is_no_good(bad):
    spoilt = np.full((4, 6), bad, "f4")
    spoilt[1:] = 0 if bad == 0 else 1
    grads = [{"kernel": spoilt if t == 3 else draw(t)} for t in range(7)]
    done = run(low_rank(every=3), grads)
    # The next chance is the next period.
    assert changes(done) == {0: [0, 6]}
    assert done[-1][1].kept[0].found == 2
    assert np.all(np.isfinite(done[-1][0]["kernel"]))


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_a_basis_never_found_is_looked_for_at_every_step(bad):
    grads = [{"kernel": np.full((4, 6), bad, "f4") if t < 2 else draw(t)} for t in range(5)]
    done = run(low_rank(every=10), grads)
    # Coordinates, until there is a gradient.
    np.testing.assert_array_equal(done[1][1].kept[0].basis[0], np.eye(4, 2))
    assert changes(done) == {0: [0, 2]}
    want = reference.singular(2)(grads[2]["kernel"], 0)
    np.testing.assert_allclose(done[4][1].kept[0].basis[0], want, rtol=0, atol=1e-5)


def test_each_matrix_of_a_stack_has_its_own_chances():
    stacks = [np.stack([draw(2 * t), draw(2 * t + 1)]) for t in range(5)]
    stacks[0][0] = 0
    stacks[3][1] = np.inf
    tx = low_rank(every=3, layout=STACK)
    done = run(tx, [{"layers/kernel": x} for x in stacks])
    bases = [np.asarray(state.kept[0].basis[0]) for _, state in done]
    for matrix, found in enumerate(([1, 3], [0])):
        looked = [reference.singular(2)(stacks[t][matrix], 0) for t in found]
        for t in range(5):
            latest = [b for at, b in zip(found, looked, strict=True) if at <= t]
            want = latest[-1] if latest else np.eye(4, 2)
            np.testing.assert_allclose(bases[t][matrix], want, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(done[-1][1].kept[0].found, [[2, 1]])


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize(
    "projector",
    [SVD, optlab.power_projector(), optlab.coordinate_projector(largest=True)],
    ids=["svd", "power", "coordinates"],
)
def test_gradients_whose_squares_leave_float32_have_the_same_subspace(size, projector):
    tx, g = low_rank(projector=projector), draw(0)
    (plain, _), (scaled, _) = (run(tx, [{"kernel": c * g}])[0] for c in (1, np.float32(size)))
    got = np.asarray(scaled["kernel"]) / np.float32(size)
    np.testing.assert_allclose(got, plain["kernel"], rtol=0, atol=1e-5)


def _found(rule, grads, rank=2):
    done = run(low_rank(every=rule, rank=rank), [{"kernel": g} for g in grads])
    counts = [int(state.kept[0].found[0]) for _, state in done]
    return [t for t, n in enumerate(counts) if n > (counts[t - 1] if t else 0)]


def test_intervals_grow_while_the_subspace_stays():
    same = [draw(0)] * 20
    lazy = optlab.lazy_refresh
    # The third refresh has two overlaps behind it; every one after doubles the interval.
    assert _found(lazy(1, queue=2), same) == [0, 1, 2, 4, 8, 16]
    assert _found(lazy(1, queue=3, growth=3.0), same) == [0, 1, 2, 3, 6, 9]
    assert _found(lazy(2, queue=1, growth=1.5), same) == [0, *_by_hand(2, 1.5)]
    assert _found(lazy(3, queue=99), same) == [0, 3, 6, 9, 12, 15, 18]


def _by_hand(interval, growth, last=20):
    """Return refreshes after the first, where every one makes the interval longer."""
    steps, longer = [], 0
    for t in range(1, last):
        if t % int(interval * growth**longer) == 0:
            steps.append(t)
            longer += 1
    return steps


def test_intervals_stay_while_the_subspace_turns():
    first, second = np.eye(4, 6, dtype="f4"), np.eye(4, 6, dtype="f4")
    first[2:], second[:2] = 0, 0
    turning = [first, second] * 5
    assert _found(optlab.lazy_refresh(1, queue=2), turning) == list(range(10))
    # Half of what was: below a threshold, or above it.
    half = second.copy()
    half[0, 0], half[3, 3] = 1, 0
    turning = [first, half] * 5
    assert _found(optlab.lazy_refresh(1, queue=2, threshold=0.6), turning) == list(range(10))
    assert _found(optlab.lazy_refresh(1, queue=2, threshold=0.4), turning) == [0, 1, 2, 4, 8]


def test_the_released_measure_sees_first_vectors_only():
    swapped = [np.diag(d).astype("f4") for d in ([2.0, 1, 0, 0], [1.0, 2, 0, 0])] * 5
    for official, steps in ((False, [0, 1, 2, 4, 8]), (True, list(range(10)))):
        rule = optlab.lazy_refresh(1, queue=2, official=official)
        assert _found(rule, swapped[:10]) == steps
    other = [np.diag(d).astype("f4") for d in ([2.0, 1, 0, 0], [2.0, 0, 1, 0])] * 5
    rule = optlab.lazy_refresh(1, queue=2, threshold=0.9, official=True)
    assert _found(rule, other) == [0, 1, 2, 4, 8]


@dataclasses.dataclass(frozen=True)
class Spun(Projector):
    """The first coordinates, then turned in their own plane at every refresh."""

    def find(self, x, old, rank, key, first):
        del x, key
        c, s = np.cos(0.7), np.sin(0.7)
        turned = jnp.matmul(old, jnp.array([[c, -s], [s, c]], old.dtype))
        return jnp.where(first[..., None, None], old, turned)


def test_rotated_moments_make_the_same_steps_in_whatever_basis_of_the_subspace():
    g = {"kernel": np.random.default_rng(0).normal(size=(4, 6)).astype("f4")}
    grads = [g, jax.tree.map(np.negative, g), g]
    runs = {
        (turn, every): run(
            low_rank(optlab.heavy_ball(0.9), projector=Spun(), on_refresh=turn, every=every), grads
        )
        for turn, every in (("keep", 9), ("keep", 1), ("rotate", 1), ("reset", 1))
    }
    fixed, kept, rotated, reset = (done[-1][0]["kernel"] for done in runs.values())
    np.testing.assert_allclose(rotated, fixed, rtol=0, atol=1e-6)
    assert np.max(np.abs(kept - fixed)) > 0.1
    np.testing.assert_allclose(reset[:2], g["kernel"][:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", ["rows", "cols", "both"])
def test_rotate_turns_first_moments_and_variances(side):
    grads = [{"kernel": draw(t)} for t in range(3)]
    tx = low_rank(optax.scale_by_adam(0.8, 0.9), on_refresh="rotate", every=2, side=side)
    (_, _), (_, before), (_, after) = run(tx, grads)
    mu, nu = (np.asarray(x["kernel"], "f8") for x in (before.inner.mu, before.inner.nu))
    low = grads[2]["kernel"].astype("f8")
    sides = ["rows", "cols"] if side == "both" else [side]
    variance, bases = nu - mu * mu, list(zip(before.kept, after.kept, strict=True))
    for name, (old, new) in zip(sides, bases, strict=True):
        b0, b1 = (np.asarray(k.basis[0], "f8") for k in (old, new))
        c = b1.T @ b0
        assert np.abs(c - np.eye(2)).max() > 0.1
        if name == "rows":
            low, mu, variance = b1.T @ low, c @ mu, (c * c) @ variance
        else:
            low, mu, variance = low @ b1, mu @ c.T, variance @ (c * c).T
    nu = np.abs(variance + mu * mu)
    np.testing.assert_allclose(after.inner.mu["kernel"], 0.8 * mu + 0.2 * low, rtol=0, atol=1e-6)
    np.testing.assert_allclose(after.inner.nu["kernel"], 0.9 * nu + 0.1 * low**2, rtol=0, atol=1e-6)


def test_reset_starts_inner_anew_and_keep_does_not():
    grads = [{"kernel": draw(t), "bias": np.ones(3, "f4")} for t in range(3)]
    for turn, count in (("reset", 1), ("keep", 3)):
        done = run(low_rank(optax.scale_by_adam(), on_refresh=turn, every=2), grads)
        assert [int(state.inner.count) for _, state in done] == [1, 2, count]
        alone = run(low_rank(optax.scale_by_adam()), grads[2:])[0]
        same = np.allclose(done[-1][1].inner.mu["kernel"], alone[1].inner.mu["kernel"], atol=1e-6)
        assert same == (turn == "reset")


def test_a_function_turns_what_it_knows():
    def turn(state, into):
        moments = state.inner._replace(nu=into(state.inner.nu, squares=True))
        return state._replace(inner=moments)

    grads = [{"kernel": draw(t)} for t in range(2)]
    inner = optlab.scale_by_diffgrad()
    (_, before), (_, kept) = run(low_rank(inner, every=1), grads)
    (_, _), (_, turned) = run(low_rank(inner, every=1, on_refresh=turn), grads)
    b0, b1 = (np.asarray(state.kept[0].basis[0], "f8") for state in (before, turned))
    c = b1.T @ b0
    r, nu = b1.T @ grads[1]["kernel"], np.asarray(before.inner.inner.nu["kernel"], "f8")
    want = 0.999 * (c * c) @ nu + 0.001 * r * r
    np.testing.assert_allclose(turned.inner.inner.nu["kernel"], want, rtol=1e-4)
    np.testing.assert_array_equal(turned.inner.inner.mu["kernel"], kept.inner.inner.mu["kernel"])


def test_rotation_leaves_sides_alone_that_are_not_due():
    grads = [kernels(t, 2) for t in range(3)]
    rotated, kept = (
        run(low_rank(optlab.heavy_ball(0.9), on_refresh=turn, every=2, stagger=True), grads)
        for turn in ("rotate", "keep")
    )
    assert changes(rotated) == {0: [0, 2], 1: [0, 1]}
    traces = [done[1][1].inner.trace for done in (rotated, kept)]
    np.testing.assert_array_equal(traces[0]["0/kernel"], traces[1]["0/kernel"])
    assert not np.allclose(traces[0]["1/kernel"], traces[1]["1/kernel"], atol=1e-3)
