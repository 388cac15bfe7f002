"""Every recipe against its NumPy reference: ten steps on leaves of rank 0 to 4.

Float32 and float64, constant rates and decay everywhere, then a scheduled rate and a decay mask.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import (
    adabelief,
    adagrad_norm,
    adamp,
    allora,
    diffgrad,
    kappas,
    lamb,
    lars,
    lion,
    nap,
    sgd_sai,
)
from reference.wsd import wsd

import optlab

STEPS = 10
# Absolute, on parameters of size 1 to 3: about twenty roundings of either format.
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}

SHAPES = {
    "attn/query/kernel": (8, 2, 4),
    "conv/kernel": (3, 3, 2, 8),
    "dense/bias": (16,),
    "dense/kernel": (8, 16),
    "embed/embedding": (5, 4),
    "temperature": (),
}
# The axes summed over for one unit, written by hand: what the layout has to find by itself.
UNITS = {
    "attn/query/kernel": (0,),
    "conv/kernel": (0, 1, 2),
    "dense/kernel": (0,),
    "embed/embedding": (1,),
}
MATRICES = {name: len(shape) > 1 for name, shape in SHAPES.items()}


def _draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    single = {name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}
    return {name: np.asarray(x, np.float64) for name, x in single.items()}


PARAMS, GRADS = _draw(0), [_draw(t + 1) for t in range(STEPS)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe with its arguments beside a reference with its own.

    `leaves` gives arguments of the reference that differ from leaf to leaf; None: it takes the
    whole tree. `decays` is off for what has no weight decay.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    reference: Callable[..., Any]
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)
    ours: dict[str, Any] = dataclasses.field(default_factory=dict)
    theirs: dict[str, Any] = dataclasses.field(default_factory=dict)
    leaves: Callable[[str], dict[str, Any]] | None = lambda name: {}
    decays: bool = True
    rate: float = 0.1
    branches: bool = False  # lax.cond outside jit compiles at every step: run under jit


ADAM = {"b1": 0.9, "b2": 0.99, "eps": 1e-6}
AVERAGE = {"b1": 0.8, "b2": 0.95}
units = lambda name: {"inputs": UNITS.get(name)}  # noqa: E731
_adagrad = functools.partial(Case, reference=adagrad_norm.adagrad_norm, leaves=None)
_sai = functools.partial(Case, reference=sgd_sai.sgd_sai, leaves=None, branches=True)


def _kappa_case(name: str, **arguments: Any) -> Case:
    ours = getattr(optlab.kappa, name)(**arguments) if arguments else name
    theirs = functools.partial(kappas.KAPPAS[name], **arguments)
    given = {"ours": {"kappa": ours}, "theirs": {"kappa": theirs}}
    return Case(f"lion_k-{name}", optlab.lion_k, lion.lion_k, AVERAGE, **given)


def _projecting(name: str, make: Any, reference: Any, **shared: Any) -> Case:
    # At 0.1 nothing here would be orthogonal enough; 1.5 splits the leaves.
    shared = {"delta": 1.5, "wd_ratio": 0.2, **shared}
    return Case(name, make, reference, shared, leaves=units)


SIGNS = {"kappa": np.sign}
CASES = [
    Case("lion", optlab.lion, lion.lion_k, AVERAGE, theirs=SIGNS),
    Case("lion-b1_over_2_b2", optlab.lion, lion.lion_k, {"b1": 0.9, "b2": 0.3}, theirs=SIGNS),
    Case("lion-b2_zero", optlab.lion, lion.lion_k, {"b1": 0.9, "b2": 0.0}, theirs=SIGNS),
    *(_kappa_case(name) for name in ("l1", "l2", "quadratic", "nuclear")),
    _kappa_case("lp", p=1.5),
    _kappa_case("huber", e=0.3),
    _kappa_case("dead_zone", e=0.1),
    _kappa_case("top_k", k=3),
    _kappa_case("smooth_sign", s=0.4),
    Case("signum", optlab.signum, lion.signum, {"momentum": 0.9}),
    Case("signum-memoryless", optlab.signum, lion.signum, {"momentum": 0}),
    _projecting("adamp", optlab.adamp, adamp.adamp, **ADAM),
    _projecting("adamp-nesterov", optlab.adamp, adamp.adamp, nesterov=True, **ADAM),
    _projecting("sgdp", optlab.sgdp, adamp.sgdp, momentum=0.7),
    _projecting("sgdp-dampened", optlab.sgdp, adamp.sgdp, momentum=0.7, dampening=0.4),
    _projecting("sgdp-nesterov", optlab.sgdp, adamp.sgdp, momentum=0.7, nesterov=True),
    _projecting("sgdp-official", optlab.sgdp, adamp.sgdp, momentum=0.7, official=True),
    Case("nap", optlab.nap, nap.nap, ADAM, leaves=lambda n: {"held": MATRICES[n]}, decays=False),
    Case(
        "nap-every_k", optlab.nap, nap.nap, ADAM | {"every_k": 3},
        leaves=lambda n: {"held": MATRICES[n]}, decays=False, branches=True,
    ),
    Case("diffgrad", optlab.diffgrad, diffgrad.diffgrad, ADAM),
    Case("diffgrad-decoupled", optlab.diffgrad, diffgrad.diffgrad, ADAM | {"decoupled": True}),
    Case(
        "diffgrad-official", optlab.diffgrad, diffgrad.diffgrad,
        ADAM | {"official": True, "amsgrad": True, "eps_root": 1e-3},
    ),
    Case("adabelief", optlab.adabelief, adabelief.adabelief, ADAM),
    Case("adabelief-anew", optlab.adabelief, adabelief.adabelief, ADAM | {"accumulate_eps": False}),
    Case(
        "adabelief-amsgrad", optlab.adabelief, adabelief.adabelief,
        ADAM | {"amsgrad": True, "decoupled": False, "eps_root": 1e-4},
    ),
    Case("adabelief-rectify", optlab.adabelief, adabelief.adabelief, ADAM | {"rectify": True}),
    _adagrad("adagrad_norm", optlab.adagrad_norm, shared={"b0": 0.5}),
    _adagrad("adagrad_norm-per_leaf", optlab.adagrad_norm, shared={"b0": 0.0, "per_leaf": True}),
    *(
        Case(
            f"lars-{name}", optlab.lars, lars.lars,
            {"momentum": 0.9, "trust_coefficient": 0.1} | options,
        )
        for name, options in {
            "paper": {},
            "nesterov": {"nesterov": True, "eps": 1e-3},
            "optax": {"norm": "of_sum", "zero_norm_ratio": 1.0},
            "outside": {"lr_in_momentum": False},
            "larc": {"larc": True},
        }.items()
    ),
    Case("lamb", optlab.lamb, lamb.lamb, ADAM),
    Case("lamb-phi", optlab.lamb, lamb.lamb, ADAM | {"phi": (1.0, 2.0), "max_ratio": 1.0}),
    Case("lamb-albert", optlab.lamb, lamb.lamb, ADAM | {"bias_correction": False}),
    _sai("sgd_sai", optlab.sgd_sai, shared={"momentum": 0.9, "eps": 1e-8}),
    _sai(
        "sgd_sai-official", optlab.sgd_sai, shared={"momentum": 0.9, "eps": 1e-8, "official": True},
        rate=0.02,
    ),
    Case("allora", optlab.allora, allora.allora, {"eta": 2.0}, leaves=units, decays=False),
    Case(
        "allora-before", optlab.allora, allora.allora, {"eta": 3.0, "after_base": False},
        ours={"base": optax.scale_by_sign()}, theirs={"base": np.sign}, leaves=units, decays=False,
    ),
]  # fmt: skip


def _ours(
    case: Case, learning_rate: Any, dtype: str, gradients: list = GRADS, **options: Any
) -> list[dict[str, Any]]:
    tx = case.make(learning_rate, **case.shared, **case.ours, **options)
    cast = lambda tree: {k: jnp.asarray(x, dtype) for k, x in tree.items()}  # noqa: E731
    params = cast(PARAMS)
    update = jax.jit(tx.update) if case.branches else tx.update
    state, out = tx.init(params), []
    for grads in gradients:
        updates, state = update(cast(grads), state, params)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out


def _theirs(
    case: Case, rates: list[float], decay: dict[str, float], gradients: list = GRADS
) -> list[dict[str, Any]]:
    given = {**case.shared, **case.theirs}
    if case.leaves is None:
        return case.reference(PARAMS, gradients, rates, weight_decay=decay, **given)
    columns = {}
    for name, p in PARAMS.items():
        own = case.leaves(name) | ({"weight_decay": decay[name]} if case.decays else {})
        columns[name] = case.reference(p, [g[name] for g in gradients], rates, **given, **own)
    return [{name: column[t] for name, column in columns.items()} for t in range(STEPS)]


def _compare(found: list[dict[str, Any]], expected: list[dict[str, Any]], dtype: str) -> None:
    for t, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for name in PARAMS:
            assert ours[name].dtype == dtype
            np.testing.assert_allclose(
                ours[name], theirs[name], rtol=0, atol=TOLERANCE[dtype], err_msg=f"{name}, step {t}"
            )
    for name, start in PARAMS.items():
        moved = max(np.abs(params[name] - start).max() for params in expected)
        assert moved > 1e-3, f"{name} did not move"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recipe_follows_its_reference_in_float32(case):
    options = {"weight_decay": 0.3} if case.decays else {}
    expected = _theirs(case, [case.rate] * STEPS, dict.fromkeys(PARAMS, 0.3))
    _compare(_ours(case, case.rate, "float32", **options), expected, "float32")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recipe_follows_its_reference_in_float64_under_a_schedule_and_a_decay_mask(case):
    options = {"weight_decay": 0.3, "weight_decay_mask": MATRICES} if case.decays else {}
    rates = [case.rate / (1 + t) for t in range(STEPS)]
    decay = {name: 0.3 * MATRICES[name] for name in PARAMS}
    expected = _theirs(case, rates, decay)
    with jax.enable_x64(True):
        found = _ours(case, lambda t: case.rate / (1 + t), "float64", **options)
    _compare(found, expected, "float64")


# With a rate of 1/2 every rounding of the average moves the parameters by twice itself in all, and
# no entry of it exceeds the largest gradient, here twice the smallest.
NARROW = STEPS * 2.0**-9 * 2 * 2


SMOOTH = [
    "adabelief",
    "adamp",
    "diffgrad",
    "lamb",
    "lars-paper",
    "lion_k-huber",
    "nap",
    "sgdp",
    "sgd_sai",
]


@pytest.mark.parametrize("name", SMOOTH)
def test_a_bfloat16_average_costs_its_rounding_only(name):
    (case,) = (c for c in CASES if c.name == name)
    rate = "b1" if "b1" in case.shared else "momentum"
    smooth = {"delta": 0.0} if "delta" in case.shared else {}
    shared = {**case.shared, rate: 0.5, **smooth} | ({"eps": 0.1} if name == "adabelief" else {})
    case = dataclasses.replace(case, shared=shared)
    grads = [{k: np.sign(g) * (1 + np.abs(np.tanh(g))) for k, g in tree.items()} for tree in GRADS]
    plain = {"weight_decay": 0.0} if case.decays else {}
    exact, wide, narrow = (
        _theirs(case, [case.rate] * STEPS, dict.fromkeys(PARAMS, 0.0), grads),
        _ours(case, case.rate, "float32", grads, **plain),
        _ours(case, case.rate, "float32", grads, mu_dtype=jnp.bfloat16, **plain),
    )
    for leaf, start in PARAMS.items():
        path = np.stack([start] + [params[leaf] for params in exact])
        step = np.abs(np.diff(path, axis=0)).max()
        off = np.abs(narrow[-1][leaf] - exact[-1][leaf]).max()
        assert off <= NARROW * step, f"{leaf}: {off / step:.3f} steps"
    assert any(np.any(narrow[-1][leaf] != wide[-1][leaf]) for leaf in PARAMS), "nothing was rounded"


@pytest.mark.parametrize(
    "decay", ["linear", "cosine", "one_minus_sqrt", "exponential", "inverse_proportional"]
)
@pytest.mark.parametrize(
    ("warmup", "stable", "length", "init"), [(7, 11, 13, 0.1), (0, 5, 9, 0.0), (3, 0, 4, 0.0)]
)
def test_wsd_follows_its_reference(decay, warmup, stable, length, init):
    ours = optlab.wsd(2.0, warmup, stable, length, init_value=init, end_value=0.02, decay=decay)
    given = {"warmup": warmup, "stable": stable, "decay_steps": length, "init": init, "end": 0.02}
    steps = np.arange(warmup + stable + length + 5)
    expected = [wsd(int(t), peak=2.0, decay=decay, **given) for t in steps]
    np.testing.assert_allclose(ours(steps), expected, rtol=2e-6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(ours(steps), expected, rtol=1e-14)
