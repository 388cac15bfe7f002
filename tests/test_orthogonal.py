"""Muon to LANTON: recipes against their references, and the laws of norm balls and of noise."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from reference import lanton as lanton_reference
from reference import muon as muon_reference
from reference import normuon as normuon_reference
from reference import scion as scion_reference
from stepping import flat, steps

import optlab
from optlab import MatrixView, layout
from optlab.recipes.lmo import lanton, scion
from optlab.testing.case import random_like
from optlab.testing.sharding import mesh_of
from optlab.transforms import lmo
from optlab.transforms.lmo import scale_by_lmo
from optlab.transforms.noise import noise_adaptive, noise_multipliers, nuclear_norm

# --- references -----------------------------------------------------------------------------------

STEPS = 10
# Absolute, on parameters of size 1 to 3: about twenty roundings of either format.
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}

SHAPES = {
    "attn/query/kernel": (8, 2, 4),
    "conv/kernel": (3, 3, 2, 8),
    "dense/bias": (16,),
    "dense/kernel": (8, 16),
    "embed/embedding": (5, 4),
    "lm_head/kernel": (6, 10),
    "temperature": (),
}
# (inputs, outputs), and the role: what the layout has to find by itself.
SIDES = {
    "attn/query/kernel": ((8, 8), "matrix"),
    "conv/kernel": ((18, 8), "matrix"),
    "dense/bias": ((1, 16), "vector"),
    "dense/kernel": ((8, 16), "matrix"),
    "embed/embedding": ((5, 4), "embedding"),
    "lm_head/kernel": ((6, 10), "head"),
    "temperature": ((1, 1), "scalar"),
}
ROLE = {name: role for name, (_, role) in SIDES.items()}
MATRICES = [name for name, role in ROLE.items() if role == "matrix"]


def _draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    single = {name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}
    return {name: np.asarray(x, np.float64) for name, x in single.items()}


PARAMS, GRADS = _draw(0), [_draw(t + 1) for t in range(STEPS)]


def _as_matrix(name: str, x: np.ndarray) -> np.ndarray:
    # The sign of an embedding is divided by the length of a vector.
    return x.T if ROLE[name] == "embedding" else x.reshape(SIDES[name][0])


def _as_leaf(name: str, x: np.ndarray) -> np.ndarray:
    return x.T if ROLE[name] == "embedding" else x.reshape(SHAPES[name])


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe beside a reference; `leaf` gives the reference's arguments of one leaf."""

    name: str
    make: Callable[..., optax.GradientTransformation]
    leaf: Callable[..., Any]
    rate: float = 0.1
    decays: bool = True


def _leafwise(reference: Callable, **options: Any) -> Callable:
    """Run the reference on the matrices; other leaves descend."""

    def run(name, p, gs, lrs, decay):
        if ROLE[name] != "matrix":
            return [p := p - lr * g for g, lr in zip(gs, lrs, strict=True)]
        return reference(p, gs, lrs, weight_decay=decay, **options)

    return run


def _muon(name: str, options: dict, form: str = "ema") -> Case:
    make = functools.partial(optlab.muon, b1=0.9, accumulation=form, **options)
    reference = _leafwise(muon_reference.muon, b1=0.9, form=form, **options)
    return Case(f"muon-{name}", make, reference)


def _normuon(name: str, options: dict) -> Case:
    shared = {"b1": 0.9, "b2": 0.8} | options
    make = functools.partial(optlab.normuon, **shared)
    return Case(f"normuon-{name}", make, _leafwise(normuon_reference.normuon, **shared))


def _scion(name: str, constrained: bool = True, **changes: Any) -> Case:
    balls = {
        "matrix": ("spectral", 2.0),
        "embedding": ("sign", 3.0),
        "head": ("per_output", 2.0),
        "vector": ("rms", 1.5),
        "scalar": ("rms", 0.5),
    } | changes

    def run(leaf, p, gs, lrs, decay):
        norm, radius = balls[ROLE[leaf]]
        ball = {"norm": norm, "radius": radius, "constrained": constrained}
        return scion_reference.scion(p, gs, lrs, b1=0.8, **ball)

    make = functools.partial(scion, norms=balls, b1=0.8, constrained=constrained)
    return Case(f"scion-{name}", make, run, decays=False)


