"""SPAM and Stable-SPAM: their references, identities, and what spikes do to them."""

import functools

import jax
import jax.numpy as jnp
import mesh_problem
import numpy as np
import optax
import pytest
import reference.stable as reference
from jax.sharding import AxisType
from stepping import flat, steps

import optlab
from optlab import layout
from optlab.recipes.stable import spam, stable_spam
from optlab.testing.case import random_like
from optlab.transforms.reset import MOMENTS, reset_moments
from optlab.transforms.spam import scale_by_spam
from optlab.transforms.spikes import clip_spikes, normalize_gradient_norm

SHAPES = {"conv": (2, 3, 4), "kernel": (5, 4), "bias": (6,), "scalar": ()}
STEPS, RATE = 11, 0.1
# Absolute, on parameters of size 1 to 3: about twenty roundings.
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}


def _draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


PARAMS, GRADS = _draw(0), [_draw(t + 1) for t in range(STEPS)]
GRADS[5]["kernel"][1, 2] = 40.0
SMALL = random_like({"kernel": (3, 4), "bias": (4,)}, seed=0)
SMALL_GRADS = [random_like(SMALL, seed=t + 1) for t in range(7)]


def _falling(step):
    return 1 - 0.03 * step


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("ours", "theirs", "given"),
    [
        (spam, reference.spam, {"threshold": 3.0, "every": 4, "warmup": 2}),
        (
            spam,
            reference.spam,
            {"threshold": 2.0, "every": 5, "warmup": 9, "restart_counts": True}
            | {"weight_decay": 0.1, "grace": 2, "b1": 0.5, "b2": 0.9, "eps": 1e-3},
        ),
        (
            spam,
            reference.spam,
            {"threshold": 2.0, "every": 4, "warmup": 3, "grace": 2}
            | {"weight_decay": 0.1, "official": True, "eps": 1e-2},
        ),
        (stable_spam, reference.stable_spam, {"every": 4, "weight_decay": 0.1}),
        (
            stable_spam,
            reference.stable_spam,
            {"every": 3, "max_decay": 0.5, "norm_decay": 0.5, "square_decay": 0.6, "b1": 0.4}
            | {"b2": 0.8, "eps": 1e-3, "momentum_scale": _falling},
        ),
        (
            stable_spam,
            reference.stable_spam,
            {"every": 4, "max_decay": 0.9, "official": True, "momentum_scale": _falling},
        ),
    ],
)
def test_the_recipes_follow_their_references(ours, theirs, given, dtype):
    with jax.enable_x64(dtype == "float64"):
        params = {k: jnp.asarray(x, dtype) for k, x in PARAMS.items()}
        tx = ours(RATE, **given)
        state, step = tx.init(params), jax.jit(tx.update)
        wanted = {k: theirs(p, [g[k] for g in GRADS], [RATE] * STEPS, **given) for k, p in
                  PARAMS.items()}  # fmt: skip
        # A schedule's rates are float32, whatever the leaves.
        bound = TOLERANCE["float32" if "momentum_scale" in given else dtype]
        for t, g in enumerate(GRADS):
            grads = {k: jnp.asarray(x, dtype) for k, x in g.items()}
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
            for k, p in params.items():
                assert p.dtype == dtype
                np.testing.assert_allclose(p, wanted[k][t], rtol=0, atol=bound, err_msg=f"{t} {k}")


def _all(tree):
    return jax.tree.map(lambda _: True, tree)


# Moments with a count of their own, and nothing else that lasts: a reset is a new start.
FORGETFUL = {
    "adam": lambda: optax.adam(0.1),
    "lion": lambda: optlab.lion(0.1),
    "muon": lambda: optlab.muon(0.1, fallback_learning_rate=0.1),
    "chain": lambda: optax.chain(optax.trace(0.9), optax.scale_by_adam(), optax.scale(-0.1)),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "partition": lambda: optax.partition(
        {"m": optax.adam(0.1), "v": optax.masked(optax.sgd(0.1, momentum=0.9), _all)},
        {"kernel": "m", "bias": "v"},
    ),
    # Their moments begin at other values than zero.
    "rms": lambda: optax.rmsprop(0.1, initial_scale=1.0),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.scale(-0.1)),
}


