"""`watch` writes down true numbers about a step and changes nothing of it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optlab
from optlab import layout
from optlab.state.metrics import metrics
from optlab.testing.sharding import mesh_of
from optlab.transforms import measures
from optlab.transforms.watch import watch

EVERY = [
    measures.gradient_rms,
    measures.update_rms,
    measures.relative_update,
    measures.trust_ratio_min,
    measures.trust_ratio_median,
    measures.trust_ratio_max,
    measures.clip_rate,
    measures.nonfinite_entries,
    measures.orthogonality_error,
]
RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"bias": jnp.asarray(RNG.normal(size=6), jnp.float32)},
    "b": {"kernel": jnp.asarray(RNG.normal(size=(4, 6)), jnp.float32)},
    "c": {"scale": jnp.asarray(RNG.normal(size=4), jnp.float32)},
}
GRADS = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), jnp.float32), PARAMS)


def seen(inner, measure, grads=GRADS, params: Any = PARAMS, **given):
    """Return one number of one step."""
    tx = watch(inner, [measure], **given)
    _, state = tx.update(grads, tx.init(GRADS if params is None else params), params)
    name = getattr(measure, "func", measure).__name__
    return float(metrics(state)[name])


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


def with_kernel(x):
    return {"dense": {"kernel": jnp.asarray(x, jnp.float32)}}


def test_a_watched_step_is_the_step_and_all_numbers_are_there():
    inner = optlab.lamb(0.1)
    tx = watch(inner, EVERY, learning_rate=0.1)
    state, alone = tx.init(PARAMS), inner.init(PARAMS)
    names = {m.__name__ for m in EVERY} | {"learning_rate"}
    assert set(state.values) == names
    assert all(float(x) == 0 for x in state.values.values())
    for _ in range(2):
        got, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        want, alone = jax.jit(inner.update)(GRADS, alone, PARAMS)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    assert names <= metrics(state).keys()
    assert int(state.count) == 2


def test_sizes_are_those_of_numpy():
    rms = lambda tree: np.sqrt(np.mean(flat(tree) ** 2))  # noqa: E731
    half = optax.scale(0.5)
    assert seen(half, measures.gradient_rms) == pytest.approx(rms(GRADS), rel=1e-6)
    assert seen(half, measures.update_rms) == pytest.approx(rms(GRADS) / 2, rel=1e-6)
    want = rms(GRADS) / rms(PARAMS) / 2
    assert seen(half, measures.relative_update) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("size", [1e30, 1e19, 1e-8, 1e-9, 1e-10, 1e-19, 1e-30])
def test_sizes_whose_squares_leave_float32_are_right(size):
    grads = jax.tree.map(lambda g: size * g, GRADS)
    want = size * np.sqrt(np.mean(flat(GRADS) ** 2))
    assert seen(optax.identity(), measures.gradient_rms, grads) == pytest.approx(want, rel=1e-5)
    ratio = seen(optax.identity(), measures.trust_ratio_max, grads) * size
    assert ratio == pytest.approx(seen(optax.identity(), measures.trust_ratio_max), rel=1e-5)


@pytest.mark.parametrize("size", [1e30, 0.0, 1e-30])
def test_the_size_of_a_single_number_is_right_under_jit(size):
    tx, grads = watch(optax.identity()), {"scale": jnp.full((), size)}
    _, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
    assert float(state.values["gradient_rms"]) == pytest.approx(size, rel=1e-5)


def test_sizes_of_nothing_are_zero_and_of_infinity_not_finite():
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    assert seen(optax.identity(), measures.gradient_rms, zeros) == 0
    assert seen(optax.identity(), measures.relative_update, params=zeros) == 0
    broken = jax.tree.map(lambda g: g.at[0].set(jnp.inf), GRADS)
    assert not np.isfinite(seen(optax.identity(), measures.gradient_rms, broken))
    tx = watch(optax.identity(), EVERY)
    _, state = tx.update({}, tx.init({}), {})
    assert all(float(x) == 0 for x in state.values.values())


def ratios(grads, params):
    pairs = zip(*map(jax.tree.leaves, (params, grads)), strict=True)
    return [float(jnp.linalg.norm(p) / jnp.linalg.norm(g)) for p, g in pairs]


@pytest.mark.parametrize("leaves", [("a", "b", "c"), ("a", "b"), ("b",)])
def test_trust_ratios_are_over_leaves(leaves):
    grads, params = ({k: tree[k] for k in leaves} for tree in (GRADS, PARAMS))
    want, one = ratios(grads, params), partial(seen, optax.identity())
    assert one(measures.trust_ratio_min, grads, params) == pytest.approx(min(want), rel=1e-5)
    assert one(measures.trust_ratio_max, grads, params) == pytest.approx(max(want), rel=1e-5)
    median = one(measures.trust_ratio_median, grads, params)
    assert median == pytest.approx(np.median(want), rel=1e-5)


def test_leaves_without_a_ratio_do_not_count():
    kept = {k: GRADS[k] for k in ("b", "c")}, {k: PARAMS[k] for k in ("b", "c")}
    want = ratios(*kept)
    fixed = GRADS | {"a": {"bias": jnp.zeros(6)}}
    fresh = PARAMS | {"a": {"bias": jnp.zeros(6)}}
    missing = GRADS | {"a": {"bias": None}}
    for grads, params in ((fixed, PARAMS), (GRADS, fresh), (missing, PARAMS)):
        for name, of in (("min", min), ("max", max), ("median", np.median)):
            measure = getattr(measures, f"trust_ratio_{name}")
            got = seen(optax.identity(), measure, grads, params)
            assert got == pytest.approx(of(want), rel=1e-5)
    assert seen(optax.identity(), measures.trust_ratio_median, fixed, fresh) > 0
    nothing = jax.tree.map(jnp.zeros_like, GRADS)
    assert seen(optax.identity(), measures.trust_ratio_median, nothing) == 0


def test_clip_rates():
    want = np.mean(np.abs(flat(GRADS)) > 0.5)
    assert 0 < want < 1
    assert seen(optax.clip(0.5), measures.clip_rate) == pytest.approx(want)
    norm = float(optax.tree.norm(GRADS))
    assert seen(optax.clip_by_global_norm(2 * norm), measures.clip_rate) == 0
    assert seen(optax.clip_by_global_norm(norm / 2), measures.clip_rate) == 1


def test_nonfinite_entries_are_counted_on_the_way_in():
    broken = jax.tree.map(lambda g: g.at[0].set(jnp.nan), GRADS)
    tx = optax.chain(optax.zero_nans(), optax.identity())
    # One entry, one row, one entry.
    assert seen(tx, measures.nonfinite_entries, broken) == 1 + 6 + 1
    assert seen(tx, measures.nonfinite_entries) == 0


def planted(values, shape, seed=0):
    """Return a matrix with these singular values."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(k, k)))[0] for k in shape)
    return u[:, : len(values)] @ np.diag(values) @ v[:, : len(values)].T


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_orthogonality_error_is_the_distance_from_the_polar_factor(shape, scale):
    for spread, rel in ((0.0, 0), (0.01, 0.02), (0.2, 0.2)):
        s = 1 + spread * np.array([1.0, -1.0, 0.5, -0.5])
        got = seen(
            optax.identity(), measures.orthogonality_error, with_kernel(scale * planted(s, shape))
        )
        want = np.sqrt(np.mean((s / np.sqrt(np.mean(s**2)) - 1) ** 2))
        assert got == pytest.approx(want, rel=rel, abs=1e-6)