CASES = [
    _muon("paper", {}),
    _muon("plain", {"nesterov": False, "scale": "spectral"}),
    _muon("moonlight", {"scale": "moonlight"}, form="sum"),
    _muon("optax", {}, form="debiased"),
    _muon("cautious", {"cautious": True}),
    _normuon("paper", {}),
    _normuon("official", {"scale": "keller"}),
    _scion("constrained"),
    _scion("unconstrained", constrained=False, matrix=("per_input", 1.0), head=("max", 0.3)),
]  # fmt: skip


def _cast(tree: dict[str, Any], dtype: str) -> dict[str, jax.Array]:
    return {k: jnp.asarray(x, dtype) for k, x in tree.items()}


def _ours(tx: optax.GradientTransformation, dtype: str) -> list[dict[str, Any]]:
    params, update, out = _cast(PARAMS, dtype), jax.jit(tx.update), []
    state = tx.init(params)
    for grads in GRADS:
        updates, state = update(_cast(grads, dtype), state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out


def _compare(found: list, expected: dict[str, list], dtype: str) -> None:
    for name, path in expected.items():
        for t, theirs in enumerate(path):
            ours = found[t][name]
            assert ours.dtype == dtype
            np.testing.assert_allclose(
                ours, _as_leaf(name, theirs), rtol=0, atol=TOLERANCE[dtype], err_msg=f"{name}, {t}"
            )
        moved = np.abs(np.asarray(found[-1][name]) - PARAMS[name]).max()
        assert moved > 1e-3, f"{name} did not move"


def _expected(case: Case, rates: list[float], decay: dict[str, float]) -> dict[str, list]:
    columns = {}
    for name in SHAPES:
        matrices = [_as_matrix(name, tree[name]) for tree in (PARAMS, *GRADS)]
        columns[name] = case.leaf(name, matrices[0], matrices[1:], rates, decay[name])
    return columns


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recipe_follows_its_reference_in_float32(case):
    options = {"weight_decay": 0.3, "fallback": optax.sgd(case.rate)} if case.decays else {}
    expected = _expected(case, [case.rate] * STEPS, dict.fromkeys(SHAPES, 0.3))
    _compare(_ours(case.make(case.rate, **options), "float32"), expected, "float32")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recipe_follows_its_reference_in_float64_under_a_schedule_and_a_decay_mask(case):
    rate = lambda t: case.rate / (1 + t)  # noqa: E731
    mask = {name: name != "dense/kernel" for name in SHAPES}
    options = {"weight_decay": 0.3, "weight_decay_mask": mask, "fallback": optax.sgd(rate)}
    decay = {name: 0.3 * mask[name] for name in SHAPES}
    expected = _expected(case, [rate(t) for t in range(STEPS)], decay)
    with jax.enable_x64(True):
        found = _ours(case.make(rate, **(options if case.decays else {})), "float64")
    _compare(found, expected, "float64")


LANTON = {"b1": 0.8, "b2": 0.7, "alpha": 3.0}
BY_SIDE = {name: name.split("/")[0] in ("conv", "dense") for name in SHAPES}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("exact", "groups"), [(True, None), (False, None), (True, BY_SIDE)],
    ids=["exact", "polar", "groups"],
)  # fmt: skip
def test_lanton_follows_its_reference(dtype, exact, groups):
    by_role = {"matrix": "spectral", "vector": "rms", "scalar": "rms"}
    norms = by_role | {"embedding": "sign", "head": "sign"}
    theirs = {name: norms[ROLE[name]] for name in SHAPES}
    decay = {name: 0.3 * (name != "dense/kernel") for name in SHAPES}
    ps, *gs = [{k: _as_matrix(k, x) for k, x in tree.items()} for tree in (PARAMS, *GRADS)]
    options = {"norms": theirs, "groups": groups or theirs, "weight_decay": decay, "exact": exact}
    path = lanton_reference.lanton(ps, gs, [0.1] * STEPS, **LANTON, **options)
    with jax.enable_x64(dtype == "float64"):
        mask = {name: d > 0 for name, d in decay.items()}
        options = {"weight_decay": 0.3, "weight_decay_mask": mask, "groups": groups}
        found = _ours(lanton(0.1, exact_noise=exact, **options, **LANTON), dtype)
    _compare(found, {name: [ps[name] for ps in path] for name in SHAPES}, dtype)


