"""The only table of optlab's transformations: arguments, promises and the leaves they hit.

A row's name is the public name, with what sets it apart in brackets where there are several. Its
arguments make the standard tree take the method's real path: AdamP's threshold is so high that the
projection fires, LARS's coefficient so high that the steps show.
"""

import math
from functools import partial

import catalog_controllers
import catalog_schedules
import catalog_state
import jax
import jax.numpy as jnp
import optax
from rows import (
    ALL,
    ELEMENTWISE,
    MATRICES,
    STACKED,
    TENSORS,
    VECTORS,
    fed,
    link,
    recipe,
)

import optlab
from optlab.testing import Case, default_params

_MILLION = 1_000_000


def _times(factor, updates):
    return jax.tree.map(lambda u: factor * u, updates)


_ADAM = partial(optax.adam, 0.1)
# Rank 2 of 4096 is less than a hundredth of a byte per parameter. Singular vectors move by a
# rounding over the gap between their values.
_LOW_RANK = {"state_bytes": 0.0, "amplification": 100}


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
    recipe("lion", tags={"scale_invariant", *ELEMENTWISE}, facts={"state_bytes": 4.0}),
    recipe(
        "lion_k",
        tag="l2",
        kappa="l2",
        tags={"scale_invariant", "layerwise"},
        facts={"state_bytes": 4.0, "convergence_rate": 0.5},
    ),
    recipe("signum", tags={"scale_invariant", *ELEMENTWISE}, facts={"state_bytes": 4.0}),
    recipe(
        "adamp",
        partial(optax.adam, 0.1),
        delta=100.0,
        tags={"angular", "layerwise"},
        hits=MATRICES,
        facts={"state_bytes": 8.0},
    ),
    recipe(
        "sgdp",
        partial(optax.sgd, 0.1, momentum=0.9),
        delta=100.0,
        tags={"angular", "layerwise"},
        hits=MATRICES,
        facts={"state_bytes": 4.0, "convergence_rate": 0.3},
    ),
    recipe(
        "nap",
        partial(optax.adam, 0.1),
        tags={"angular", "layerwise", "fixed_norm", "needs_params"},
        hits=MATRICES,
        facts={"state_bytes": 8.0},
    ),
    recipe("diffgrad", tags=ELEMENTWISE, facts={"state_bytes": 12.0}),
    recipe("adabelief", tags={"scale_invariant", *ELEMENTWISE}, facts={"state_bytes": 8.0}),
    recipe("adagrad_norm", facts={"state_bytes": 0.0, "convergence_rate": 20.0}),
    recipe(
        "lars",
        partial(optax.sgd, 0.1, momentum=0.9),
        trust_coefficient=0.5,
        tags={"layerwise", "scale_invariant"},
        facts={"state_bytes": 4.0},
    ),
    recipe("lamb", tags={"layerwise", "scale_invariant"}, facts={"state_bytes": 8.0}),
    recipe(
        "sgd_sai",
        partial(optax.sgd, 0.1, momentum=0.9),
        facts={"state_bytes": 4.0, "convergence_rate": 1.0},
    ),
    recipe("allora", tags={"layerwise", "stateless"}, hits=MATRICES, facts={"state_bytes": 0.0}),
    recipe(
        "muon",
        partial(optax.adamw, 0.1),
        tags={"scale_invariant", "layerwise", "iterated"},
        hits=MATRICES,
        facts={"state_bytes": 4.0, "convergence_rate": 0.5},
    ),
    recipe(
        "normuon",
        partial(optax.adamw, 0.1),
        tags={"scale_invariant", "layerwise", "iterated"},
        hits=MATRICES,
        facts={"state_bytes": 4.0},
    ),
    recipe("scion", tags={"scale_invariant", "iterated"}, facts={"state_bytes": 4.0}),
    recipe("lanton", tags={"iterated"}, facts={"state_bytes": 8.0}),
    recipe("galore", _ADAM, rank=2, hits=MATRICES, facts=_LOW_RANK),
    recipe("q_galore", _ADAM, rank=2, block=8, hits=MATRICES, facts=_LOW_RANK),
    recipe("fira", _ADAM, rank=2, hits=MATRICES, facts=_LOW_RANK),
    recipe("frugal", _ADAM, rank=0.25, hits=MATRICES, facts={"state_bytes": 2.0}),
    recipe("apollo", _ADAM, rank=2, hits=MATRICES, facts=_LOW_RANK),
    recipe("conda", _ADAM, hits=MATRICES, facts=_LOW_RANK | {"state_bytes": 12.0}),
    recipe(
        "grad_norm_lorp",
        _ADAM,
        rank=2,
        every=10,
        tags={"needs_params"},
        hits=MATRICES,
        # The first step of raw Adam is steep where a coordinate is near eps.
        facts=_LOW_RANK | {"amplification": 1000},
    ),
    recipe("ldadam", _ADAM, rank=2, hits=MATRICES, facts=_LOW_RANK | {"state_bytes": 4.0}),
)

