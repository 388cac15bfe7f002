"""The only table of optlab's transformations: arguments, promises and the leaves they hit.

A row's name is the public name, with what sets it apart in brackets where there are several. Its
arguments make the standard tree take the method's real path: AdamP's threshold is so high that the
projection fires, LARS's coefficient so high that the steps show.
"""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import optax

import optlab
from optlab.testing import Case, default_params, random_like

MATRICES = ("attn/query/kernel", "conv/kernel", "dense/kernel")
VECTORS = ("dense/bias", "norm/scale")
TENSORS = MATRICES + VECTORS
ALL = (*TENSORS, "temperature")

_ELEMENTWISE = {"elementwise", "layerwise"}
_MILLION = 1_000_000


def _recipe(name: str, fallback=None, *, tags=(), hits=ALL, facts=(), tag="", **arguments) -> Case:
    """Return the row of a recipe; what it must differ from is plain descent at its rate."""
    rate = arguments.setdefault("learning_rate", 0.1)
    return Case(
        name + (f"[{tag}]" if tag else ""),
        partial(getattr(optlab, name), **arguments),
        frozenset({"recipe", *tags}),
        hits=hits,
        facts=dict(facts),
        fallback=fallback or partial(optax.sgd, rate),
    )


def _link(
    name: str,
    fallback=optax.identity,
    *,
    tags=(),
    hits=ALL,
    facts=(),
    tag="",
    params=default_params,
    **arguments,
) -> Case:
    """Return the row of a primitive; what it must differ from is the identity."""
    return Case(
        name + (f"[{tag}]" if tag else ""),
        partial(getattr(optlab, name), **arguments),
        frozenset(tags),
        params,
        hits,
        dict(facts),
        fallback,
    )


def _stacked_params():
    """Return two layers in one leaf, as `scan` stacks them, beside an unstacked head."""
    layers = {"dense": {"bias": (2, 16), "kernel": (2, 8, 16)}}
    return random_like({"layers": layers, "head": {"kernel": (16, 4)}}, seed=0)


_STACKED = {
    "tag": "stacked",
    "layout": optlab.layout.stacked("layers/"),
    "params": _stacked_params,
    "hits": ("layers/dense/kernel",),
}


@functools.wraps(optlab.scale_by_friction)
def _fed_friction(**arguments):
    """Return `scale_by_friction` with half of every gradient as the one before."""
    friction = optlab.scale_by_friction(**arguments)

    def update(updates, state, params=None, **extra_args):
        half = jax.tree.map(lambda u: u / 2, updates)
        return friction.update(updates, state, params, previous_updates=half, **extra_args)

    return optax.GradientTransformationExtraArgs(friction.init, update)


_ADAM = partial(optax.adam, 0.1)
# Rank 2 of 4096 is less than a hundredth of a byte per parameter. Singular vectors move by a
# rounding over the gap between their values.
_LOW_RANK = {"state_bytes": 0.0, "amplification": 100}


@functools.wraps(optlab.scale_by_raw_gradient)
def _fed_raw_gradient(**arguments):
    """Return `scale_by_raw_gradient` with twice the update as the gradient behind it."""
    scaled = optlab.scale_by_raw_gradient(**arguments)

    def update(updates, state, params=None, **extra_args):
        twice = jax.tree.map(lambda u: 2 * u, updates)
        return scaled.update(updates, state, params, raw_gradient=twice, **extra_args)

    return optax.GradientTransformationExtraArgs(scaled.init, update)