# --- norm balls -----------------------------------------------------------------------------------

# The norm of w, inputs by outputs, written from the table of `scale_by_lmo`.
PRIMAL = {
    "sign": lambda w: w.shape[0] * np.abs(w).max(),
    "max": lambda w: np.abs(w).max(),
    "per_input": lambda w: np.sqrt(np.mean(w**2, 1)).max(),
    "per_output": lambda w: np.sqrt(w.shape[0]) * np.linalg.norm(w, axis=0).max(),
    "rms": lambda w: np.sqrt(np.mean(w**2)),
    "spectral": lambda w: np.sqrt(w.shape[0] / w.shape[1]) * np.linalg.norm(w, 2),
}


def _direction_of(norm: str) -> Callable:
    if norm == "spectral":
        return optax.chain(optlab.orthogonalize("svd"), optlab.scale_by_shape("spectral"))
    return scale_by_lmo(norm, eps=0.0)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (5, 1)])
@pytest.mark.parametrize("norm", PRIMAL)
def test_the_direction_lies_on_the_ball_and_attains_the_dual_norm(norm, shape):
    rng = np.random.default_rng(0)
    g, primal = rng.normal(size=shape), PRIMAL[norm]
    dual = lanton_reference.DUALS[norm](g)
    with jax.enable_x64(True):
        tx, tree = _direction_of(norm), {"kernel": jnp.asarray(g)}
        d = np.asarray(tx.update(tree, tx.init(tree))[0]["kernel"])
        if norm != "spectral":
            ours = lmo.dual_norm(norm, jnp.asarray(g), MatrixView((0,), (1,)))
            np.testing.assert_allclose(ours, dual, rtol=1e-12)
    np.testing.assert_allclose(primal(d), 1, rtol=1e-12)
    np.testing.assert_allclose(np.sum(g * d), dual, rtol=1e-12)
    # Nothing else in the ball reaches further.
    for other in rng.normal(size=(100, *shape)):
        assert np.sum(g * other) <= dual * primal(other) * (1 + 1e-12)


@pytest.mark.parametrize("norm", lmo.NORMS)
def test_zero_has_direction_zero_and_a_zero_row_poisons_no_other(norm):
    g = jnp.zeros((3, 4)).at[1].set(2.0)
    tx = scale_by_lmo(norm)
    for tree in ({"kernel": 0 * g}, {"kernel": g}):
        (d,) = steps(tx, [tree], tree)
        assert np.all(np.isfinite(d["kernel"]))
        np.testing.assert_array_equal(d["kernel"][0], 0)
    assert np.all(d["kernel"][1] > 0)


@pytest.mark.parametrize("norm", lmo.NORMS)
def test_a_vector_is_a_matrix_of_one_input(norm):
    g = np.random.default_rng(1).normal(size=7).astype(np.float32)
    leaves = {"bias": jnp.asarray(g), "kernel": jnp.asarray(g[None, :])}
    (d,) = steps(scale_by_lmo(norm), [leaves], leaves)
    np.testing.assert_allclose(d["bias"], d["kernel"][0], rtol=1e-6)


def test_the_sign_of_an_embedding_is_divided_by_the_length_of_a_vector():
    leaves = {"embedding": jnp.ones((50, 4)), "lm_head/kernel": jnp.ones((4, 50))}
    (d,) = steps(scale_by_lmo("sign"), [leaves], leaves)
    assert np.all(d["embedding"] == 0.25)
    assert np.all(d["lm_head/kernel"] == 0.25)


