"""Laws that hold for every input: invariances, bounds and limits of each role."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from stepping import flat, steps

import optlab
from optlab import kappa, layout
from optlab.testing.case import random_like

ROWS, COLS = 3, 4
entries = st.floats(-8, 8, width=32).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
matrices = st.lists(entries, min_size=ROWS * COLS, max_size=ROWS * COLS).map(
    lambda xs: {"kernel": np.asarray(xs, np.float32).reshape(ROWS, COLS)}
)
moving = matrices.filter(lambda tree: np.abs(tree["kernel"]).max() > 0.1)
scales = st.sampled_from([2.0**-20, 0.25, 2.0, 1024.0, 2.0**20])


@functools.cache
def _jitted(build):
    tx = build()
    return jax.jit(lambda grads, params: steps(tx, grads, params))


def run(build, grads, params):
    """Like `steps`, compiled once for a builder that is a module-level function."""
    return _jitted(build)(grads, params)


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


@pytest.mark.parametrize("name", ["scale_by_moments", "scale_by_diffgrad"])
def test_second_moment_of_bfloat16_parameters_forgets(name):
    # 0.999 nu is nu again in bfloat16, so a second moment kept in it never falls.
    tx = getattr(optlab, name)(b1=0.0, b2=0.999, eps=0.0)
    state = tx.init(jnp.zeros(1, jnp.bfloat16))

    def step(t, state):
        g = jnp.where(t == 0, 1.0, 0.0).astype(jnp.bfloat16)[None]
        return tx.update(g, state)[1]

    state = jax.lax.fori_loop(0, 1000, step, state)
    seen = next(s for s in jax.tree.leaves(state, is_leaf=_has_nu) if _has_nu(s))
    np.testing.assert_allclose(seen.nu, [0.001 * 0.999**999], rtol=1e-3)


def _has_nu(state):
    return hasattr(state, "nu")