@pytest.mark.parametrize("name", FORGETFUL)
def test_a_reset_starts_anew_at_exactly_the_right_steps(name):
    inner = FORGETFUL[name]()
    found = steps(_jitted(reset_moments(inner, every=3)), SMALL_GRADS, SMALL)
    # The first reset comes before update 3, the second before update 6.
    params, wanted = SMALL, []
    for first, last in ((0, 2), (2, 5), (5, 7)):
        part = steps(_jitted(inner), SMALL_GRADS[first:last], params)
        for updates in part:
            params = optax.apply_updates(params, updates)
        wanted += part
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=0, atol=2e-6)
    never = steps(_jitted(inner), SMALL_GRADS, SMALL)
    same = [np.allclose(flat(a), flat(b), atol=1e-4) for a, b in zip(found, never, strict=True)]
    assert same[:2] == [True, True]
    assert not all(same[2:])


def _jitted(tx):
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


# What else they keep has to go on: a basis, a schedule's step, a rate that is a hyperparameter.
LASTING = {
    "galore": lambda: optlab.galore(0.1, rank=2),
    "schedule": lambda: optax.adam(optax.linear_schedule(0.1, 0.0, 10)),
    "inject": lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 10)),
}


@pytest.mark.parametrize("name", LASTING)
def test_only_moments_are_reset(name):
    inner = LASTING[name]()
    tx = _jitted(reset_moments(inner, every=3))
    plain, state, without = _jitted(inner), tx.init(SMALL), inner.init(SMALL)
    zeros = jax.tree.map(jnp.zeros_like, SMALL)
    for t, g in enumerate(SMALL_GRADS, start=1):
        # A step with a zero gradient leaves the moments at zero if and only if they were reset.
        _, after = tx.update(zeros, state, SMALL)
        moments, _ = _split(after.inner)
        assert moments
        assert all(not np.any(x) for x in moments) == (t in (1, 3, 6)), t
        _, state = tx.update(g, state, SMALL)
        _, without = plain.update(g, without, SMALL)
        for a, b in zip(_split(state.inner)[1], _split(without)[1], strict=True):
            np.testing.assert_array_equal(a, b)


def _split(state):
    """Return the leaves that are moments, and those that are neither moments nor their counts."""
    moments, rest = [], []

    def visit(path, leaf):
        names = [getattr(key, "name", None) for key in path]
        if any(name in MOMENTS for name in names):
            moments.append(leaf)
        elif names[-1] != "count" or not _has_moments(state, path[:-1]):
            rest.append(leaf)

    jax.tree_util.tree_map_with_path(visit, state)
    return moments, rest


def _has_moments(state, path):
    node = state
    for key in path:
        name = getattr(key, "name", None)
        node = getattr(node, name) if name else node[getattr(key, "idx", getattr(key, "key", None))]
    return bool(set(getattr(node, "_fields", ())) & set(MOMENTS))


@pytest.mark.parametrize("name", [*FORGETFUL, *LASTING])
def test_it_trains_across_resets(name):
    tx = reset_moments((FORGETFUL | LASTING)[name](), every=4, warmup=2)
    target = random_like(SMALL, seed=50)
    distance = lambda p: sum(jnp.sum((p[k] - target[k]) ** 2) for k in p)  # noqa: E731

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(distance)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=40)[0]

    params, state = run(SMALL)
    assert distance(params) < 0.6 * distance(SMALL)
    assert state.resets == 10


