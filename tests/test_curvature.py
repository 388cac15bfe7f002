"""Sophia: the paper's numbers, refreshes on time and at no other, faults, meshes, Flax loops."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import curvature as reference

from optlab.flax import TrainState
from optlab.lab.model import GPT
from optlab.recipes.curvature import sophia
from optlab.state.metrics import metrics
from optlab.testing import random_like
from optlab.testing.sharding import mesh_of
from optlab.transforms.curvature import scale_by_clipped_curvature
from optlab.transforms.estimators import gauss_newton_diagonal, hutchinson_diagonal

SHAPES = {"conv": {"kernel": (2, 2, 3, 4)}, "dense": {"kernel": (6, 4), "bias": (4,)}}
PARAMS = random_like(SHAPES, seed=0)
GRADS = [random_like(SHAPES, seed=i + 1) for i in range(6)]
ONES = jax.tree.map(jnp.ones_like, PARAMS)
ESTIMATORS = ("gnb", "hutchinson")


def _finite(tree):
    return all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("float64", 1e-13)])
def test_numbers_are_the_papers(dtype, bound):
    draw = lambda i: np.random.default_rng(i).normal(size=(5, 4))  # noqa: E731
    start, gs = draw(0), [draw(i + 1) for i in range(8)]
    # Of either sign, as Hutchinson's; a divisor of about the momentum's size.
    estimates = [100 * draw(i + 20) if i % 3 == 0 else None for i in range(8)]
    rates = np.linspace(0.1, 0.03, 8)
    wanted = reference.sophia(
        start, gs, rates, estimates, b1=0.9, b2=0.8, gamma=0.05, eps=1e-12, weight_decay=0.3
    )
    schedule = lambda t: jnp.asarray(rates)[t]  # noqa: E731
    with jax.enable_x64(dtype == "float64"):
        tx = sophia(schedule, b1=0.9, b2=0.8, gamma=0.05, weight_decay=0.3)
        p, seen = jnp.asarray(start, dtype), []
        state = tx.init(p)
        for g, estimate, want in zip(gs, estimates, wanted, strict=True):
            given = None if estimate is None else jnp.asarray(estimate, dtype)
            u, state = tx.update(jnp.asarray(g, dtype), state, p, curvature=given)
            p = optax.apply_updates(p, u)
            np.testing.assert_allclose(p, want, rtol=0, atol=bound)
            seen.append(float(state[0].metrics()["win_rate"]))
    assert 0 < min(seen) < max(seen) < 1, "entries of both kinds prove more"


def test_numbers_are_optaxs_where_the_two_agree():
    # Without momentum, refreshed at every step, on a Hessian that needs no estimate.
    loss = lambda p: sum(jnp.sum((1 + x**2) * 40) for x in jax.tree.leaves(p))  # noqa: E731
    estimate = hutchinson_diagonal(loss, distribution="rademacher")
    theirs = optax.contrib.sophia(0.1, b1=0, gamma=0.05, update_interval=1, weight_decay=0.1)
    ours = sophia(0.1, b1=0.0, gamma=0.05, every=1, weight_decay=0.1, official=True)
    runs = []
    for tx, extra in ((theirs, {"obj_fn": loss}), (ours, {"curvature": estimate})):
        params, state = PARAMS, tx.init(PARAMS)
        step = jax.jit(lambda g, s, p, tx=tx, extra=extra: tx.update(g, s, p, **extra))
        for g in GRADS:
            u, state = step(g, state, params)
            params = optax.apply_updates(params, u)
        runs.append(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *runs)


def _counted(calls):
    """Return an estimator that notes each of its calls, as the program runs, with its key."""

    def estimate(params, key):
        jax.debug.callback(lambda k: calls.append(tuple(k.tolist())), jax.random.key_data(key))
        return jax.tree.map(jnp.ones_like, params)

    return estimate


@pytest.mark.parametrize(("official", "wanted"), [(False, [0, 3, 6]), (True, [3, 6])])
def test_one_program_calls_the_estimator_at_due_steps_only(official, wanted):
    tx = scale_by_clipped_curvature(every=3, official=official)
    calls, due, traces = [], [], 0
    estimate = _counted(calls)

    @jax.jit
    def step(grads, state):
        nonlocal traces
        traces += 1
        return tx.update(grads, state, PARAMS, curvature=estimate)

    state = tx.init(PARAMS)
    for t in range(8):
        before = len(calls)
        _, state = jax.block_until_ready(step(GRADS[0], state))
        jax.effects_barrier()
        due += [t] * (len(calls) - before)
    assert due == wanted
    assert len(set(calls)) == len(wanted), "every refresh has a key of its own"
    assert traces == 1
    assert step._cache_size() == 1
    want = 1 - 0.99 ** len(wanted)
    jax.tree.map(lambda h: np.testing.assert_allclose(h, want, rtol=1e-6), state.nu)


def test_a_loop_may_pass_trees_when_it_likes():
    tx = scale_by_clipped_curvature(b2=0.5, every=100)
    state = tx.init(PARAMS)
    for given, want in ((None, 0.0), (ONES, 0.5), (None, 0.5), (ONES, 0.75)):
        _, state = tx.update(GRADS[0], state, curvature=given)
        jax.tree.map(lambda h, want=want: np.testing.assert_array_equal(h, want), state.nu)


def test_keys_follow_the_seed():
    calls = []
    for seed in (0, 1, 1):
        tx = sophia(0.1, seed=seed)
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS, curvature=_counted(calls))
        jax.effects_barrier()
    assert calls[1] == calls[2] != calls[0]


def test_holes_of_masked_and_missing_gradients():
    mask = {"conv": True, "dense": {"kernel": True, "bias": False}}
    whole = lambda params, key: jax.tree.map(lambda p: 2 * jnp.ones_like(p), PARAMS)  # noqa: E731
    plain = scale_by_clipped_curvature()
    tx = optax.masked(plain, mask)
    for given in (whole, whole(None, None)):
        want, _ = plain.update(GRADS[0], plain.init(PARAMS), PARAMS, curvature=given)
        got, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS, curvature=given)
        np.testing.assert_array_equal(got["dense"]["kernel"], want["dense"]["kernel"])
        np.testing.assert_array_equal(got["dense"]["bias"], GRADS[0]["dense"]["bias"])
        frozen = {**GRADS[0], "conv": {"kernel": None}}
        got, state = plain.update(frozen, plain.init(PARAMS), PARAMS, curvature=given)
        assert got["conv"]["kernel"] is None
        assert not state.nu["conv"]["kernel"].any()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_leaves_no_trace_in_the_state(bad):
    tx = scale_by_clipped_curvature(every=1)
    spoil = lambda tree: jax.tree.map(lambda x: x.ravel().at[0].set(bad).reshape(x.shape), tree)  # noqa: E731
    _, state = tx.update(GRADS[0], tx.init(PARAMS), curvature=ONES)
    updates, after = tx.update(spoil(GRADS[1]), state, curvature=spoil(ONES))
    assert _finite(after)
    first = lambda tree: np.array([x.ravel()[0] for x in jax.tree.leaves(tree)])  # noqa: E731
    assert np.isnan(first(updates)).all(), "a bad step must be seen by what looks for it"
    for kept in ("mu", "nu"):
        np.testing.assert_array_equal(first(getattr(after, kept)), first(getattr(state, kept)))
    rest = lambda tree: np.concatenate([x.ravel()[1:] for x in jax.tree.leaves(tree)])  # noqa: E731
    clean, unspoiled = tx.update(GRADS[1], state, curvature=ONES)
    np.testing.assert_array_equal(rest(updates), rest(clean))
    np.testing.assert_array_equal(rest(after.nu), rest(unspoiled.nu))
    updates, after = tx.update(GRADS[2], after, curvature=ONES)
    assert _finite((updates, after))


def test_bfloat16_parameters_keep_their_curvature_in_float32():
    tx = scale_by_clipped_curvature(mu_dtype=jnp.float32, every=2)
    curvature = lambda params, key: jax.tree.map(lambda p: 100 * p * p, params)  # noqa: E731
    cast = lambda tree, dtype: jax.tree.map(lambda x: x.astype(dtype), tree)  # noqa: E731
    runs = []
    for dtype in (jnp.bfloat16, jnp.float32):
        # The same numbers in both: what bfloat16 holds.
        params, *grads = (cast(cast(x, jnp.bfloat16), dtype) for x in (PARAMS, *GRADS[:3]))
        state, step = tx.init(params), jax.jit(functools.partial(tx.update, curvature=curvature))
        for g in grads:
            u, state = step(g, state, params)
        assert {x.dtype for x in jax.tree.leaves(u)} == {jnp.dtype(dtype)}
        assert {x.dtype for x in jax.tree.leaves(state.nu)} == {jnp.dtype("float32")}
        runs.append(cast(u, jnp.float32))
    close = functools.partial(np.testing.assert_allclose, rtol=2**-6, atol=0)
    jax.tree.map(close, *runs)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (
            {},
            "needs the extra argument 'curvature', got []. Call tx.update(grads, state, params, c",
        ),
        ({"curvature": {"dense": ONES["dense"]}}, "only in the updates: ['conv/kernel']"),
        (
            {"curvature": ONES | {"conv": {"kernel": jnp.ones(3)}}},
            "leaf 'conv/kernel' has shape (2, 2, 3, 4) in the updates and (3,) in curvature",
        ),
    ],
)
def test_wrong_extra_arguments_are_refused_by_name(extra, says):
    tx = sophia(0.1)
    with pytest.raises(ValueError, match="scale_by_clipped_curvature: ") as error:
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS, **extra)
    assert says in str(error.value)


def test_an_estimator_needs_params():
    tx = scale_by_clipped_curvature()
    with pytest.raises(ValueError, match=r"scale_by_clipped_curvature: .*params"):
        tx.update(GRADS[0], tx.init(PARAMS), curvature=lambda params, key: ONES)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"estimator": "gbn"}, "sophia: estimator must be one of 'gnb', 'hutchinson'"),
        ({"gamma": 0.0}, "sophia: gamma must be a number > 0"),
        ({"eps": 0.0}, "sophia: eps must be a number > 0"),
        ({"b1": 1.0}, "sophia: b1 must be a number in [0, 1)"),
        ({"every": 0}, "sophia: every must be a whole number >= 1"),
        ({"every": 2.5}, "sophia: every must be a whole number >= 1"),
        ({"weight_decay": -1.0}, "sophia: weight_decay must be a number >= 0"),
    ],
)
def test_wrong_hyperparameters_are_refused(given, says):
    with pytest.raises((TypeError, ValueError)) as error:
        sophia(0.1, **given)
    assert str(error.value).startswith(says)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(jnp.tanh(nn.Dense(16)(x)))


X = random_like((32, 8), seed=7)
LABELS = jnp.argmax(X @ random_like((8, 4), seed=8), axis=1)


def _cross_entropy(logits, labels=LABELS):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _curvature(estimator, predict, labels=LABELS):
    if estimator == "gnb":
        return gauss_newton_diagonal(predict)
    return hutchinson_diagonal(lambda params: _cross_entropy(predict(params), labels))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_trains_a_gpt_through_nnx_optimizer(estimator):
    config = types.SimpleNamespace(width=16, heads=2, layers=1, context=12)
    model = GPT(config, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, sophia(1e-2, estimator=estimator, every=3, weight_decay=0.0), wrt=nnx.Param
    )
    text = jnp.asarray(np.frombuffer(b"the cat sat on the mat. the cat sat", np.uint8), jnp.int32)
    windows = jnp.stack([text[i : i + 13] for i in range(0, 20, 4)])

    @nnx.jit
    def step(model, optimizer):
        loss = lambda m: _cross_entropy(m(windows[:, :-1]), windows[:, 1:])  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(model)
        graph, _, rest = nnx.split(model, nnx.Param, ...)
        predict = lambda params: nnx.merge(graph, params, rest)(windows[:, :-1])  # noqa: E731
        curvature = _curvature(estimator, predict, windows[:, 1:])
        optimizer.update(model, grads, curvature=curvature)
        return value

    values = [float(step(model, optimizer)) for _ in range(25)]
    assert values[-1] < 0.6 * values[0], values
    nu = jax.tree.leaves(nnx.as_pure(nnx.state(optimizer.opt_state))[0]["nu"])
    assert all(bool(jnp.any(h != 0)) for h in nu), "the curvature reached the state"
    assert 0 < float(metrics(optimizer.opt_state)["win_rate"]) <= 1


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_trains_through_linens_train_state(estimator):
    model = LinenMLP()
    params = model.init(jax.random.key(0), X)["params"]
    tx = sophia(2e-2, estimator=estimator, every=3, weight_decay=0.0)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state):
        predict = lambda params: model.apply({"params": params}, X)  # noqa: E731
        value, grads = jax.value_and_grad(lambda p: _cross_entropy(predict(p)))(state.params)
        curvature = _curvature(estimator, predict)
        return state.apply_gradients(grads=grads, curvature=curvature), value

    values = []
    for _ in range(40):
        state, value = step(state)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0], values
    assert step._cache_size() <= 2, "the first state counts its steps as a Python number"
    assert int(state.step) == 40
    assert state.tx is tx
    assert 0 < float(metrics(state.opt_state)["win_rate"]) <= 1


def test_train_state_still_replaces_its_fields():
    class Counting(TrainState):
        epoch: int = 0

    tx = optax.sgd(0.5)
    state = Counting.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
    state = state.apply_gradients(grads={"w": jnp.ones(2)}, epoch=3, loss=jnp.zeros([]))
    assert (state.epoch, state.step, state.tx) == (3, 1, tx)
    np.testing.assert_array_equal(state.params["w"], [0.5, 0.5])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sharded_training_gives_the_numbers_of_one_device(estimator, kind):
    # Data over one axis, the hidden units over the other.
    tx = sophia(1e-2, estimator=estimator, every=2, gamma=0.5)
    start = random_like({"up": (8, 16), "down": (16, 4)}, seed=3)
    one_hot = jax.nn.one_hot(LABELS, 4)

    def train(params, x, targets, spec=None):
        def predict(p):
            contract = (((1,), (0,)), ((), ()))
            return jax.lax.dot_general(
                jnp.tanh(x @ p["up"]), p["down"], contract, out_sharding=spec
            )

        loss = lambda p: -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(predict(p)), 1))  # noqa: E731
        curvature = gauss_newton_diagonal(predict) if estimator == "gnb" else None
        state, curvature = tx.init(params), curvature or hutchinson_diagonal(loss)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(params), state, params, curvature=curvature)
            params = optax.apply_updates(params, updates)
        return params, state

    want = jax.device_get(jax.jit(train)(start, X, one_hot))
    mesh = mesh_of(kind)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    params = {"up": place(start["up"], None, "model"), "down": place(start["down"], "model", None)}
    spec = P("data", None) if kind is AxisType.Explicit else None
    with jax.set_mesh(mesh):
        run = jax.jit(functools.partial(train, spec=spec))
        got = run(params, place(X, "data", None), place(one_hot, "data", None))
        for key, p in params.items():
            assert got[1][0].nu[key].sharding.is_equivalent_to(p.sharding, 2)
        got = jax.device_get(got)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, got, want)