def test_orthogonality_error_is_the_worst_of_all_matrices():
    good, bad = planted(np.ones(4), (4, 6)), planted([2.0, 1, 1, 1], (4, 6), 1)
    alone = seen(optax.identity(), measures.orthogonality_error, with_kernel(bad))
    assert alone > 0.1
    two = {"x": with_kernel(good), "y": with_kernel(bad)}
    assert seen(optax.identity(), measures.orthogonality_error, two) == pytest.approx(alone)
    measure = partial(measures.orthogonality_error, layout=layout.stacked("dense/"))
    both = with_kernel(np.stack([good, bad]))
    assert seen(optax.identity(), measure, both) == pytest.approx(alone, rel=1e-5)


def test_orthogonality_error_without_matrices_is_zero():
    assert seen(optax.identity(), measures.orthogonality_error, {"bias": jnp.ones(3)}) == 0
    assert seen(optax.identity(), measures.orthogonality_error, with_kernel(np.zeros((4, 6)))) == 0


def test_muon_is_nearly_orthogonal_and_an_exact_polar_factor_exactly():
    muon = watch(optlab.orthogonalize(), [measures.orthogonality_error])
    grads = with_kernel(planted([1.0, 0.5, 0.3, 0.2], (4, 6)))
    _, state = muon.update(grads, muon.init(grads), grads)
    got = float(metrics(state)["orthogonality_error"])
    assert 0.01 < got < 0.3
    exact = watch(optlab.orthogonalize(polar="svd"), [measures.orthogonality_error])
    _, state = exact.update(grads, exact.init(grads), grads)
    assert float(metrics(state)["orthogonality_error"]) < 1e-5