def test_the_warm_up_after_a_reset_is_the_papers():
    tx = reset_moments(optax.trace(0.0), every=4, warmup=2)
    state, found, told = tx.init(jnp.zeros(1)), [], []
    for _ in range(9):
        u, state = tx.update(jnp.ones(1), state)
        found.append(float(u[0]))
        told.append(state.metrics())
    wanted = [1, 1, 1, *(reference.rewarm(c, 2) for c in (0, 1, 2, 3, 0, 1))]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose([m["rewarm"] for m in told], wanted, atol=1e-7)
    assert [int(m["resets"]) for m in told] == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert found[3] == pytest.approx(0.01)


def test_fields_can_be_named():
    tx = reset_moments(optax.adan(0.1), every=2, fields=("m", "v", "n"), restart_counts=False)
    zeros = jax.tree.map(jnp.zeros_like, SMALL)
    _, state = tx.update(SMALL_GRADS[0], tx.init(SMALL), SMALL)
    last = state.inner[0].g
    assert np.any(flat(last))
    _, state = tx.update(zeros, state, SMALL)
    adan = state.inner[0]
    assert not np.any(flat(adan.m))
    assert int(adan.t) == 2


def test_without_moments_it_says_what_there_is():
    with pytest.raises(ValueError, match=r"field named ema.*they have count\. .*fields="):
        reset_moments(optax.scale_by_schedule(lambda t: t), 3).init(SMALL)
    with pytest.raises(TypeError, match=r"reset_moments: fields must be.*'mu'.*Write fields="):
        reset_moments(optax.adam(0.1), 3, fields="mu")
    with pytest.raises(ValueError, match=r"spam: every must be a whole number >= 1, got 0"):
        spam(0.1, every=0)


@pytest.mark.parametrize("inner", [optax.scale_by_adam(), scale_by_spam()])
@pytest.mark.parametrize("other", [{"kernel": SMALL["kernel"]}, SMALL | {"bias": jnp.ones(1)}])
@pytest.mark.parametrize("given", ["params", "updates"])
def test_another_tree_is_refused(inner, other, given):
    tx = reset_moments(inner, 3)
    state = tx.init(SMALL)
    calls = {"params": lambda: tx.update(SMALL, state, other)}
    calls["updates"] = lambda: tx.update(other, state)
    what = {"params": "parameters", "updates": "updates"}[given]
    with pytest.raises(ValueError, match=f"reset_moments: the {what} are another.*very param"):
        calls[given]()


def test_each_rate_is_refused_by_its_own_name():
    for name in ("b1", "max_decay", "norm_decay", "square_decay"):
        with pytest.raises(ValueError, match=rf"stable_spam: {name} must be a number in \[0, 1\)"):
            stable_spam(0.1, **{name: 1.0})


def test_spam_is_adam_with_resets_where_nothing_is_a_spike():
    given = {"threshold": 1e30, "every": 3, "warmup": 2, "eps": 1e-3}
    adam = optax.adam(RATE, eps=1e-3)
    parts = reset_moments(adam, 3, warmup=2, restart_counts=False)
    found, wanted = (steps(tx, SMALL_GRADS, SMALL) for tx in (spam(RATE, **given), parts))
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=0, atol=1e-6)
    found = steps(spam(RATE, **given | {"every": 100}), SMALL_GRADS, SMALL)
    np.testing.assert_allclose(flat(found), flat(steps(adam, SMALL_GRADS, SMALL)), atol=1e-6)


def test_spam_is_its_parts():
    links = scale_by_spam(threshold=2.0), 3
    whole = spam(RATE, threshold=2.0, every=3, warmup=4, weight_decay=0.1)
    parts = optax.chain(
        reset_moments(*links, warmup=4, restart_counts=False),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(RATE),
    )
    found, wanted = (steps(tx, SMALL_GRADS, SMALL) for tx in (whole, parts))
    np.testing.assert_array_equal(flat(found), flat(wanted))


