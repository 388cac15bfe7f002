"""Wrong calls: each is refused at construction or at its first use, by name, with the fix.

A row says who complains, about which leaf where there is one, and a part of the sentence that says
what to write instead.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optlab
from optlab import kappa

PARAMS = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
GRADS = jax.tree.map(jnp.ones_like, PARAMS)
SMALLER = {"dense": {"kernel": jnp.ones((3, 2))}}
TOWER = {"tower": {"w": jnp.ones((2, 3, 4))}}
RECIPES = {
    name: functools.partial(getattr(optlab, name), 0.1)
    for name in (
        *("lion", "lion_k", "signum", "adamp", "sgdp", "nap", "diffgrad", "adabelief"),
        *("adagrad_norm", "lars", "lamb", "sgd_sai", "allora"),
    )
}
# These route leaves by role, so a wrong leaf is refused in their own name or in its method's:
# tests/test_orthogonal.py and tests/test_mesh_use.py.
ORTHOGONAL = {
    name: functools.partial(getattr(optlab, name), 0.1)
    for name in ("muon", "normuon", "scion", "lanton")
}
# Who refuses a wrong argument or leaf: the recipe's first link that looks at it.
FIRST = {
    "lion": "interpolate_momentum",
    "lion_k": "interpolate_momentum",
    "signum": "interpolate_momentum",
    "adamp": "scale_by_moments",
    "sgdp": "heavy_ball",
    "nap": "scale_by_moments",
    "diffgrad": "diffgrad",
    "adabelief": "scale_by_belief",
    "adagrad_norm": "scale_by_adagrad_norm",
    "lars": "scale_by_trust_ratio",
    "lamb": "scale_by_moments",
    "sgd_sai": "scale_by_initial_snr",
    "allora": "scale_by_inverse_row_norm",
}
# Some first links have nothing of the parameters' shape to compare a gradient with.
SEES_TREES = FIRST | {"adagrad_norm": "adagrad_norm"}
SEES_SHAPES = SEES_TREES | {"sgd_sai": "ema_from_first"}


class Wrong(NamedTuple):
    """A wrong call, who must complain, the fix it must say, and the leaf it must name."""

    label: str
    call: Callable[[], Any]
    transform: str
    fix: str
    leaf: str = ""


def _with(tree: Any, kernel: Any) -> Any:
    return {"dense": tree["dense"] | {"kernel": kernel}}


def step(tx: Any, grads: Any = GRADS, params: Any = PARAMS, init: Any = PARAMS) -> Any:
    """Build, initialize and update once; `tx` may still have to be called."""
    tx = tx if isinstance(tx, tuple) else tx()
    return tx.update(grads, tx.init(init), params)


def _number(label: str, build: Callable[..., Any], must: str, **given: Any):
    """Return a wrong argument, which is refused in the name of the function that was called."""
    called = getattr(build, "func", build)
    name = f"kappa.{called.__name__}" if called.__module__ == kappa.__name__ else called.__name__
    return Wrong(label, lambda: build(**given), name, f"must be {must}")


rate = "a number in [0, 1)"
positive, nonnegative = "a number > 0", "a number >= 0"
constructors = [
    *(
        _number(f"{name}-{label}", getattr(optlab, name), nonnegative, learning_rate=value)
        for name in (*RECIPES, *ORTHOGONAL)
        for label, value in {
            "rate_negative": -0.1,
            "rate_as_text": "0.1",
            "rate_missing": None,
            "rate_not_a_number": float("nan"),
            "rate_per_leaf": np.ones(2),
            "rate_of_two": jnp.ones(2),
            "rate_an_optimizer": optax.sgd(0.1),
        }.items()
    ),
    *(_number(f"{name}-b1_is_1", build, rate, b1=1) for name, build in ORTHOGONAL.items()),
    *(
        _number(f"{name}-{label}-{value}", build, must, **{label: value})
        for name, build in ORTHOGONAL.items()
        for label, value, must in (
            ("polar", "muno", "one of 'keller'"),
            ("polar", 5, "a name or a function"),
            ("fallback", "adamw", "an optax.GradientTransformation"),
            ("fallback_learning_rate", -1.0, nonnegative),
            ("layout", "flax", "a function or None"),
        )
    ),
    *(
        _number(f"{name}-{label}-{value}", ORTHOGONAL[name], must, **{label: value})
        for name in ("muon", "normuon")
        for label, value, must in (
            ("accumulation", "sums", "one of 'ema', 'sum', 'debiased'"),
            ("scale", "kellr", "one of 'keller'"),
            ("weight_decay", -0.1, nonnegative),
            ("comm_dtype", "int8", "a floating dtype or None"),
            ("chunk_bytes", 0, "a whole number >= 1"),
            ("chunk_bytes", 1.5, "a whole number >= 1"),
        )
    ),
    _number("decay_of_lanton", ORTHOGONAL["lanton"], nonnegative, weight_decay=-1),
    _number("rms_zero", ORTHOGONAL["normuon"], positive, rms=0),
    _number("b2_of_normuon", ORTHOGONAL["normuon"], rate, b2=1),
    _number("eps_of_normuon", ORTHOGONAL["normuon"], positive, eps=0),
    _number("alpha_zero", ORTHOGONAL["lanton"], positive, alpha=0),
    _number("scheme_of_orthogonalize", optlab.orthogonalize, "one of 'auto'", scheme="all2all"),
    _number("scheme_of_plan", optlab.plan, "one of 'auto'", params={}, scheme="all2all"),
    _number("mode", optlab.scale_by_shape, "one of 'keller'", mode="moon"),
    _number("norm_of_lmo", optlab.scale_by_lmo, "one of", norm="signs"),
    _number("decay", optlab.debiased_ema, rate, decay=1.0),
    _number("rms_negative", optlab.normalize_neurons, positive, rms=-1.0),
    _number("b1_is_1", RECIPES["lion"], rate, b1=1),
    _number("b2_is_1", RECIPES["adamp"], rate, b2=1.0),
    _number("b1_negative", RECIPES["lamb"], rate, b1=-0.1),
    _number("b2_as_text", RECIPES["adabelief"], rate, b2="0.99"),
    _number("b1_a_schedule", RECIPES["lion"], rate, b1=lambda t: 0.9),
    _number("momentum_is_1", RECIPES["sgdp"], rate, momentum=1),
    _number("momentum_of_lars", RECIPES["lars"], rate, momentum=1.5),
    _number("momentum_of_signum", RECIPES["signum"], rate, momentum=2),
    _number("momentum_of_sgd_sai", RECIPES["sgd_sai"], rate, momentum=None),
    _number("dampening_is_1", RECIPES["sgdp"], rate, dampening=1.0),
    _number("eps_negative", RECIPES["diffgrad"], nonnegative, eps=-1e-8),
    _number("eps_as_text", RECIPES["nap"], nonnegative, eps="1e-8"),
    _number("eps_root_negative", RECIPES["adabelief"], nonnegative, eps_root=-1),
    _number("eps_zero", RECIPES["sgdp"], positive, eps=0),
    _number("decay_negative", RECIPES["lion"], nonnegative, weight_decay=-0.1),
    _number("decay_true", RECIPES["adagrad_norm"], nonnegative, weight_decay=True),
    _number("decay_as_text", RECIPES["lamb"], nonnegative, weight_decay=""),
    _number(
        "decay_a_schedule", RECIPES["adamp"], nonnegative,
        weight_decay=lambda t: 0.1,
    ),
    _number("delta_negative", RECIPES["adamp"], nonnegative, delta=-0.1),
    _number("eta_zero", RECIPES["allora"], positive, eta=0),
    _number("b0_negative", RECIPES["adagrad_norm"], nonnegative, b0=-1),
    _number(
        "trust_zero", RECIPES["lars"], positive, trust_coefficient=0
    ),
    _number("max_ratio_zero", RECIPES["lamb"], positive, max_ratio=0),
    _number("phi_reversed", RECIPES["lamb"], "None or (", phi=(2, 1)),
    _number("phi_as_text", RECIPES["lamb"], "None or (", phi=("1", "2")),
    _number("every_0", RECIPES["nap"], "a whole number >= 1", every_k=0),
    _number("every_half", RECIPES["nap"], "a whole number", every_k=0.5),
    _number("ddof", optlab.scale_by_initial_snr, "a whole number", ddof=-1),
    _number(
        "power", optlab.scale_by_inverse_row_norm, positive, power=0,
    ),
    _number(
        "cautious", optlab.add_cautious_decay, nonnegative, weight_decay=-1,
    ),
    _number(
        "after", optlab.decay_after_update, nonnegative, learning_rate="1",
    ),
    _number("lp_1", kappa.lp, "a number > 1", p=1),
    _number("huber_0", kappa.huber, positive, e=0.0),
    _number("dead_zone", kappa.dead_zone, nonnegative, e=-1),
    _number("top_half", kappa.top_k, "a whole number >= 1", k=0.5),
    _number("smooth_0", kappa.smooth_sign, positive, s=0),
    *(
        _number(f"{name}-mu_dtype_{value}", build,
                "a floating dtype or None", mu_dtype=value)
        for name, build in RECIPES.items()
        if name in ("lion", "adamp", "sgdp", "lars", "lamb", "adabelief")
        for value in ("int32", "float33")
    ),
    _number(
        "norm", RECIPES["lars"], "one of 'of_sum', 'sum_of'", norm="l2",
    ),
    _number("kappa_unknown", RECIPES["lion_k"], "one of 'l1'", kappa="l3"),
    _number("kappa_a_number", RECIPES["lion_k"], "a name or a function", kappa=1.5),
    _number("layout_a_name", RECIPES["adamp"], "a function", layout="flax"),
    _number("layout_of_lars", RECIPES["lars"], "a function", layout=3),
    _number(
        "layout_a_view", RECIPES["allora"], "a function",
        layout=optlab.MatrixView((0,), (1,)),
    ),
    _number(
        "write_back", functools.partial(optlab.project_radial, optax.identity()),
        "a function or None", write_back=True,
    ),
]  # fmt: skip

WSD = {"peak_value": 1.0, "warmup_steps": 1, "stable_steps": 1, "decay_steps": 1}
schedules = [
    Wrong(
        "rate_of_no_argument", lambda: optlab.lion(lambda: 0.1), "lion", "Write it as lambda step:"
    ),
    Wrong(
        "decay_of_two_arguments",
        lambda: optlab.sgd_sai(0.1, weight_decay=lambda step, epoch: 0.1),
        "sgd_sai",
        "Write it as lambda step:",
    ),
    _number("peak_negative", optlab.wsd, positive, **WSD | {"peak_value": -1.0}),
    _number("peak_as_text", optlab.wsd, positive, **WSD | {"peak_value": "1"}),
    _number("warmup_negative", optlab.wsd, "a whole number", **WSD | {"warmup_steps": -1}),
    _number("stable_fraction", optlab.wsd, "a whole number", **WSD | {"stable_steps": 0.8}),
    _number("end_negative", optlab.wsd, nonnegative, **WSD | {"end_value": -1}),
    _number("decay_unknown", optlab.wsd, "one of 'linear'", **WSD | {"decay": "exp"}),
    _number("exponential_to_0", optlab.wsd, positive, **WSD | {"decay": "exponential"}),
]

inners = [
    Wrong(f"{build.__name__}-{label}", functools.partial(build, inner), build.__name__, "Build it")
    for build in (
        optlab.project_radial,
        optlab.normalize_and_project,
        optlab.with_previous_updates,
    )
    for label, inner in {"function": optax.sgd, "none": None, "number": 0.1}.items()
] + [Wrong("allora-base", lambda: RECIPES["allora"](base=optax.scale_by_adam), "allora", "Build")]

keywords = [
    Wrong(f"{name}-{word}", functools.partial(build, **{word: 0.1}), name, fix)
    for name, build, word, fix in [
        ("lion", RECIPES["lion"], "betas", "b1 and b2"),
        ("adamp", RECIPES["adamp"], "beta1", "Did you mean b1?"),
        ("lamb", optlab.lamb, "lr", "Did you mean learning_rate?"),
        ("adabelief", RECIPES["adabelief"], "wd", "Did you mean weight_decay?"),
        ("sgd_sai", RECIPES["sgd_sai"], "mask", "Did you mean weight_decay_mask?"),
        ("lars", RECIPES["lars"], "trust_coeff", "Did you mean trust_coefficient?"),
        ("diffgrad", RECIPES["diffgrad"], "weight_decy", "Did you mean weight_decay?"),
        ("signum", RECIPES["signum"], "b1", "It takes learning_rate, momentum"),
        ("allora", RECIPES["allora"], "weight_decay", "It takes learning_rate, base"),
        ("interpolate_momentum", optlab.interpolate_momentum, "beta2", "Did you mean b2?"),
        ("remove_radial", optlab.remove_radial, "layot", "Did you mean layout?"),
        ("scale_by_trust_ratio", optlab.scale_by_trust_ratio, "epsilon", "eps?"),
        ("add_cautious_decay", optlab.add_cautious_decay, "wd", "Did you mean weight_decay?"),
        ("wsd", optlab.wsd, "total_steps", "It takes peak_value"),
    ]
] + [
    Wrong("no_rate", optlab.lion, "lion", "Call lion(learning_rate, *, b1=0.9"),
    Wrong("b1_by_position", lambda: optlab.lion(0.1, 0.9), "lion", "Call lion(learning_rate, *,"),
]

SAME = "Pass gradients of the very parameters"
trees = [
    *(
        Wrong(
            f"{name}-other_tree", functools.partial(step, build, SMALLER), SEES_TREES[name], SAME,
            "" if name == "sgd_sai" else "dense/bias",
        )
        for name, build in RECIPES.items()
    ),
    *(
        Wrong(
            f"{name}-other_shape", functools.partial(step, build, _with(GRADS, jnp.ones((2, 3)))),
            SEES_SHAPES[name], SAME, "dense/kernel",
        )
        for name, build in RECIPES.items()
    ),
    *(
        Wrong(
            f"{name}-other_params",
            functools.partial(step, build, GRADS, SMALLER), name, SAME, "dense/bias",
        )
        for name, build in RECIPES.items()
        if name in ("lion", "lion_k", "signum", "diffgrad", "adabelief", "adagrad_norm", "sgd_sai")
    ),
    *(
        Wrong(
            f"{name}-no_params", functools.partial(step, build, GRADS, None), who,
            "Call tx.update(grads, state, params)",
        )
        for name, build, who in [
            *((n, RECIPES[n], n) for n in ("lion", "signum", "diffgrad", "adabelief", "sgd_sai")),
            ("adagrad_norm", RECIPES["adagrad_norm"], "adagrad_norm"),
            ("adamp", RECIPES["adamp"], "project_radial"),
            ("nap", RECIPES["nap"], "normalize_and_project"),
            ("lars", RECIPES["lars"], "scale_by_trust_ratio"),
            ("allora", RECIPES["allora"], "scale_by_inverse_row_norm"),
            ("remove_radial", optlab.remove_radial, "remove_radial"),
            ("cautious", optlab.add_cautious_decay, "add_cautious_decay"),
            ("after", functools.partial(optlab.decay_after_update, 0.1), "decay_after_update"),
        ]
    ),
    Wrong(
        "friction_alone", lambda: step(optlab.scale_by_friction), "scale_by_friction",
        "Call tx.update(grads, state, params, previous_updates=...)",
    ),
]  # fmt: skip

INTEGERS = _with(PARAMS, jnp.ones((3, 2), jnp.int32))
COMPLEX = _with(PARAMS, jnp.ones((3, 2), jnp.complex64))
FLOAT0 = _with(GRADS, np.zeros((3, 2), jax.dtypes.float0))
LOOSE = _with(GRADS, 1.0)
leaves = [
    *(
        Wrong(
            f"{name}-{label}", functools.partial(step, build, *given), "", fix, "dense/kernel"
        )
        for name, build in RECIPES.items()
        for label, given, fix in [
            ("integer_params", (GRADS, INTEGERS, INTEGERS), "take it out with optax.masked"),
            ("integer_grads", (INTEGERS,), "take it out with optax.masked"),
            ("complex", (COMPLEX, COMPLEX, COMPLEX), "optax.contrib.split_real_and_imaginary"),
            ("float0", (FLOAT0,), "take it out with optax.masked"),
            ("python_number", (LOOSE,), "Convert it with jnp.asarray"),
        ]
    ),
    *(
        Wrong(
            f"{name}-rank_3", functools.partial(step, build, TOWER, TOWER, TOWER), "layout.flax",
            'layout.stacked("tower/")', "tower/w",
        )
        for name, build in [
            ("adamp", RECIPES["adamp"]),
            ("sgdp", RECIPES["sgdp"]),
            ("allora", RECIPES["allora"]),
            ("lars", functools.partial(RECIPES["lars"], layout=optlab.layout.flax)),
            ("remove_radial", functools.partial(optlab.remove_radial, layout=optlab.layout.flax)),
        ]
    ),
    Wrong(
        "view_of_a_vector",
        lambda: step(RECIPES["adamp"](layout=lambda path, leaf: optlab.MatrixView((0,), (1,)))),
        "layout", "Narrow the rule", "dense/bias",
    ),
    Wrong(
        "kappa_of_a_sum", lambda: step(RECIPES["lion_k"](kappa=jnp.sum)), "apply_kappa",
        "Give a function of one leaf", "dense/bias",
    ),
    Wrong(
        "kappa_not_built", lambda: step(RECIPES["lion_k"](kappa=kappa.top_k)), "kappa.top_k",
        "must be a whole number",
    ),
]  # fmt: skip

_MASKED = {
    "lion": ("weight_decay_mask", "lion"),
    "signum": ("weight_decay_mask", "signum"),
    "adamp": ("weight_decay_mask", "project_radial"),
    "diffgrad": ("weight_decay_mask", "diffgrad"),
    "adabelief": ("weight_decay_mask", "adabelief"),
    "adagrad_norm": ("weight_decay_mask", "adagrad_norm"),
    "sgd_sai": ("weight_decay_mask", "sgd_sai"),
    "lars": ("trust_ratio_mask", "scale_by_trust_ratio"),
    "lamb": ("weight_decay_mask", "scale_by_trust_ratio"),
    "nap": ("mask", "normalize_and_project"),
}
masks = [
    Wrong(
        f"{name}-{label}",
        lambda build=RECIPES[name], word=word, mask=mask: step(build(**{word: mask})),
        who,
        fix,
        leaf,
    )
    for name, (word, who) in _MASKED.items()
    for label, mask, fix, leaf in [
        ("mask_of_another_tree", {"dens": True}, "Give a bool per leaf", "dense/kernel"),
        ("mask_a_list", ["kernel"], "or a function of params", "dense/kernel"),
        ("mask_of_numbers", {"dense": {"kernel": 1.0, "bias": 0.0}}, "True or False", "dense/bias"),
        ("mask_a_name", "kernel", "Use True or False", "dense/bias"),
        ("mask_of_two_arguments", lambda path, leaf: True, "Write it as lambda params:", ""),
    ]
]

ROWS = [*constructors, *schedules, *inners, *keywords, *trees, *leaves, *masks]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_a_wrong_call_says_who_what_and_the_fix(row):
    with pytest.raises((ValueError, TypeError)) as refused:
        row.call()
    message = str(refused.value)
    who = message.split(":")[0].split("(")[0]
    assert who == row.transform or (not row.transform and who in dir(optlab)), message
    assert row.fix in message
    assert f"'{row.leaf}'" in message or not row.leaf, message
    assert "\n" not in message
    assert len(message) < 400


def test_the_table_is_long_and_its_labels_are_unique():
    labels = [row.label for row in ROWS]
    assert len(labels) > 40
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize("name", RECIPES)
def test_the_right_call_passes(name):
    step(RECIPES[name])
