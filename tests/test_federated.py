"""Federated rounds: against loops in NumPy, on meshes, with clients away, late or behind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import optlab
from optlab.combine.federated import afa_cd, afa_cs, fedavg_m, scaffold_m
from optlab.combine.mesh import clients_on_mesh
from optlab.testing.sharding import mesh_of

CLIENTS, STEPS, SIZE, ROUNDS = 8, 3, 4, 4
RATE, SERVER, BETA = 0.1, 0.2, 0.3
MAKERS = {
    "fedavg_m": functools.partial(fedavg_m, beta=BETA),
    "scaffold_m": functools.partial(scaffold_m, beta=BETA),
    "afa_cd": afa_cd,
    "afa_cs": afa_cs,
}


def loss(params, batch):
    """Return a quadratic with a leaf of rank 0 beside one of rank 1."""
    curvature, target = batch
    apart = params["x"] - target
    return jnp.sum(curvature * apart**2) / 2 + params["b"] ** 2 * jnp.sum(target)


def gradient(params, batch):
    curvature, target = batch
    return {"x": curvature * (params["x"] - target), "b": 2 * params["b"] * target.sum()}


@functools.cache
def data():
    """Return a start, batches of every round, and who reports after how many steps from when."""
    rng = np.random.default_rng(0)
    start = {"x": rng.normal(size=SIZE).astype("float32"), "b": np.float32(0.5)}
    front = (ROUNDS, CLIENTS, STEPS, SIZE)
    batches = (rng.uniform(0.5, 2, size=front), rng.normal(size=front))
    steps = rng.integers(0, STEPS + 1, size=(ROUNDS, CLIENTS))
    present = rng.random((ROUNDS, CLIENTS)) < 0.6
    present[2] = False  # a round without anyone
    late = rng.integers(0, 2, size=(ROUNDS, CLIENTS))
    return start, tuple(b.astype("float32") for b in batches), present, steps, late


def both(fn, *trees):
    return {key: fn(*(tree[key] for tree in trees)) for key in trees[0]}


def mean(trees, count=None):
    return both(lambda *xs: sum(xs) / (count or len(xs)), *trees)


def work(name, x, batches, steps, g, c, own):
    """Return the means of a client's directions and gradients, in NumPy."""
    moves, grads = [], []
    for k in range(steps):
        grad = gradient(x, [b[k] for b in batches])
        move = grad
        if name == "scaffold_m":
            move = both(lambda a, i, c: a - i + c, grad, own, c)
        if name in ("fedavg_m", "scaffold_m"):
            move = both(lambda a, g: BETA * a + (1 - BETA) * g, move, g)
        x = both(lambda x, d: x - RATE * d, x, move)
        moves, grads = [*moves, move], [*grads, grad]
    return mean(moves), mean(grads)


def reference(name):
    """Return the parameters after every round, in float64."""
    start, batches, present, steps, late = data()
    x = both(lambda x: np.asarray(x, "float64"), start)
    zero = both(np.zeros_like, x)
    g, c, clients, seen = zero, zero, [zero] * CLIENTS, [x]
    for t in range(ROUNDS):
        who = [i for i in range(CLIENTS) if present[t, i] and steps[t, i]]
        sent, old = {}, list(clients)
        for i in who:
            begin = seen[max(t - late[t, i], 0)]
            own = [b[t, i] for b in batches]
            sent[i] = work(name, begin, own, steps[t, i], g, c, clients[i])
            clients[i] = sent[i][1]
        if who:
            every = {"afa_cd": [sent[i][1] for i in who], "afa_cs": clients}
            pseudo = mean(every.get(name, [sent[i][0] for i in who]))
            g = pseudo
            change = [both(np.subtract, clients[i], old[i]) for i in who]
            c = both(np.add, c, mean(change, CLIENTS))
            x = both(lambda x, d: x - SERVER * d, x, pseudo)
        seen.append(x)
    return seen


def run(rule, jitted=True):
    """Return the parameters after every round, the last state, and the number of programs."""
    start, batches, present, steps, late = data()
    params, state = jax.tree.map(jnp.asarray, start), rule.init(start, CLIENTS)
    step, seen = jax.jit(rule.round), [start]
    for t in range(ROUNDS):
        begin = [seen[max(t - late[t, i], 0)] for i in range(CLIENTS)]
        given = {
            "participants": present[t],
            "local_steps": steps[t],
            "start": jax.tree.map(lambda *x: np.stack(x), *begin),
        }
        params, state = step(params, state, tuple(b[t] for b in batches), **given)
        seen.append(jax.device_get(params))
    return seen, state, step._cache_size()


@functools.cache
def alone(name):
    return run(MAKERS[name](loss, RATE, optax.sgd(SERVER)))