def test_the_rate_written_down_is_the_one_used():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    tx = watch(optax.sgd(schedule), [measures.update_rms], learning_rate=schedule)
    grads = {"w": jnp.ones(3)}
    state = tx.init(grads)
    for want in (1.0, 0.9, 0.8):
        _, state = tx.update(grads, state, grads)
        found = metrics(state)
        assert float(found["learning_rate"]) == pytest.approx(want)
        assert float(found["update_rms"]) == pytest.approx(want)


def test_within_multi_steps_it_sees_real_steps():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    tx = optax.MultiSteps(watch(optax.sgd(schedule), learning_rate=schedule), 2)
    state = tx.init(PARAMS)
    for sign in (3.0, -1.0):
        grads = jax.tree.map(lambda g, sign=sign: sign * g, GRADS)
        _, state = tx.update(grads, state, PARAMS)
    found = metrics(state)
    want = np.sqrt(np.mean(flat(GRADS) ** 2))
    assert float(found["gradient_rms"]) == pytest.approx(want, rel=1e-5)
    assert (float(found["learning_rate"]), int(found["count"])) == (1.0, 1)


def test_a_measure_of_your_own():
    def largest_bias(updates, new, params):
        return jnp.max(new["a"]["bias"])

    got = seen(optax.scale(2.0), largest_bias)
    assert got == pytest.approx(2 * float(jnp.max(GRADS["a"]["bias"])))


def spread_over(mesh, tree):
    spec = lambda x: P(*(["model"] if x.ndim == 1 else ["data", "model"]))  # noqa: E731
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), tree)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_a_mesh_the_numbers_are_the_same_and_on_every_device(kind):
    tx = watch(optax.scale(-0.1), EVERY, learning_rate=lambda step: 0.1)
    _, alone = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        params, grads = (spread_over(mesh, tree) for tree in (PARAMS, GRADS))
        state = jax.jit(tx.init)(params)
        _, state = jax.jit(tx.update)(grads, state, params)
    for name, value in state.values.items():
        assert value.sharding.is_fully_replicated
        assert float(value) == pytest.approx(float(alone.values[name]), rel=1e-5), name


def shapeless(updates, new, params):
    return new["a"]["bias"]


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: watch(optax.sgd), TypeError, "inner must be an optax.GradientTransformation"),
        (lambda: watch(optax.sgd(1.0), measures.update_rms), TypeError, "Write \\[optlab.measures"),
        (lambda: watch(optax.sgd(1.0), [lambda g, u, p: 0.0]), TypeError, "Write it with def"),
        (lambda: watch(optax.sgd(1.0), ["update_rms"]), TypeError, "functions with a name"),
        (
            lambda: watch(optax.sgd(1.0), [measures.update_rms] * 2),
            ValueError,
            "Rename one 'update_rms'",
        ),
        (lambda: watch(optax.sgd(1.0), learning_rate=-1.0), ValueError, "learning_rate must be"),
        (lambda: seen(optax.sgd(1.0), shapeless), ValueError, "'shapeless' must return a scalar"),
        (
            lambda: seen(optax.sgd(1.0), measures.relative_update, params=None),
            ValueError,
            "update\\(grads, state, params\\)",
        ),
    ],
)
def test_wrong_calls_name_the_fix(call, kind, says):
    with pytest.raises(kind, match=f"^watch: .*{says}"):
        call()
