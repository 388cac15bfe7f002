"""Laws that hold for every input: invariances, bounds, limits, and identities between recipes."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import optlab
from optlab import kappa, layout
from optlab.testing import default_params
from optlab.testing.case import random_like

ROWS, COLS = 3, 4
entries = st.floats(-8, 8, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
matrices = st.lists(entries, min_size=ROWS * COLS, max_size=ROWS * COLS).map(
    lambda xs: {"kernel": np.asarray(xs, np.float32).reshape(ROWS, COLS)}
)
moving = matrices.filter(lambda tree: np.abs(tree["kernel"]).max() > 0.1)
scales = st.sampled_from([2.0**-20, 0.25, 2.0, 1024.0, 2.0**20])


def steps(tx, grads, params):
    """Run under jit and return the updates of every step; one compilation per transformation."""
    state, out = tx.init(params), []
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        out.append(updates)
    return out


@functools.cache
def _jitted(build):
    tx = build()
    return jax.jit(lambda grads, params: steps(tx, grads, params))


def run(build, grads, params):
    """Like `steps`, compiled once for a builder that is a module-level function."""
    return _jitted(build)(grads, params)


def flat(tree):
    """Return all entries of a tree as one float64 vector."""
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


# --- scale invariance: a power of two changes no rounding ---------------------------------------


def _lion():
    return optlab.lion(0.1)


def _signum():
    return optlab.signum(0.1, momentum=0.5)


def _l2():
    return optlab.lion_k(0.1, kappa="l2")


def _lp():
    return optlab.lion_k(0.1, kappa=kappa.lp(1.5))


def _top_k():
    return optlab.lion_k(0.1, kappa=kappa.top_k(3))


def _lars():
    return optlab.lars(0.1)


@pytest.mark.parametrize("build", [_lion, _signum, _l2, _lp, _top_k, _lars])
@settings(max_examples=25)
@given(first=moving, second=moving, params=moving, c=scales)
def test_sign_methods_and_lars_do_not_see_the_scale_of_gradients(build, first, second, params, c):
    scaled = [jax.tree.map(lambda x: x * np.float32(c), g) for g in (first, second)]
    want = run(build, [first, second], params)
    np.testing.assert_allclose(flat(run(build, scaled, params)), flat(want), rtol=1e-5, atol=1e-7)


# --- the radial part ----------------------------------------------------------------------------


def _radial():
    return optlab.remove_radial()


def _radial_rows():
    return optlab.remove_radial(layout=layout.flax)


@pytest.mark.parametrize("build", [_radial, _radial_rows])
@settings(max_examples=40)
@given(u=matrices, p=matrices)
def test_what_is_left_is_orthogonal_to_the_weights_and_has_no_radial_part(build, u, p):
    (once,) = run(build, [u], p)
    (twice,) = run(build, [once], p)
    size = np.abs(u["kernel"]).max()
    axis = None if build is _radial else 0
    inner = np.sum(np.float64(once["kernel"]) * p["kernel"], axis)
    norm = np.sqrt(np.sum(np.float64(p["kernel"]) ** 2, axis))
    assert np.all(np.abs(inner) <= 4e-6 * (size * norm + 1e-9))
    np.testing.assert_allclose(flat(twice), flat(once), rtol=0, atol=4e-6 * size)
    assert np.linalg.norm(flat(once)) <= np.linalg.norm(flat(u)) * (1 + 1e-6)


def _nap():
    return optlab.nap(0.3)


@settings(max_examples=25)
@given(grads=st.lists(matrices, min_size=3, max_size=3), params=moving)
def test_nap_holds_the_norm_of_every_matrix(grads, params):
    moved = params["kernel"]
    for u in run(_nap, grads, params):
        moved = moved + np.asarray(u["kernel"])
        np.testing.assert_allclose(
            np.linalg.norm(moved), np.linalg.norm(params["kernel"]), rtol=2e-6
        )


def test_projected_steps_let_the_norm_grow_by_the_steps_alone():
    """AdamP's eq. 8: with the radial part gone, |p|^2 grows by the sum of |step|^2."""
    rng = np.random.default_rng(0)
    p = rng.normal(size=(8, 5)).astype(np.float32)
    tx, squares = optlab.sgdp(0.1), [np.sum(p**2)]
    state = tx.init({"kernel": p})
    for _ in range(6):
        g = rng.normal(size=p.shape)
        g -= p * np.sum(g * p, 0, keepdims=True) / np.sum(p * p, 0, keepdims=True)
        updates, state = tx.update({"kernel": jnp.asarray(g, p.dtype)}, state, {"kernel": p})
        p = p + np.asarray(updates["kernel"])
        squares.append(squares[-1] + float(jnp.sum(updates["kernel"] ** 2)))
    np.testing.assert_allclose(np.sum(p**2), squares[-1], rtol=1e-5)
    assert squares[-1] > 1.1 * squares[0]