STACK = layout.stacked("layers/")


def _layers(stack):
    return {f"{i}/kernel": x for i, x in enumerate(stack)}


@pytest.mark.parametrize("norm", lmo.NORMS)
def test_a_stack_of_layers_gets_a_ball_per_layer(norm):
    x = random_like({"k": (3, 4, 6)}, seed=2)["k"]
    stack, single = {"layers/kernel": x}, _layers(x)
    (found,) = steps(scale_by_lmo(norm, layout=STACK), [stack], stack)
    (want,) = steps(scale_by_lmo(norm), [single], single)
    np.testing.assert_allclose(found["layers/kernel"], np.stack(list(want.values())), rtol=1e-6)
    # The dual norms likewise, one per layer.
    view = MatrixView((1,), (2,))
    each = [lanton_reference.DUALS[norm](np.asarray(layer, np.float64)) for layer in x]
    np.testing.assert_allclose(lmo.dual_norm(norm, x, view), each, rtol=1e-5)


@pytest.mark.parametrize("c", [0.25, 2.0**20])
def test_scion_does_not_see_the_scale_of_gradients(c):
    grads = [_cast(g, "float32") for g in GRADS[:3]]
    params = _cast(PARAMS, "float32")
    scaled = [jax.tree.map(lambda x: np.float32(c) * x, g) for g in grads]
    want, found = (flat(steps(scion(0.01), gs, params)) for gs in (grads, scaled))
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-6)


def test_constrained_scion_stays_in_its_ball():
    tx, p = scion(0.3, norms={"matrix": ("spectral", 2.0)}, polar="svd"), {"kernel": jnp.eye(4)}
    state = tx.init(p)
    for seed in range(20):
        updates, state = tx.update(random_like(p, seed), state, p)
        p = optax.apply_updates(p, updates)
        assert np.linalg.norm(p["kernel"], 2) <= 2 + 1e-5
    assert np.linalg.norm(p["kernel"], 2) > 1


# --- noise ----------------------------------------------------------------------------------------


def _loud_and_quiet(t: int) -> dict[str, jax.Array]:
    sign = 1.0 if t % 2 else -1.0
    loud, quiet = sign * jnp.ones((4, 3)), (1 + 0.01 * sign) * jnp.ones((4, 3))
    return {"bias": sign * jnp.ones(3), "loud/kernel": loud, "quiet/kernel": quiet}


def _multipliers(tx: optax.GradientTransformation, grads: list) -> list[dict[str, float]]:
    """Return what each leaf's gradient was multiplied by, for an inner that is the identity."""
    found = steps(tx, grads, jax.tree.map(jnp.zeros_like, grads[0]))
    ratio = lambda u, g: float(jnp.sum(u * g) / jnp.sum(g * g))  # noqa: E731
    return [jax.tree.map(ratio, u, g) for u, g in zip(found, grads, strict=True)]


def test_the_quietest_of_a_group_keeps_its_rate_and_a_group_of_one_always_does():
    tx = noise_adaptive(optax.identity(), alpha=0.1)
    found = _multipliers(tx, [_loud_and_quiet(t) for t in range(6)])
    for t, at in enumerate(found):
        assert at["quiet/kernel"] == pytest.approx(1, abs=1e-6)
        assert at["bias"] == pytest.approx(1, abs=1e-6), "alone in its group"
        assert (at["loud/kernel"] < 0.5) == (t > 0), "there is no difference at the first step"


def test_groups_decide_what_is_compared():
    grads = [_loud_and_quiet(t) for t in range(3)]
    make = functools.partial(noise_adaptive, optax.identity(), alpha=0.1)
    apart = _multipliers(make(groups=lambda path, leaf: path), grads)
    np.testing.assert_allclose([list(at.values()) for at in apart], 1, rtol=1e-6)
    for together in (lambda path, leaf: "all", "all", dict.fromkeys(grads[0], 0)):
        assert _multipliers(make(groups=together), grads)[-1]["bias"] < 0.6