def close(found, wanted, bound=1e-5):
    for t, (got, want) in enumerate(zip(found, wanted, strict=True)):
        for key in want:
            what = f"{key} after {t} rounds"
            np.testing.assert_allclose(got[key], want[key], rtol=0, atol=bound, err_msg=what)


@pytest.mark.parametrize("name", MAKERS)
def test_rounds_are_those_of_a_loop_over_clients(name):
    found, state, programs = alone(name)
    wanted = reference(name)
    close(found, wanted)
    assert programs == 1
    assert state.count == ROUNDS
    moved = max(np.abs(wanted[-1][key] - wanted[0][key]).max() for key in wanted[0])
    assert moved > 0.1
    _, _, present, steps, _ = data()
    reported = optlab.metrics(state)
    assert np.isclose(reported["participation"], np.mean(present[-1] & (steps[-1] > 0)))
    assert reported["local_loss"] > 0


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("fedavg_m", AxisType.Auto, (8, 1)),
        ("scaffold_m", AxisType.Explicit, (8, 1)),
        ("scaffold_m", AxisType.Auto, (4, 2)),
        ("afa_cd", AxisType.Explicit, (4, 2)),
        ("afa_cs", AxisType.Auto, (8, 1)),
    ],
    ids=str,
)
def test_devices_as_clients_give_the_same_numbers(name, kind, shape):
    mesh = mesh_of(kind, shape, ("clients", "copies"))
    rule = clients_on_mesh(MAKERS[name](loss, RATE, optax.sgd(SERVER)), mesh, "clients")
    found, state, _ = run(rule)
    wanted, whole, _ = alone(name)
    close(found, wanted, 2e-6)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)
    for leaf in jax.tree.leaves(state.clients):
        held = {shard.data.shape[0] for shard in leaf.addressable_shards}
        assert held == {CLIENTS // shape[0]}


def quadratic(x, batch):
    curvature, target = batch
    return jnp.sum(curvature * (x - target) ** 2) / 2


CURVES = np.asarray([[1.0, 4.0], [3.0, 0.5], [0.2, 1.0]], "float32")
TARGETS = np.asarray([[1.0, -1.0], [-2.0, 3.0], [5.0, 0.0]], "float32")
OPTIMUM = (CURVES * TARGETS).sum(axis=0) / CURVES.sum(axis=0)


def trained(rule, rounds, given=None):
    """Return where rounds on three quadratics end; `given` makes the keywords of round t."""
    batches = jax.tree.map(lambda b: jnp.repeat(b[:, None], 5, axis=1), (CURVES, TARGETS))
    x = jnp.zeros(2)

    def step(carry, t):
        return rule.round(*carry, batches, **(given(t) if given else {})), None

    run = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(rounds))[0])
    x, _ = run((x, rule.init(x, 3)))
    return np.asarray(x)


def test_controls_and_momentum_take_away_the_drift_of_local_steps():
    error = lambda rule: np.abs(trained(rule, 400) - OPTIMUM).max()  # noqa: E731
    server = optax.sgd(0.5)
    drift = error(fedavg_m(quadratic, 0.1, server, beta=1.0))
    assert drift > 0.2
    assert error(scaffold_m(quadratic, 0.1, server, beta=1.0)) < 1e-4
    assert error(scaffold_m(quadratic, 0.1, server)) < 1e-4
    assert error(fedavg_m(quadratic, 0.1, server, beta=0.1)) < drift / 4


def test_latest_reports_of_all_take_away_the_bias_of_who_comes_often():
    # The first client comes every round, the others every fourth; one local step, so no drift.
    often = lambda t: {  # noqa: E731
        "participants": jnp.stack([t >= 0, t % 4 == 1, t % 4 == 3]),
        "local_steps": jnp.ones(3, int),
    }
    ends = {
        make: trained(make(quadratic, 0.1, optax.sgd(0.02)), 1200, often)
        for make in (afa_cd, afa_cs)
    }
    assert np.abs(ends[afa_cs] - OPTIMUM).max() < 1e-3
    assert np.abs(ends[afa_cd] - OPTIMUM).max() > 0.2


def test_fedavg_is_the_mean_of_the_clients_parameters():
    rule = fedavg_m(loss, RATE, optax.sgd(RATE * STEPS), beta=1.0)
    start, batches, *_ = data()
    batches = tuple(b[0] for b in batches)
    found, _ = jax.jit(rule.round)(start, rule.init(start, CLIENTS), batches)
    ends = []
    for i in range(CLIENTS):
        x = start
        for k in range(STEPS):
            x = both(lambda x, g: x - RATE * g, x, gradient(x, [b[i, k] for b in batches]))
        ends.append(x)
    close([found], [mean(ends)], 1e-6)