LINKS = (
    link(
        "interpolate_momentum",
        tags={"momentum", *ELEMENTWISE},
        facts={
            "state_bytes": 4.0,
            "constant_gradient": lambda t: 1 - 0.9 * 0.99 ** (t - 1),
            "no_momentum": {"b1": 0.0},
        },
    ),
    link(
        "ema_from_first",
        decay=0.9,
        tags={"momentum", *ELEMENTWISE},
        facts={
            "state_bytes": 4.0,
            "constant_gradient": lambda t: 1.0,
            "no_momentum": {"decay": 0.0},
        },
    ),
    link(
        "heavy_ball",
        momentum=0.9,
        tags={"momentum", *ELEMENTWISE},
        facts={
            "state_bytes": 4.0,
            "constant_gradient": lambda t: (1 - 0.9**t) / 0.1,
            "no_momentum": {"momentum": 0.0},
        },
    ),
    link(
        "with_previous_updates",
        optax.scale_by_adam,
        inner=optlab.scale_by_friction(),
        tags={"wrapper", *ELEMENTWISE},
        facts={"state_bytes": 12.0},
    ),
    link(
        "apply_kappa",
        tags={"sign", "scale_invariant", "idempotent", "stateless", *ELEMENTWISE},
        facts={"state_bytes": 0.0},
    ),
    link(
        "scale_by_lion_k",
        kappa="l2",
        tag="l2",
        tags={"scale_invariant", "layerwise"},
        facts={"state_bytes": 4.0},
    ),
    link(
        "scale_by_sign_momentum",
        tags={"sign", "scale_invariant", *ELEMENTWISE},
        facts={"state_bytes": 4.0},
    ),
    link(
        "remove_radial",
        tags={"radial", "idempotent", "stateless", "needs_params", "layerwise"},
        hits=TENSORS,
        facts={"state_bytes": 0.0},
    ),
    link(
        "project_radial",
        optlab.interpolate_momentum,
        inner=optlab.interpolate_momentum(),
        delta=100.0,
        tags={"wrapper", "radial", "needs_params", "layerwise"},
        hits=MATRICES,
        facts={"state_bytes": 4.0},
    ),
    link(
        "project_radial",
        optlab.interpolate_momentum,
        inner=optlab.interpolate_momentum(),
        delta=100.0,
        tags={"wrapper", "radial", "needs_params", "layerwise"},
        facts={"state_bytes": 4.0},
        **STACKED,
    ),
    link(
        "normalize_and_project",
        partial(optlab.lion, 0.1),
        inner=optlab.lion(0.1),
        tags={"wrapper", "fixed_norm", "needs_params", "layerwise"},
        hits=MATRICES,
        facts={"state_bytes": 4.0},
    ),
    link("scale_by_moments", tags=ELEMENTWISE, facts={"state_bytes": 8.0}),
    link("scale_by_belief", tags={"scale_invariant", *ELEMENTWISE}, facts={"state_bytes": 8.0}),
    Case(
        "scale_by_friction",
        fed(optlab.scale_by_friction, previous_updates=partial(_times, 0.5)),
        frozenset(ELEMENTWISE),
        hits=ALL,
        facts={"state_bytes": 8.0},
        fallback=optax.scale_by_adam,
    ),
    link("scale_by_diffgrad", optax.scale_by_adam, tags=ELEMENTWISE, facts={"state_bytes": 12.0}),
    link("scale_by_adagrad_norm", facts={"state_bytes": 0.0}),
    link(
        "scale_by_trust_ratio",
        tags={"trust_ratio", "scale_invariant", "stateless", "needs_params", "layerwise"},
        facts={"state_bytes": 0.0},
    ),
    # One ratio per layer: not what the whole leaf gets.
    link(
        "scale_by_trust_ratio",
        optlab.scale_by_trust_ratio,
        tags={"trust_ratio", "scale_invariant", "stateless", "needs_params", "layerwise"},
        facts={"state_bytes": 0.0},
        **STACKED,
    ),
    # The leaf with the largest ratio, the convolution, keeps its gradient.
    link(
        "scale_by_initial_snr",
        hits=("attn/query/kernel", "dense/kernel", *VECTORS, "temperature"),
        facts={"state_bytes": 0.0},
    ),
    link(
        "scale_by_inverse_row_norm",
        tags={"stateless", "needs_params", "layerwise"},
        hits=MATRICES,
        facts={"state_bytes": 0.0},
    ),
    link(
        "scale_by_inverse_row_norm",
        tags={"stateless", "needs_params", "layerwise"},
        facts={"state_bytes": 0.0},
        **STACKED,
    ),
    link(
        "add_cautious_decay",
        weight_decay=0.1,
        tags={"decay", "stateless", "needs_params", *ELEMENTWISE},
        # The temperature's update points the other way. The minus sign comes later in the chain.
        hits=TENSORS,
        facts={"state_bytes": 0.0, "decay_factor": 1.1},
    ),
    link(
        "debiased_ema",
        decay=0.9,
        tags={"momentum", *ELEMENTWISE},
        facts={
            "state_bytes": 4.0,
            "constant_gradient": lambda t: 1.0,
            "no_momentum": {"decay": 0.0},
        },
    ),
    link(
        "orthogonalize",
        tags={"orthogonalize", "stateless", "layerwise", "iterated"},
        hits=MATRICES,
        facts={"state_bytes": 0.0, "band": (0.6, 1.25)},
    ),
    link(
        "orthogonalize",
        polar="you",
        tags={"orthogonalize", "stateless", "layerwise", "iterated"},
        facts={"state_bytes": 0.0, "band": (0.9, 1.1)},
        **STACKED,
    ),
    link("normalize_neurons", hits=MATRICES, facts={"state_bytes": 0.0}),
    link("scale_by_shape", tags={"stateless"}, hits=("dense/kernel",), facts={"state_bytes": 0.0}),
    link("scale_by_lmo", norm="per_output", facts={"state_bytes": 0.0}),
    link(
        "noise_adaptive",
        optlab.orthogonalize,
        inner=optlab.orthogonalize(),
        tags={"wrapper", "iterated"},
        hits=("conv/kernel", "dense/kernel"),  # the quietest of a group keeps its rate
        facts={"state_bytes": 4.0},
    ),
    link(
        "in_low_rank",
        optax.scale_by_adam,
        inner=optlab.scale_by_moments(),
        rank=2,
        every=2,
        tags={"wrapper"},
        hits=MATRICES,
        facts=_LOW_RANK,
    ),
    link(
        "in_low_rank",
        inner=optlab.heavy_ball(0.9),
        rank=0.25,
        every=2,
        side="both",
        tag="stacked",
        on_refresh="rotate",
        residual=optlab.sign_residual(),
        **{key: value for key, value in STACKED.items() if key != "tag"},
        tags={"wrapper"},
        facts=_LOW_RANK | {"state_bytes": 2.25},
    ),
    link(
        "scale_by_ldadam",
        optax.scale_by_adam,
        rank=2,
        hits=MATRICES,
        facts=_LOW_RANK | {"state_bytes": 4.0},
    ),
    link(
        "in_weight_norm",
        _ADAM,
        direction=optlab.adabelief(0.1),
        magnitude=optlab.adabelief(0.1),
        tags={"needs_params"},
        hits=MATRICES,
        facts={"state_bytes": 8.0},
    ),
    link(
        "select_blocks",
        optlab.scale_by_moments,
        tag="gs",
        inner=optlab.scale_by_moments(),
        normalize=True,
        tags={"wrapper"},
        facts={"state_bytes": 8.0},
    ),
    link(
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
    link(
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
        fed(optlab.scale_by_raw_gradient, raw_gradient=partial(_times, 2)),
        frozenset({"elementwise", "layerwise"}),
        hits=ALL,
        facts={"state_bytes": 4.0},
    ),
    link(
        "project_onto_subspace",
        basis=_first_inputs,
        tags={"layerwise", "stateless", "idempotent"},
        hits=MATRICES,
        facts={"state_bytes": 0.0},
    ),
    link(
        "project_onto_subspace",
        tag="away",
        basis=_first_outputs,
        away=True,
        side="cols",
        tags={"layerwise", "stateless", "idempotent"},
        hits=MATRICES,
        facts={"state_bytes": 0.0},
    ),
    link(
        "keep_sparsity",
        tags={"needs_params", "idempotent", *ELEMENTWISE},
        params=_pruned_params,
        hits=MATRICES,
        facts={"state_bytes": 1.0},
    ),
    # It passes updates through: what it must differ from is nothing.
    link(
        "accumulate_importance",
        optax.set_to_zero,
        tags=ELEMENTWISE,
        facts={"state_bytes": 4.0},
    ),
    link(
        "accumulate_importance",
        optax.set_to_zero,
        tag="squares",
        p=2,
        tags=ELEMENTWISE,
        facts={"state_bytes": 4.0},
    ),
    link(
        "random_subspace",
        inner=optax.scale(1.0),
        dim=7,
        facts={"state_bytes": 0.0},
    ),
    link("norm_growth_limiter", growth=0.5, hits=TENSORS, facts={"state_bytes": 0.0}),
    link(
        "with_raw_gradient",
        momentum=optlab.heavy_ball(0.9),
        inner=optlab.scale_by_raw_gradient(),
        tags={"wrapper"},
        facts={"state_bytes": 8.0},
    ),
    link(
        "decay_after_update",
        learning_rate=1.0,
        weight_decay=0.1,
        tags={"decay", "needs_params", *ELEMENTWISE},
        facts={"state_bytes": 0.0, "decay_factor": 0.9},
    ),
)


CASES = (
    *RECIPES,
    *LINKS,
    *catalog_state.CASES,
    *catalog_schedules.SCHEDULES,
    *catalog_schedules.RATES,
    *catalog_controllers.CASES,
)