def test_the_multiplier_of_loud_matrices_is_the_fourth_root_of_the_ratio_of_noises():
    noise = jnp.asarray([16e8, 1e8, 5.0, 0.0])
    found = noise_multipliers(noise, ["a", "a", "b", "b"], 1e-3)
    np.testing.assert_allclose(found, [0.5, 1, (1e-6 / 5) ** 0.25, 1], rtol=1e-4)


def test_noise_that_overflows_leaves_every_multiplier_finite():
    grads = [{"a": {"kernel": jnp.full((3, 3), 1e30 * s)}} for s in (1.0, -1.0, 1.0)]
    for updates in steps(noise_adaptive(optax.identity()), grads, grads[0]):
        assert np.all(np.isfinite(flat(updates)))


def test_a_stack_of_layers_has_the_noise_of_its_layers():
    grads = [random_like({"k": (3, 4, 6)}, seed)["k"] for seed in range(4)]
    stacks, single = [{"layers/kernel": g} for g in grads], [_layers(g) for g in grads]
    stacked, each = noise_adaptive(optax.identity(), layout=STACK), noise_adaptive(optax.identity())
    found, want = steps(stacked, stacks, stacks[0]), steps(each, single, single[0])
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_allclose(
            ours["layers/kernel"], np.stack(list(theirs.values())), rtol=1e-5
        )
    assert np.any(np.abs(found[-1]["layers/kernel"] - grads[-1]) > 1e-3)