# --- layerwise ----------------------------------------------------------------------------------


def _lamb():
    return optlab.lamb(2.0**-7, weight_decay=0.1)


@settings(max_examples=40)
@given(grads=st.lists(moving, min_size=2, max_size=2), params=moving)
def test_the_relative_step_of_lamb_is_the_rate(grads, params):
    p = params
    for u in run(_lamb, grads, params):
        relative = np.linalg.norm(flat(u)) / np.linalg.norm(flat(p))
        np.testing.assert_allclose(relative, 2.0**-7, rtol=1e-5)
        p = optax.apply_updates(p, u)


def _trust():
    return optlab.scale_by_trust_ratio(0.5)


@settings(max_examples=25)
@given(u=moving, p=moving, c=scales)
def test_the_trust_ratio_follows_the_weights_and_ignores_the_update(u, p, c):
    (want,) = run(_trust, [u], p)
    larger = {"kernel": p["kernel"] * np.float32(c)}
    (follows,) = run(_trust, [u], larger)
    (ignores,) = run(_trust, [larger], p)
    np.testing.assert_allclose(flat(follows), c * flat(want), rtol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(flat(ignores)), 0.5 * np.linalg.norm(flat(p)), rtol=1e-5
    )


@pytest.mark.parametrize(("given_ratio", "ratio"), [(None, 0.5), (1.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("norm", ["of_sum", "sum_of"])
def test_the_ratio_at_a_zero_norm_is_the_one_asked_for(given_ratio, ratio, norm):
    tx = optlab.scale_by_trust_ratio(0.5, norm=norm, zero_norm_ratio=given_ratio)
    one, zero = jnp.ones(3), jnp.zeros(3)
    at_zero_weights, _ = tx.update(one, tx.init(zero), zero)
    np.testing.assert_array_equal(at_zero_weights, ratio * one)
    without_gradient, _ = tx.update(zero, tx.init(one), one)
    np.testing.assert_array_equal(without_gradient, zero)


def test_lamb_and_lars_ratios_near_zero_weights_grow_with_the_weights():
    tx = optlab.scale_by_trust_ratio()
    u = jnp.ones(3)
    sizes = [float(tx.update(u, tx.init(u), jnp.full(3, s))[0][0]) for s in (1e-6, 1e-3, 1.0, 10.0)]
    assert sizes == sorted(sizes)


@settings(max_examples=25)
@given(w=st.lists(st.floats(0, 1e4, width=32), min_size=2, max_size=6), eta=st.sampled_from([1, 4]))
def test_the_inverse_row_norm_factor_falls_with_the_norm_from_eta(w, eta):
    p = {"kernel": jnp.asarray([sorted(w)], jnp.float32)}
    u, _ = optlab.scale_by_inverse_row_norm(eta).update(
        {"kernel": jnp.ones_like(p["kernel"])}, optax.EmptyState(), p
    )
    factors = np.asarray(u["kernel"])[0]
    assert np.all(np.diff(factors) <= 1e-6)
    assert np.all((factors > 0) & (factors <= eta * (1 + 1e-6)))


# --- elementwise --------------------------------------------------------------------------------


def _diffgrad():
    return optlab.scale_by_diffgrad()


def _adam():
    return optlab.scale_by_moments()


@settings(max_examples=40)
@given(grads=st.lists(moving, min_size=3, max_size=3))
def test_the_friction_of_diffgrad_lies_between_a_half_and_one(grads):
    zero = {"kernel": np.zeros((ROWS, COLS), np.float32)}
    for damped, adam in zip(run(_diffgrad, grads, zero), run(_adam, grads, zero), strict=True):
        ratio = flat(damped)[flat(adam) != 0] / flat(adam)[flat(adam) != 0]
        assert np.all((ratio >= 0.5 - 1e-6) & (ratio <= 1 + 1e-6))


def test_the_friction_is_one_half_for_a_constant_gradient():
    g, p = jnp.asarray([0.5, -3.0]), jnp.zeros(2)
    damped, adam = (steps(build(), [g, g], p)[-1] for build in (_diffgrad, _adam))
    np.testing.assert_allclose(damped, adam / 2, rtol=1e-6)


def _adagrad():
    return optlab.scale_by_adagrad_norm(0.0)


@settings(max_examples=40)
@given(grads=st.lists(matrices, min_size=4, max_size=4))
def test_the_steps_of_adagrad_norm_have_norm_at_most_one_and_bounded_weighted_sum(grads):
    zero = {"kernel": np.zeros((ROWS, COLS), np.float32)}
    norms = [np.linalg.norm(flat(u)) for u in run(_adagrad, grads, zero)]
    assert all(norm <= 1 + 1e-6 for norm in norms)
    # sum |g_t|^2/b_t <= 2 b_T: the lemma behind its rate.
    squares = np.array([np.sum(flat(g) ** 2) for g in grads])
    b = np.sqrt(np.cumsum(squares))
    weighted = sum(norm * np.sqrt(s) for norm, s in zip(norms, squares, strict=True))
    assert weighted <= 2 * b[-1] * (1 + 1e-6)
    first = next((i for i, s in enumerate(squares) if s), None)
    assert first is None or abs(norms[first] - 1) < 1e-5  # from b_0 = 0 the first step has norm 1


# --- Lion-K solves a constrained problem --------------------------------------------------------

_DUAL = {
    "l1": ("l1", lambda p: np.abs(p).max()),
    "l2": ("l2", np.linalg.norm),
    "lp": (kappa.lp(3.0), lambda p: np.sum(np.abs(p) ** 1.5) ** (2 / 3)),
    "nuclear": ("nuclear", lambda p: np.linalg.norm(p, 2)),
    "top_k": (kappa.top_k(2), lambda p: max(np.abs(p).max(), np.abs(p).sum() / 2)),
    "huber": (kappa.huber(0.5), lambda p: np.abs(p).max()),
    "dead_zone": (kappa.dead_zone(0.1), lambda p: np.abs(p).max()),
    "smooth_sign": (kappa.smooth_sign(0.1), lambda p: np.abs(p).max()),
}


@pytest.mark.parametrize("name", _DUAL)
def test_decay_w_holds_lion_k_within_its_ball_of_radius_1_over_w(name):
    gradient_of, dual_norm = _DUAL[name]
    w, target = 2.0, 5 * jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    tx = optlab.lion_k(0.05, kappa=gradient_of, weight_decay=w)
    params = {"kernel": 0.05 * target}
    state = tx.init(params)

    @jax.jit
    def train(params, state):
        def body(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda p: p - target, params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), params["kernel"]

        return jax.lax.scan(body, (params, state), None, length=120)[1]

    path = np.asarray(train(params, state), np.float64)
    norms = np.array([dual_norm(p) for p in path])
    # From outside the ball, the excess shrinks by 1 - lr w a step; inside, the step keeps it in.
    excess = max(norms[0] - 1 / w, 0) * (1 - 0.05 * w) ** np.arange(len(norms))
    assert np.all(norms <= 1 / w + excess + 1e-5)
    assert norms[-1] > 0.9 / w, "a target outside the ball is met on its surface"


# --- identities between recipes -----------------------------------------------------------------

TREE = default_params()
NOISE = [random_like(TREE, seed=t + 1) for t in range(5)]
DECAY = {"weight_decay": 0.1}
_as_weights = optax.stateless(lambda updates, params: params)
IDENTITIES = {
    "signum is lion with b1 = b2": (
        optlab.signum(0.1, momentum=0.9, **DECAY), optlab.lion(0.1, b1=0.9, b2=0.9, **DECAY)
    ),
    "lion is lion_k of l1": (optlab.lion(0.1, **DECAY), optlab.lion_k(0.1, kappa="l1", **DECAY)),
    "lion with b1 = 0 is sign descent": (optlab.lion(0.1, b1=0.0), optlab.signum(0.1, momentum=0)),
    "a narrow huber is lion": (
        optlab.lion(0.1), optlab.lion_k(0.1, kappa=kappa.huber(1e-30))
    ),
    "a narrow log cosh is lion": (
        optlab.lion(0.1), optlab.lion_k(0.1, kappa=kappa.smooth_sign(1e-30))
    ),
    "top_k of everything is lion": (optlab.lion(0.1), optlab.lion_k(0.1, kappa=kappa.top_k(999))),
    "an empty dead zone is lion": (optlab.lion(0.1), optlab.lion_k(0.1, kappa=kappa.dead_zone(0))),
    "lp of 2 is l2": (
        optlab.lion_k(0.1, kappa=kappa.lp(2.0)), optlab.lion_k(0.1, kappa="l2")
    ),
    "quadratic lion_k is averaged descent with decay": (
        optlab.lion_k(0.1, kappa="quadratic", b1=0.9, b2=0.9, **DECAY),
        optax.chain(
            optax.ema(0.9, debias=False), optax.add_decayed_weights(0.1), optax.scale(-0.1)
        ),
    ),
    "adamp that never projects is adamw": (
        optlab.adamp(0.1, delta=0.0, **DECAY), optax.adamw(0.1, **DECAY)
    ),
    "adamp on vectors alone is adamw": (
        optlab.adamp(0.1, layout=lambda path, leaf: None, **DECAY), optax.adamw(0.1, **DECAY)
    ),
    "sgdp that never projects is momentum descent": (
        optlab.sgdp(0.1, delta=0.0, momentum=0.8), optax.sgd(0.1, momentum=0.8)
    ),
    "sgdp that never projects, nesterov": (
        optlab.sgdp(0.1, delta=0.0, momentum=0.8, nesterov=True),
        optax.sgd(0.1, momentum=0.8, nesterov=True),
    ),
    "sgdp that always projects and forgets is remove_radial": (
        optlab.sgdp(0.1, delta=1e9, momentum=0.0),
        optax.chain(optlab.remove_radial(layout=layout.flax), optax.scale(-0.1)),
    ),
    "sgdp's released code is the paper's under nesterov": (
        optlab.sgdp(0.1, delta=1.5, nesterov=True, official=True),
        optlab.sgdp(0.1, delta=1.5, nesterov=True),
    ),
    "lamb without ratio is adamw": (
        optlab.lamb(0.1, trust_ratio_mask=False, eps=1e-8, **DECAY), optax.adamw(0.1, **DECAY)
    ),
    "lars without ratio and rate inside is momentum descent": (
        optlab.lars(0.1, trust_ratio_mask=False), optax.sgd(0.1, momentum=0.9)
    ),
    "a constant rate inside or outside of the buffer of lars": (
        optlab.lars(1.0, nesterov=True, **DECAY),
        optlab.lars(1.0, nesterov=True, lr_in_momentum=False, **DECAY),
    ),
    "larc under a small rate is descent at that rate": (
        optlab.lars(1e-3, larc=True, trust_coefficient=1e3), optax.sgd(1e-3, momentum=0.9)
    ),
    "adabelief without memory of the mean is adam around zero": (
        optlab.adabelief(0.1, b1=0.0, b2=0.0, eps=1.0), optax.sgd(0.1 / 2)
    ),
    "diffgrad coupled or decoupled without decay": (
        optlab.diffgrad(0.1, decoupled=True), optlab.diffgrad(0.1)
    ),
    "diffgrad's eps before or after the correction, when it is zero": (
        optlab.diffgrad(0.1, eps=0.0, official=True), optlab.diffgrad(0.1, eps=0.0)
    ),
    "adagrad_norm under a huge b0 is descent": (
        optlab.adagrad_norm(1e5, b0=1e6), optax.sgd(0.1)
    ),
    "allora's factor and a linear base commute": (
        optlab.allora(0.1, base=optax.scale(3.0)),
        optlab.allora(0.1, base=optax.scale(3.0), after_base=False),
    ),
    "nap that holds nothing is adam": (
        optlab.nap(0.1, mask=False), optax.adam(0.1)
    ),
    "nap before its first projection is adam": (
        optlab.nap(0.1, every_k=6), optax.adam(0.1)
    ),
    "decay after the update is decay before it and a smaller step": (
        optax.chain(optax.sgd(0.1), optlab.decay_after_update(0.1, 0.5)),
        optax.chain(optax.scale(0.95), optax.add_decayed_weights(0.5), optax.scale(-0.1)),
    ),
    "cautious decay of weights as gradients is decay": (
        optax.chain(_as_weights, optlab.add_cautious_decay(0.5), optax.scale(-0.1)),
        optax.chain(_as_weights, optax.add_decayed_weights(0.5), optax.scale(-0.1)),
    ),
    "cautious decay of weights against gradients is none": (
        optax.chain(_as_weights, optax.scale(-1), optlab.add_cautious_decay(0.5)),
        optax.chain(_as_weights, optax.scale(-1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IDENTITIES)
def test_degenerate_identity(name):
    first, second = (steps(tx, NOISE, TREE) for tx in IDENTITIES[name])
    largest = np.abs(flat(second)).max()
    assert largest > 1e-4
    np.testing.assert_allclose(flat(first), flat(second), rtol=2e-4, atol=2e-6 * largest)


@pytest.mark.parametrize("b2", [0.0, 0.01, 0.45, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("b1", [0.0, 0.5, 0.9, 0.99])
def test_the_momentum_that_reads_the_new_average_is_the_textbook_one(b1, b2):
    fast = steps(optlab.interpolate_momentum(b1, b2), NOISE, TREE)
    textbook = steps(optlab.interpolate_momentum(jnp.float32(b1), jnp.float32(b2)), NOISE, TREE)
    np.testing.assert_allclose(flat(fast), flat(textbook), rtol=0, atol=4e-6)


def test_at_b2_zero_the_average_is_the_gradient():
    tx = optlab.interpolate_momentum(0.9, 0.0)
    state = tx.init(TREE)
    _, state = tx.update(NOISE[0], state)
    np.testing.assert_array_equal(flat(state.mu), flat(NOISE[0]))
    second, _ = tx.update(NOISE[1], state)
    want = 0.9 * flat(NOISE[0]) + 0.1 * flat(NOISE[1])
    np.testing.assert_allclose(flat(second), want, rtol=0, atol=1e-6)


# --- narrow leaves --------------------------------------------------------------------------------

PRIMITIVES = {
    "interpolate_momentum": optlab.interpolate_momentum(),
    "scale_by_moments": optlab.scale_by_moments(),
    "scale_by_belief": optlab.scale_by_belief(eps=1e-8),
    "scale_by_diffgrad": optlab.scale_by_diffgrad(),
    "apply_kappa": optlab.apply_kappa("l2"),
    "remove_radial": optlab.remove_radial(),
    "project_radial": optlab.project_radial(optax.identity(), delta=1e3, weight_decay=0.1),
    "normalize_and_project": optlab.normalize_and_project(optax.identity()),
    "scale_by_adagrad_norm": optlab.scale_by_adagrad_norm(),
    "scale_by_trust_ratio": optlab.scale_by_trust_ratio(0.1, weight_decay=0.1),
    "scale_by_inverse_row_norm": optlab.scale_by_inverse_row_norm(),
    "add_cautious_decay": optlab.add_cautious_decay(0.1),
    "decay_after_update": optlab.decay_after_update(0.1, 0.1),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_bfloat16_leaves_are_computed_in_float32_and_rounded_once(name):
    shapes = {"kernel": (16, 8)}
    narrow = [random_like(shapes, seed, jnp.bfloat16) for seed in (0, 1)]
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    (found,), (exact,) = (steps(PRIMITIVES[name], [g], p) for p, g in (narrow, wide))
    rounded = exact["kernel"].astype(jnp.bfloat16)
    assert np.any(rounded.astype(jnp.float32) != exact["kernel"]), "nothing is rounded here"
    np.testing.assert_array_equal(flat(found), flat(rounded))


# --- wsd ----------------------------------------------------------------------------------------

DECAYS = ["linear", "cosine", "one_minus_sqrt", "exponential", "inverse_proportional"]
WARMUP, STABLE, LENGTH = 5, 9, 12
JOINTS = np.array([0, 1, WARMUP, WARMUP + STABLE, WARMUP + STABLE + LENGTH])


def _wsd(decay, scale=1):
    lengths = (WARMUP * scale, STABLE * scale, LENGTH * scale)
    return optlab.wsd(2.0, *lengths, init_value=0.1, end_value=0.01, decay=decay)


@pytest.mark.parametrize("decay", DECAYS)
def test_wsd_of_an_int_an_array_a_trace_and_a_batch_agree(decay):
    schedule = _wsd(decay)
    steps_ = np.arange(40, dtype=np.int32)
    batch = schedule(jnp.asarray(steps_))
    np.testing.assert_allclose([schedule(int(t)) for t in steps_], batch, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(schedule)(steps_), batch, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedule)(steps_), batch, rtol=1e-6)


@pytest.mark.parametrize("decay", DECAYS)
def test_wsd_is_finite_monotone_after_warmup_and_ends_where_it_says(decay):
    far = np.array([0, 1, 25, 26, 27, 2**24 + 1, 2**31 - 2, 2**31 - 1], np.int32)
    values = np.asarray(_wsd(decay)(far))
    assert np.all(np.isfinite(values))
    np.testing.assert_array_equal(values[3:], np.float32(0.01))
    falling = np.asarray(_wsd(decay)(np.arange(WARMUP, 40)))
    assert np.all(np.diff(falling) <= 0)
    assert falling[0] == falling[STABLE] == 2.0


@pytest.mark.parametrize("decay", DECAYS)
def test_wsd_has_no_jump_at_a_joint(decay):
    fine = 2**14
    joints = JOINTS * fine
    schedule = _wsd(decay, fine)
    beside = [np.asarray(schedule(np.maximum(joints + d, 0))) for d in (-1, 0, 1)]
    # 1 - sqrt falls by sqrt(1/D) in its first step, the steepest of all.
    bound = 2.0 / np.sqrt(LENGTH * fine) + 1e-6
    assert max(np.abs(np.diff(beside, axis=0)).max(), 0) <= bound


@pytest.mark.parametrize("decay", DECAYS)
def test_wsd_is_differentiable_in_the_step(decay):
    slopes = jax.vmap(jax.grad(_wsd(decay)))(np.arange(0, 40, 0.5, dtype=np.float32))
    assert np.all(np.isfinite(slopes))
    assert np.any(np.asarray(slopes) < 0)


@pytest.mark.parametrize("decay", ["linear", "one_minus_sqrt"])
def test_wsd_without_warmup_or_decay_begins_at_the_peak_and_drops(decay):
    schedule = optlab.wsd(1.0, 0, 3, 0, end_value=0.5, decay=decay)
    np.testing.assert_array_equal(schedule(np.arange(6)), [1, 1, 1, 0.5, 0.5, 0.5])