@pytest.mark.parametrize("name", ["fedavg_m", "afa_cs"])
def test_what_an_absent_client_computes_does_not_count(name):
    rule = MAKERS[name](loss, RATE, optax.adam(0.1))
    start, batches, *_ = data()
    bad = tuple(np.where(np.arange(CLIENTS)[:, None, None] == 5, np.nan, b[0]) for b in batches)
    good = tuple(b[0] for b in batches)
    away = np.arange(CLIENTS) != 5
    step, state = jax.jit(rule.round), rule.init(start, CLIENTS)
    wanted = step(start, state, good, participants=away)
    found = step(start, state, bad, participants=away)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    params, kept = step(start, state, bad, participants=np.zeros(CLIENTS, bool))
    jax.tree.map(np.testing.assert_array_equal, params, start)
    jax.tree.map(np.testing.assert_array_equal, kept, state._replace(count=jnp.int32(1)))


def test_the_server_and_the_rate_are_optaxs_and_bfloat16_stays():
    # A rate that is zero in the first round: clients stand still, and their mean gradient is g.
    rule = fedavg_m(quadratic, optax.linear_schedule(0.0, 0.1, 2), optax.adam(0.5), beta=1.0)
    x = jnp.zeros(2, jnp.bfloat16)
    batches = jax.tree.map(lambda b: jnp.asarray(b[:, None], jnp.bfloat16), (CURVES, TARGETS))
    x, state = jax.jit(rule.round)(x, rule.init(x, 3), batches)
    assert x.dtype == jnp.bfloat16
    assert state.direction.dtype == jnp.float32
    gradient = -(CURVES * TARGETS).mean(axis=0)
    np.testing.assert_allclose(state.direction, gradient, rtol=0.02)
    np.testing.assert_allclose(np.asarray(x, "float32"), -0.5 * np.sign(gradient), rtol=0.01)
    assert state.server[0].count == 1


def test_a_flax_model_learns_from_clients_who_know_one_class_each():
    rng = np.random.default_rng(0)
    centers = 3 * np.eye(3, 4)
    inputs = (centers[:, None, None] + rng.normal(size=(3, 2, 16, 4))).astype("float32")
    labels = np.broadcast_to(np.arange(3)[:, None, None], (3, 2, 16))
    graph, params = nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))

    def cross_entropy(params, batch):
        x, y = batch
        logits = nnx.merge(graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    rule = scaffold_m(cross_entropy, 0.2, optax.sgd(0.4))
    state, step = rule.init(params, 3), jax.jit(rule.round)
    for _ in range(30):
        params, state = step(params, state, (inputs, labels))
    logits = nnx.merge(graph, params)(inputs)
    assert (logits.argmax(axis=-1) == labels).mean() > 0.95


RULE = fedavg_m(loss, RATE, optax.sgd(SERVER))
START = {"x": jnp.zeros(SIZE), "b": jnp.zeros(())}
ONE = np.zeros((2, 1, SIZE), "float32")


def one_round(batches, **given):
    return RULE.round(START, RULE.init(START, 2), batches, **given)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fedavg_m(None, 0.1, optax.sgd(1.0)), TypeError, "fedavg_m: loss must be a func"),
        (lambda: afa_cd(loss, -0.1, optax.sgd(1.0)), ValueError, "afa_cd: learning_rate must be"),
        (lambda: afa_cs(loss, 0.1, 1.0), TypeError, "afa_cs: server must be an optax.Grad"),
        (lambda: scaffold_m(loss, 0.1, optax.sgd(1.0), beta=2), ValueError, "scaffold_m: beta"),
        (lambda: RULE.init(START, 0), ValueError, "fedavg_m: clients must be a whole number >= 1"),
        (lambda: one_round((ONE, ONE[:, 0, 0])), ValueError, r"got shape \(2,\) at '1' beside"),
        (lambda: one_round((ONE, ONE[:1])), ValueError, r"got shape \(1, 1, 4\) at '1' beside"),
        (lambda: one_round(()), ValueError, r"must start with the axes \(clients, local steps\)"),
        (
            lambda: one_round((ONE, ONE), local_steps=[1, 1, 1]),
            ValueError,
            r"local_steps must be one per client, got shape \(3,\) for 2 clients",
        ),
        (
            lambda: one_round((ONE, ONE), steps=[1, 1]),
            TypeError,
            "fedavg_m.round: unknown keyword 'steps'",
        ),
        (
            lambda: clients_on_mesh(RULE, mesh_of(AxisType.Auto), "client"),
            ValueError,
            "clients_on_mesh: axis_name must be one of 'data', 'model', got 'client'",
        ),
        (
            lambda: clients_on_mesh(RULE, mesh_of(AxisType.Auto), "data").init(START, 6),
            ValueError,
            "clients must be a multiple of the 4 devices along 'data', got 6. Add clients",
        ),
        (
            lambda: clients_on_mesh(RULE.round, mesh_of(AxisType.Auto), "data"),
            TypeError,
            "clients_on_mesh: rule must be a Federated",
        ),
    ],
)
def test_what_is_wrong_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