def test_a_convolution_has_the_noise_of_its_matrix():
    shape, flat_shape = (3, 3, 2, 8), (18, 8)
    drawn = [random_like({"conv": {"kernel": shape}, "kernel": (4, 4)}, s) for s in range(4)]
    merged = [g | {"conv": {"kernel": g["conv"]["kernel"].reshape(flat_shape)}} for g in drawn]
    view = layout.rules({"conv": MatrixView((0,), (1,))})
    found = steps(noise_adaptive(optax.identity()), drawn, drawn[0])
    want = steps(noise_adaptive(optax.identity(), layout=view), merged, merged[0])
    np.testing.assert_allclose(flat(found), flat(want), rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_noise_does_not_depend_on_the_mesh(kind):
    specs = {
        "bias": P("model"),
        "kernel": P("data", "model"),
        "layers/kernel": P("data", None, "model"),
    }
    shapes = {"bias": (8,), "kernel": (8, 6), "layers/kernel": (4, 8, 6)}
    grads = [random_like(shapes, seed) for seed in range(3)]
    mesh = mesh_of(kind)
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    placed = [{k: jax.device_put(g[k], places[k]) for k in g} for g in grads]
    shardings = places if kind == AxisType.Auto else None
    norms = {"matrix": "spectral", "vector": "per_input"}
    make = functools.partial(
        noise_adaptive, optax.identity(), norms=norms, layout=STACK, groups="all"
    )
    want = steps(make(), grads, grads[0])
    with jax.set_mesh(mesh):
        tx = make(shardings=shardings)
        state, step = jax.jit(tx.init)(placed[0]), jax.jit(tx.update)
        for g, wanted in zip(placed, want, strict=True):
            found, state = step(g, state)
            np.testing.assert_allclose(flat(found), flat(wanted), rtol=1e-5, atol=1e-6)
    assert all(found[k].sharding.is_equivalent_to(places[k], found[k].ndim) for k in places)


def test_a_missing_gradient_keeps_its_noise_and_counts_for_no_maximum():
    tx, grads = noise_adaptive(optax.identity(), alpha=0.1), [_loud_and_quiet(t) for t in range(4)]
    state = tx.init(jax.tree.map(jnp.zeros_like, grads[0]))
    for g in grads[:3]:
        _, state = tx.update(g, state)
    u, after = tx.update(grads[3] | {"quiet/kernel": None}, state)
    assert u["quiet/kernel"] is None
    # Alone with a gradient, the loud one is the quietest.
    np.testing.assert_allclose(u["loud/kernel"], grads[3]["loud/kernel"], rtol=1e-6)
    noise = lambda s: np.asarray(s.inner.noise)  # noqa: E731
    assert noise(after)[2] == noise(state)[2]
    assert noise(after)[1] != noise(state)[1]


@pytest.mark.parametrize("make", [scion, lanton])
def test_roles_left_out_go_to_the_fallback_and_a_missing_gradient_keeps_its_role(make):
    norms = {"matrix": ("spectral", 1.0) if make is scion else "spectral"}
    tx = make(0.1, norms=norms, fallback=optax.sgd(0.5))
    params = {"bias": jnp.ones(3), "deep": [{"kernel": jnp.eye(3)}], "kernel": jnp.eye(3)}
    state = tx.init(params)
    grads = params | {"kernel": None}
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        np.testing.assert_array_equal(updates["bias"], -0.5 * grads["bias"])
        assert updates["kernel"] is None
        assert np.abs(updates["deep"][0]["kernel"]).max() > 0
    updates, _ = tx.update(params, state, params)
    assert np.abs(updates["kernel"]).max() > 0


# --- nuclear norms --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (2, 3, 4, 6), (4, 1)])
def test_the_nuclear_norm_is_the_sum_of_singular_values(shape):
    x = np.random.default_rng(3).normal(size=shape)
    want = np.linalg.svd(x, compute_uv=False).sum(-1)
    np.testing.assert_allclose(nuclear_norm(jnp.asarray(x, jnp.float32)), want, rtol=2e-5)
    with jax.enable_x64(True):
        np.testing.assert_allclose(nuclear_norm(jnp.asarray(x)), want, rtol=1e-12)
    assert nuclear_norm(jnp.zeros((3, 4))) == 0


@pytest.mark.parametrize("condition", [1, 10, 1e4])
def test_the_noise_by_keller_is_within_its_band_of_the_exact_one(condition):
    u, v = (np.linalg.qr(np.random.default_rng(s).normal(size=(6, 6)))[0] for s in (0, 1))
    g = (u * np.geomspace(1 / condition, 1, 6)) @ v.T
    start = {"kernel": jnp.zeros((6, 6))}
    grads = [start, {"kernel": jnp.asarray(g, jnp.float32)}]

    def noise(polar):
        tx = noise_adaptive(optax.identity(), b2=0.0, polar=polar)
        state = tx.init(start)
        for grad in grads:
            _, state = tx.update(grad, state)
        return float(jnp.sqrt(state.inner.noise[0]))

    assert 0.7 <= noise("keller") / noise(None) <= 1.2
    np.testing.assert_allclose(noise("svd"), noise(None), rtol=1e-2 if condition == 1e4 else 1e-5)


@pytest.mark.parametrize("shape", [(24, 10), (16, 32)])
def test_bfloat16_costs_the_iteration_its_roundings_only(shape):
    x = jnp.asarray(np.random.default_rng(4).normal(size=(20, *shape)), jnp.float32)
    exact = np.asarray(optlab.polar.keller()(x))
    narrow = optlab.polar.keller(dtype=jnp.bfloat16, form="direct")
    off = np.asarray(jax.jit(narrow)(x), np.float32) - exact
    # The authors' order of roundings is off by 0.032.
    assert 0.005 < np.sqrt(np.mean(off**2) / np.mean(exact**2)) < 0.032


# --- factors of the shape, momentum ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "wide", "tall"),
    [
        ("keller", 2.0, 1.0),
        ("spectral", 2.0, 0.5),
        ("moonlight", 0.8, 0.8),
        (lambda m, n: m / n, 0.25, 4.0),
    ],
)
def test_the_factor_is_that_of_inputs_and_outputs(mode, wide, tall):
    leaves = {
        "bias": jnp.ones(16),
        "embedding": jnp.ones((4, 16)),
        "tall/kernel": jnp.ones((16, 4)),
        "wide/kernel": jnp.ones((4, 16)),
    }
    (u,) = steps(optlab.scale_by_shape(mode), [leaves], leaves)
    factors = {name: float(x.ravel()[0]) for name, x in u.items()}
    want = {"bias": 1.0, "embedding": 1.0, "tall/kernel": tall, "wide/kernel": wide}
    assert factors == pytest.approx(want)