def test_stable_spam_is_its_parts():
    given = {"max_decay": 0.5, "every": 3}
    parts = optax.chain(
        clip_spikes(0.5), normalize_gradient_norm(), reset_moments(optax.adam(RATE), 3)
    )
    found, wanted = (steps(tx, SMALL_GRADS, SMALL) for tx in (stable_spam(RATE, **given), parts))
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=0, atol=5e-6)
    # Before the first reset the released code does the same.
    official = steps(stable_spam(RATE, **given, official=True), SMALL_GRADS, SMALL)
    np.testing.assert_array_equal(flat(official[:2]), flat(found[:2]))
    assert not np.allclose(flat(official[2]), flat(found[2]), atol=1e-3)


METHODS = {
    "clip_spikes": clip_spikes(0.9),
    "normalize_gradient_norm": normalize_gradient_norm(),
    "scale_by_spam": scale_by_spam(),
    "spam": spam(RATE, every=4),
    "spam official": spam(RATE, every=4, official=True),
    "stable_spam": stable_spam(RATE, every=4),
    "stable_spam official": stable_spam(RATE, every=4, official=True),
}


@functools.cache
def _step(name):
    return jax.jit(METHODS[name].update)


@pytest.mark.parametrize("where", ["one entry", "a leaf"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30, 3e38])
@pytest.mark.parametrize("name", METHODS)
def test_no_gradient_poisons_a_state(name, bad, where):
    tx, clean, state = METHODS[name], [], METHODS[name].init(SMALL)
    clean_state = state
    for t, g in enumerate(SMALL_GRADS):
        place = (0, 0) if where == "one entry" else ...
        struck = g | {"kernel": g["kernel"].at[place].set(bad)} if t in (0, 2, 3) else g
        updates, state = _step(name)(struck, state, SMALL)
        normal, clean_state = _step(name)(g, clean_state, SMALL)
        assert np.isfinite(flat((updates, state))).all(), t
        clean.append((updates, normal))
    assert tx.init(SMALL) is not None
    # What the other leaf gets has nothing to do with it, and this one gets on.
    for updates, normal in clean:
        np.testing.assert_array_equal(updates["bias"], normal["bias"])
    assert np.any(clean[-1][0]["kernel"])
    size = [np.linalg.norm(x["kernel"]) for x in clean[-1]]
    assert 0.05 * size[1] < size[0] < 20 * size[1]


@pytest.mark.parametrize("name", ["scale_by_spam", "spam", "spam official"])
def test_an_entry_without_a_past_is_not_clipped(name):
    tx, params = METHODS[name], jnp.ones(2)
    state = tx.init(params)
    for g in ([1.0, 0.0], [1.0, 0.0], [1.0, 7.0]):
        updates, state = tx.update(jnp.array(g), state, params)
    assert abs(updates[1]) > 0.3 * abs(updates[0])
    assert int(optax.tree.get(state, "spikes")) == 0


def test_spikes_are_counted():
    tx, params = scale_by_spam(threshold=1e3), jnp.zeros(4)
    state = tx.init(params)
    for g in ([1.0, 1.0, 1.0, 1.0], [1.0, 100.0, -100.0, 1.0], [1.0, 1.0, jnp.nan, jnp.inf]):
        _, state = tx.update(jnp.array(g), state)
    assert {k: float(x) for k, x in state.metrics().items()} == {"clip_rate": 0.5, "spikes": 4}
    # sign(g) sqrt(threshold nu), nu of the step before: 1e-3.
    np.testing.assert_allclose(state.mu[1:3], [0.1 * 0.81 + 0.09 + 0.1, 0.1 * 0.81 - 0.09], 1e-5)
    tx = clip_spikes(0.5)
    state = tx.init(params)
    for g in ([1.0, 0.0, 0.0, 0.0], [8.0, 7.0, 1.0, -1.0]):
        u, state = tx.update(jnp.array(g), state)
    assert {k: float(x) for k, x in state.metrics().items()} == {"clip_rate": 0.5, "spikes": 2}
    level = (0.25 * 1 + 0.5 * 8) / 0.75
    np.testing.assert_allclose(u, [level, 7 / 8 * level, 1, -1], rtol=1e-6)