def _first_inputs(path, leaf):
    """Return the first half of the inputs of a matrix as a basis."""
    del path
    inputs = math.prod(leaf.shape[:-1] if leaf.ndim == 4 else leaf.shape[:1])
    return jnp.eye(inputs)[:, : inputs // 2]


def _first_outputs(path, leaf):
    """Return the first half of the outputs of a matrix as a basis."""
    del path
    outputs = math.prod(leaf.shape[1:] if leaf.ndim == 3 else leaf.shape[-1:])
    return jnp.eye(outputs)[:, : outputs // 2]


def _pruned_params():
    """Return the standard tree with zeros for what is negative."""
    return jax.tree.map(lambda p: p * (p > 0), default_params())


RECIPES = (
    _recipe("lion", tags={"scale_invariant", *_ELEMENTWISE}, facts={"state_bytes": 4.0}),
    _recipe(
        "lion_k",
        tag="l2",
        kappa="l2",
        tags={"scale_invariant", "layerwise"},
        facts={"state_bytes": 4.0, "convergence_rate": 0.5},
    ),
    _recipe("signum", tags={"scale_invariant", *_ELEMENTWISE}, facts={"state_bytes": 4.0}),
    _recipe(
        "adamp",
        partial(optax.adam, 0.1),
        delta=100.0,
        tags={"angular", "layerwise"},
        hits=MATRICES,
        facts={"state_bytes": 8.0},
    ),
    _recipe(
        "sgdp",
        partial(optax.sgd, 0.1, momentum=0.9),
        delta=100.0,
        tags={"angular", "layerwise"},
        hits=MATRICES,
        facts={"state_bytes": 4.0, "convergence_rate": 0.3},
    ),
    _recipe(
        "nap",
        partial(optax.adam, 0.1),
        tags={"angular", "layerwise", "fixed_norm", "needs_params"},
        hits=MATRICES,
        facts={"state_bytes": 8.0},
    ),
    _recipe("diffgrad", tags=_ELEMENTWISE, facts={"state_bytes": 12.0}),
    _recipe("adabelief", tags={"scale_invariant", *_ELEMENTWISE}, facts={"state_bytes": 8.0}),
    _recipe("adagrad_norm", facts={"state_bytes": 0.0, "convergence_rate": 20.0}),
    _recipe(
        "lars",
        partial(optax.sgd, 0.1, momentum=0.9),
        trust_coefficient=0.5,
        tags={"layerwise", "scale_invariant"},
        facts={"state_bytes": 4.0},
    ),
    _recipe("lamb", tags={"layerwise", "scale_invariant"}, facts={"state_bytes": 8.0}),
    _recipe(
        "sgd_sai",
        partial(optax.sgd, 0.1, momentum=0.9),
        facts={"state_bytes": 4.0, "convergence_rate": 1.0},
    ),
    _recipe("allora", tags={"layerwise", "stateless"}, hits=MATRICES, facts={"state_bytes": 0.0}),
    _recipe(
        "muon",
        partial(optax.adamw, 0.1),
        tags={"scale_invariant", "layerwise"},
        hits=MATRICES,
        facts={"state_bytes": 4.0, "convergence_rate": 0.5},
    ),
    _recipe(
        "normuon",
        partial(optax.adamw, 0.1),
        tags={"scale_invariant", "layerwise"},
        hits=MATRICES,
        facts={"state_bytes": 4.0},
    ),
    _recipe("scion", tags={"scale_invariant"}, facts={"state_bytes": 4.0}),
    _recipe("lanton", facts={"state_bytes": 8.0}),
    _recipe("galore", _ADAM, rank=2, hits=MATRICES, facts=_LOW_RANK),
    _recipe("q_galore", _ADAM, rank=2, block=8, hits=MATRICES, facts=_LOW_RANK),
    _recipe("fira", _ADAM, rank=2, hits=MATRICES, facts=_LOW_RANK),
    _recipe("frugal", _ADAM, rank=0.25, hits=MATRICES, facts={"state_bytes": 2.0}),
    _recipe("apollo", _ADAM, rank=2, hits=MATRICES, facts=_LOW_RANK),
    _recipe("conda", _ADAM, hits=MATRICES, facts=_LOW_RANK | {"state_bytes": 12.0}),
    _recipe(
        "grad_norm_lorp",
        _ADAM,
        rank=2,
        every=10,
        tags={"needs_params"},
        hits=MATRICES,
        # The first step of raw Adam is steep where a coordinate is near eps.
        facts=_LOW_RANK | {"amplification": 1000},
    ),
    _recipe("ldadam", _ADAM, rank=2, hits=MATRICES, facts=_LOW_RANK | {"state_bytes": 4.0}),
)

LINKS = (
    _link(
        "interpolate_momentum",
        tags={"momentum", *_ELEMENTWISE},
        facts={
            "state_bytes": 4.0,
            "constant_gradient": lambda t: 1 - 0.9 * 0.99 ** (t - 1),
            "no_momentum": {"b1": 0.0},
        },
    ),
    _link(
        "ema_from_first",
        decay=0.9,
        tags={"momentum", *_ELEMENTWISE},
        facts={
            "state_bytes": 4.0,
            "constant_gradient": lambda t: 1.0,
            "no_momentum": {"decay": 0.0},
        },
    ),
    _link(
        "heavy_ball",
        momentum=0.9,
        tags={"momentum", *_ELEMENTWISE},
        facts={
            "state_bytes": 4.0,
            "constant_gradient": lambda t: (1 - 0.9**t) / 0.1,
            "no_momentum": {"momentum": 0.0},
        },
    ),
    _link(
        "with_previous_updates",
        optax.scale_by_adam,
        inner=optlab.scale_by_friction(),
        tags={"wrapper", *_ELEMENTWISE},
        facts={"state_bytes": 12.0},
    ),
    _link(
        "apply_kappa",
        tags={"sign", "scale_invariant", "idempotent", "stateless", *_ELEMENTWISE},
        facts={"state_bytes": 0.0},
    ),
    _link(
        "scale_by_lion_k",
        kappa="l2",
        tag="l2",
        tags={"scale_invariant", "layerwise"},
        facts={"state_bytes": 4.0},
    ),
    _link(
        "scale_by_sign_momentum",
        tags={"sign", "scale_invariant", *_ELEMENTWISE},
        facts={"state_bytes": 4.0},
    ),
    _link(
        "remove_radial",
        tags={"radial", "idempotent", "stateless", "needs_params", "layerwise"},
        hits=TENSORS,
        facts={"state_bytes": 0.0},
    ),
    _link(
        "project_radial",
        optlab.interpolate_momentum,
        inner=optlab.interpolate_momentum(),
        delta=100.0,
        tags={"wrapper", "radial", "needs_params", "layerwise"},
        hits=MATRICES,
        facts={"state_bytes": 4.0},
    ),
    _link(
        "project_radial",
        optlab.interpolate_momentum,
        inner=optlab.interpolate_momentum(),
        delta=100.0,
        tags={"wrapper", "radial", "needs_params", "layerwise"},
        facts={"state_bytes": 4.0},
        **_STACKED,
    ),
    _link(
        "normalize_and_project",
        partial(optlab.lion, 0.1),
        inner=optlab.lion(0.1),
        tags={"wrapper", "fixed_norm", "needs_params", "layerwise"},
        hits=MATRICES,
        facts={"state_bytes": 4.0},
    ),
    _link("scale_by_moments", tags=_ELEMENTWISE, facts={"state_bytes": 8.0}),
    _link("scale_by_belief", tags={"scale_invariant", *_ELEMENTWISE}, facts={"state_bytes": 8.0}),
    Case(
        "scale_by_friction",
        _fed_friction,
        frozenset(_ELEMENTWISE),
        hits=ALL,
        facts={"state_bytes": 8.0},
        fallback=optax.scale_by_adam,
    ),
    _link("scale_by_diffgrad", optax.scale_by_adam, tags=_ELEMENTWISE, facts={"state_bytes": 12.0}),
    _link("scale_by_adagrad_norm", facts={"state_bytes": 0.0}),
    _link(
        "scale_by_trust_ratio",
        tags={"trust_ratio", "scale_invariant", "stateless", "needs_params", "layerwise"},
        facts={"state_bytes": 0.0},
    ),
    # One ratio per layer: not what the whole leaf gets.
    _link(
        "scale_by_trust_ratio",
        optlab.scale_by_trust_ratio,
        tags={"trust_ratio", "scale_invariant", "stateless", "needs_params", "layerwise"},
        facts={"state_bytes": 0.0},
        **_STACKED,
    ),
    # The leaf with the largest ratio, the convolution, keeps its gradient.
    _link(
        "scale_by_initial_snr",
        hits=("attn/query/kernel", "dense/kernel", *VECTORS, "temperature"),
        facts={"state_bytes": 0.0},
    ),
    _link(
        "scale_by_inverse_row_norm",
        tags={"stateless", "needs_params", "layerwise"},
        hits=MATRICES,
        facts={"state_bytes": 0.0},
    ),
    _link(
        "scale_by_inverse_row_norm",
        tags={"stateless", "needs_params", "layerwise"},
        facts={"state_bytes": 0.0},
        **_STACKED,
    ),
    _link(
        "add_cautious_decay",
        weight_decay=0.1,
        tags={"decay", "stateless", "needs_params", *_ELEMENTWISE},
        # The temperature's update points the other way. The minus sign comes later in the chain.
        hits=TENSORS,
        facts={"state_bytes": 0.0, "decay_factor": 1.1},
    ),
    _link(
        "debiased_ema",
        decay=0.9,
        tags={"momentum", *_ELEMENTWISE},
        facts={
            "state_bytes": 4.0,
            "constant_gradient": lambda t: 1.0,
            "no_momentum": {"decay": 0.0},
        },
    ),
    _link(
        "orthogonalize",
        tags={"orthogonalize", "stateless", "layerwise"},
        hits=MATRICES,
        facts={"state_bytes": 0.0, "band": (0.6, 1.25)},
    ),
    _link(
        "orthogonalize",
        polar="you",
        tags={"orthogonalize", "stateless", "layerwise"},
        facts={"state_bytes": 0.0, "band": (0.9, 1.1)},
        **_STACKED,
    ),
    _link("normalize_neurons", hits=MATRICES, facts={"state_bytes": 0.0}),
    _link("scale_by_shape", tags={"stateless"}, hits=("dense/kernel",), facts={"state_bytes": 0.0}),
    _link("scale_by_lmo", norm="per_output", facts={"state_bytes": 0.0}),
    _link(
        "noise_adaptive",
        optlab.orthogonalize,
        inner=optlab.orthogonalize(),
        tags={"wrapper"},
        hits=("conv/kernel", "dense/kernel"),  # the quietest of a group keeps its rate
        facts={"state_bytes": 4.0},
    ),
    _link(
        "in_low_rank",
        optax.scale_by_adam,
        inner=optlab.scale_by_moments(),
        rank=2,
        every=2,
        tags={"wrapper"},
        hits=MATRICES,
        facts=_LOW_RANK,
    ),
    _link(
        "in_low_rank",
        inner=optlab.heavy_ball(0.9),
        rank=0.25,
        every=2,
        side="both",
        tag="stacked",
        on_refresh="rotate",
        residual=optlab.sign_residual(),
        **{key: value for key, value in _STACKED.items() if key != "tag"},
        tags={"wrapper"},
        facts=_LOW_RANK | {"state_bytes": 2.25},
    ),
    _link(
        "scale_by_ldadam",
        optax.scale_by_adam,
        rank=2,
        hits=MATRICES,
        facts=_LOW_RANK | {"state_bytes": 4.0},
    ),
    _link(
        "in_weight_norm",
        _ADAM,
        direction=optlab.adabelief(0.1),
        magnitude=optlab.adabelief(0.1),
        tags={"needs_params"},
        hits=MATRICES,
        facts={"state_bytes": 8.0},
    ),
    _link(
        "select_blocks",
        optlab.scale_by_moments,
        tag="gs",
        inner=optlab.scale_by_moments(),
        normalize=True,
        tags={"wrapper"},
        facts={"state_bytes": 8.0},
    ),
    _link(
        "select_blocks",
        optlab.scale_by_moments,
        tag="top_k",
        inner=optlab.scale_by_moments(),
        rule="top_k",
        k=0.5,
        tags={"wrapper"},
        facts={"state_bytes": 9.0},
    ),
    # In the first two steps the last two leaves have their turn.
    _link(
        "select_blocks",
        optlab.scale_by_moments,
        tag="turns",
        inner=optlab.scale_by_moments(),
        rule="descending",
        k=2,
        every=2,
        inner_state="restart",
        others=optlab.apply_kappa(),
        tags={"wrapper", "needs_params"},
        hits=(*MATRICES, "dense/bias"),
        facts={"state_bytes": 8.0},
    ),
    Case(
        "scale_by_raw_gradient",
        _fed_raw_gradient,
        frozenset({"elementwise", "layerwise"}),
        hits=ALL,
        facts={"state_bytes": 4.0},
    ),
    _link(
        "project_onto_subspace",
        basis=_first_inputs,
        tags={"layerwise", "stateless", "idempotent"},
        hits=MATRICES,
        facts={"state_bytes": 0.0},
    ),
    _link(
        "project_onto_subspace",
        tag="away",
        basis=_first_outputs,
        away=True,
        side="cols",
        tags={"layerwise", "stateless", "idempotent"},
        hits=MATRICES,
        facts={"state_bytes": 0.0},
    ),
    _link(
        "keep_sparsity",
        tags={"needs_params", "idempotent", *_ELEMENTWISE},
        params=_pruned_params,
        hits=MATRICES,
        facts={"state_bytes": 1.0},
    ),
    # It passes updates through: what it must differ from is nothing.
    _link(
        "accumulate_importance",
        optax.set_to_zero,
        tags=_ELEMENTWISE,
        facts={"state_bytes": 4.0},
    ),
    _link(
        "accumulate_importance",
        optax.set_to_zero,
        tag="squares",
        p=2,
        tags=_ELEMENTWISE,
        facts={"state_bytes": 4.0},
    ),
    _link(
        "random_subspace",
        inner=optax.scale(1.0),
        dim=7,
        facts={"state_bytes": 0.0},
    ),
    _link("norm_growth_limiter", growth=0.5, hits=TENSORS, facts={"state_bytes": 0.0}),
    _link(
        "with_raw_gradient",
        momentum=optlab.heavy_ball(0.9),
        inner=optlab.scale_by_raw_gradient(),
        tags={"wrapper"},
        facts={"state_bytes": 8.0},
    ),
    _link(
        "decay_after_update",
        learning_rate=1.0,
        weight_decay=0.1,
        tags={"decay", "needs_params", *_ELEMENTWISE},
        facts={"state_bytes": 0.0, "decay_factor": 0.9},
    ),
)


def _wsd(decay: str, end_value: float = 0.1) -> Case:
    make = partial(optlab.wsd, 1.0, _MILLION, _MILLION, _MILLION, end_value=end_value, decay=decay)
    joints = (_MILLION, 2 * _MILLION, 3 * _MILLION)
    facts = {"total": 3 * _MILLION, "joints": joints}
    return Case(f"wsd[{decay}]", make, frozenset({"schedule"}), facts=facts)


SCHEDULES = tuple(
    _wsd(decay)
    for decay in ("linear", "cosine", "one_minus_sqrt", "exponential", "inverse_proportional")
)

CASES = (*RECIPES, *LINKS, *SCHEDULES)