def test_the_factor_of_a_convolution_is_that_of_the_axes_that_the_layout_names():
    leaves = {"conv": jnp.ones((8, 2, 3, 12))}
    factor = lambda view: float(  # noqa: E731
        steps(optlab.scale_by_shape("spectral", layout=layout.rules({"": view})), [leaves], leaves)[
            0
        ]["conv"][0, 0, 0, 0]
    )
    assert factor(MatrixView((-1,), (-2,))) == pytest.approx(0.5)
    assert factor(MatrixView((1,), (0,))) == pytest.approx(2.0)
    assert factor(MatrixView((1, 2, 3), (0,))) == pytest.approx(1 / 3)


def _optax_average(grads, decay, nesterov):
    mu = jax.tree.map(jnp.zeros_like, grads[0])
    for t, g in enumerate(grads, start=1):
        mu = optax.tree.update_moment(g, mu, decay, 1)
        now, ahead = jnp.asarray(t), jnp.asarray(t + 1)
        corrected = optax.tree.bias_correction(mu, decay, ahead if nesterov else now)
        if nesterov:
            fresh = optax.tree.bias_correction(g, decay, now)
            corrected = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, corrected, fresh)
        yield corrected


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_debiased_average_is_that_of_optax_muon(decay, nesterov, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        grads = [_cast(g, dtype) for g in GRADS]
        found = steps(optlab.debiased_ema(decay, nesterov=nesterov), grads, grads[0])
        want = list(_optax_average(grads, decay, nesterov))
        np.testing.assert_allclose(flat(found), flat(want), rtol=tolerance, atol=tolerance)
        if not nesterov:
            want = steps(optax.ema(decay), grads, grads[0])
            np.testing.assert_allclose(flat(found), flat(want), rtol=tolerance, atol=tolerance)


# --- wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scale_by_lmo("signs"), r"norm must be one of .*Did you mean 'sign'\?"),
        (lambda: optlab.scale_by_shape("kellr"), r"mode must be one of .*Did you mean 'keller'\?"),
        (lambda: optlab.scale_by_shape(2.0), "mode must be a name or a function"),
        (lambda: scion(0.1, norms={"matrix": "spectral"}), r"Write \(\"spectral\", 50.0\)"),
        (lambda: scion(0.1, norms={"matrix": ("spectral", 0.0)}), "norms must be a number > 0"),
        (lambda: scion(0.1, norms={"vector": ("spectral", 1.0)}), '"rms" is what'),
        (lambda: lanton(0.1, norms="spectral"), "norms must be a mapping"),
        (lambda: lanton(0.1, norms={"matrix": "nuclear"}), "norms must be one of 'sign'"),
        (lambda: lanton(0.1, alpha=0.0), "lanton: alpha must be a number > 0"),
        (lambda: lanton(0.1, dual_scale="rms"), "lanton: dual_scale must be one of"),
        (lambda: noise_adaptive(optax.identity(), b2=1.0), r"b2 must be a number in \[0, 1\)"),
        (lambda: noise_adaptive("adam"), "inner must be an optax.GradientTransformation"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_fix(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_groups_that_are_no_prefix_are_refused():
    tx = noise_adaptive(optax.identity(), groups={"a": 0})
    with pytest.raises(ValueError, match=r"noise_adaptive: groups is no prefix.*function \(path"):
        tx.init({"b": jnp.ones(3)})


def test_updates_of_other_parameters_are_refused():
    tx = noise_adaptive(optax.identity())
    state = tx.init({"a": jnp.ones(3)})
    wrong = state._replace(inner=state.inner._replace(noise=jnp.zeros(2)))
    with pytest.raises(ValueError, match="hold 1 matrices, init saw 2"):
        tx.update({"a": jnp.ones(3)}, wrong)