def test_the_count_of_spikes_stays_at_the_largest():
    tx, params = scale_by_spam(), jnp.zeros(3)
    state = tx.init(params)._replace(spikes=jnp.array(2**31 - 2, jnp.int32))
    _, state = tx.update(jnp.full(3, jnp.nan), state)
    assert int(state.spikes) == 2**31 - 1


@pytest.mark.parametrize("tx", [clip_spikes(0.9), normalize_gradient_norm()])
def test_a_zero_gradient_is_no_step(tx):
    zeros = jax.tree.map(jnp.zeros_like, SMALL)
    _, state = tx.update(SMALL_GRADS[0], tx.init(SMALL), SMALL)
    after = state
    for _ in range(3):
        updates, after = tx.update(zeros, after, SMALL)
    assert not np.any(flat(updates))
    for a, b in zip(state[:2], after[:2], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_a_normalized_gradient_has_norm_one_at_any_scale(size):
    tx = normalize_gradient_norm()
    g = jax.tree.map(lambda x: size * x, SMALL)
    updates, _ = tx.update(g, tx.init(SMALL), SMALL)
    for k, u in updates.items():
        small = 1 / (1 + 1e-8 / np.linalg.norm(g[k]))
        np.testing.assert_allclose(np.linalg.norm(u), small, rtol=1e-5)


@pytest.mark.parametrize("make", [clip_spikes, normalize_gradient_norm])
def test_layers_of_a_stack_are_leaves_of_their_own(make):
    whole = {"layers": {"kernel": (3, 4, 5)}}
    grads = [random_like(whole, seed=t) for t in range(3)]
    rise = jnp.array([1.0, 5.0, 30.0])[:, None, None]
    grads = [jax.tree.map(lambda g, t=t: g * rise**t, g) for t, g in enumerate(grads)]
    tx = make(layout=layout.stacked("^layers/"))
    found = steps(tx, grads, grads[0])
    apart = [
        steps(make(), [{"a": g["layers"]["kernel"][i]} for g in grads], {"a": jnp.zeros((4, 5))})
        for i in range(3)
    ]
    for t, updates in enumerate(found):
        wanted = np.stack([layer[t]["a"] for layer in apart])
        np.testing.assert_allclose(updates["layers"]["kernel"], wanted, rtol=1e-5)
    assert not np.allclose(flat(found), flat(steps(make(), grads, grads[0])), rtol=1e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_equals_unsharded(kind):
    leaves = {k: mesh_problem.LEAVES[k] for k in ("layers/kernel", "up/kernel", "up/bias")}
    mesh = mesh_problem.mesh_of(kind)
    one = _trained(leaves, None, None)
    with jax.set_mesh(mesh):
        placed = mesh_problem.shardings_on(mesh, leaves)
        run = _trained(leaves, placed, placed if kind == AxisType.Auto else None)
    start = one.at[0][0]
    assert mesh_problem.off(run.at[4][0], one.at[4][0], start) < 1e-5
    assert run.traces == 1
    spikes = [int(optax.tree.get(r.at[4][1], "spikes")) for r in (run, one)]
    assert spikes[0] == spikes[1] > 0


def _trained(leaves, placed, shardings):
    tx = stable_spam(RATE, max_decay=0.5, every=3, layout=mesh_problem.LAYOUT, shardings=shardings)
    placed = mesh_problem.shardings_on(None, leaves) if placed is None else placed
    growing = optax.scale_by_schedule(lambda step: 3.0**step)
    problem = mesh_problem.trees(placed, leaves)
    return mesh_problem.train(optax.chain(growing, tx), problem, 4)
