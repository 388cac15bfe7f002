"""Rows of the catalogue: what makes steps safe, curvature, and what is kept in few bits."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import optax
from rows import ALL, ELEMENTWISE, MATRICES, STACKED, TENSORS, fed, link, recipe, stacked_params

import optlab
from optlab import codecs, layout, measures
from optlab.testing import Case
from optlab.testing.case import leaves_by_path

MEASURES = (
    measures.gradient_rms,
    measures.update_rms,
    measures.relative_update,
    measures.trust_ratio_min,
    measures.trust_ratio_median,
    measures.trust_ratio_max,
    measures.clip_rate,
    measures.nonfinite_entries,
    measures.orthogonality_error,
)
CODED = ("attn/query/kernel", "conv/kernel", "dense/kernel", "dense/bias")
_GROWING = partial(optax.scale_by_schedule, lambda step: 100.0**step)


@functools.wraps(optlab.clip_spikes)
def _clip_growing(**arguments):
    """Return `clip_spikes` of updates a hundred times as large at every step."""
    return optax.chain(_GROWING(), optlab.clip_spikes(**arguments))


@functools.wraps(optlab.reset_moments)
def _reset_after_moments(inner, **arguments):
    """Return `reset_moments` around Adam's moments and what it is given."""
    return optlab.reset_moments(optax.chain(optlab.scale_by_moments(), inner), **arguments)


def _multiples(u):
    """Return three multiples of a gradient, as those of examples."""
    return jnp.stack([u, 2 * u, 6 * u])


def _directions(u):
    """Return a gradient, one of the same size in another direction, and a larger one."""
    return jnp.stack([u, jnp.flip(2 * u) if u.ndim else -u, 3 * u])


def _fed_several(make, several):
    """Return a rule that gets several gradients made of every one."""

    @functools.wraps(make)
    def build(**arguments):
        mean = make(**arguments)

        def update(updates, state, params=None, **extra_args):
            return mean.update(jax.tree.map(several, updates), state, params, **extra_args)

        return optax.GradientTransformationExtraArgs(mean.init, update)

    return build


def _squared(_):
    """Return curvature estimates of the size of the parameters' squares."""
    return lambda params, key: jax.tree.map(lambda p: 100 * (p * p + 0.01), params)


def _grams(updates):
    """Return diagonal second moments, 1 to 2, for the matrices of a tree."""
    views = {
        path: (layout.view_of(path, leaf, layout.flax), leaf.shape)
        for path, leaf in leaves_by_path(updates).items()
    }
    return {
        path: jnp.diag(jnp.linspace(1.0, 2.0, view.dims(shape)[0]))
        for path, (view, shape) in views.items()
        if view is not None
    }


def _quantized(tag, codec, nbytes, **arguments):
    return link(
        "quantize_state",
        optlab.scale_by_moments,
        tag=tag,
        inner=optlab.scale_by_moments(),
        codec=codec,
        min_size=16,
        tags={"wrapper"},
        hits=CODED,
        facts={"state_bytes": nbytes},
        **arguments,
    )


STABLE = (
    recipe("spam", tags=ELEMENTWISE, facts={"state_bytes": 8.0}),
    recipe(
        "spam",
        tag="resets",
        every=2,
        warmup=2,
        threshold=10.0,
        official=True,
        grace=1,
        weight_decay=0.1,
        tags=ELEMENTWISE,
        facts={"state_bytes": 8.0},
    ),
    recipe("stable_spam", tags={"layerwise", "scale_invariant"}, facts={"state_bytes": 8.0}),
    recipe(
        "stable_spam",
        tag="official",
        every=2,
        official=True,
        momentum_scale=optax.cosine_decay_schedule(1.0, 100, 0.5),
        tags={"layerwise", "scale_invariant"},
        facts={"state_bytes": 8.0},
    ),
    Case(
        "clip_spikes",
        _clip_growing,
        frozenset({"layerwise"}),
        hits=ALL,
        facts={"state_bytes": 0.0},
        fallback=_GROWING,
    ),
    Case(
        "clip_spikes[stacked]",
        partial(_clip_growing, layout=STACKED["layout"]),
        frozenset({"layerwise"}),
        stacked_params,
        STACKED["hits"],
        facts={"state_bytes": 0.0},
        fallback=_GROWING,
    ),
    link(
        "normalize_gradient_norm",
        tags={"layerwise", "scale_invariant"},
        facts={"state_bytes": 0.0},
    ),
    link(
        "normalize_gradient_norm",
        tags={"layerwise", "scale_invariant"},
        facts={"state_bytes": 0.0},
        **STACKED,
    ),
    link("scale_by_spam", threshold=2.0, tags=ELEMENTWISE, facts={"state_bytes": 8.0}),
    Case(
        "reset_moments",
        partial(_reset_after_moments, inner=optax.identity(), every=2, warmup=3),
        frozenset({"wrapper", *ELEMENTWISE}),
        hits=ALL,
        facts={"state_bytes": 8.0},
        fallback=optlab.scale_by_moments,
    ),
    Case(
        "winsorize",
        partial(_fed_several(optlab.winsorize, _multiples), percent=20.0),
        frozenset({"stateless", *ELEMENTWISE}),
        hits=ALL,
        facts={"state_bytes": 0.0},
    ),
    Case(
        "median_of_groups",
        _fed_several(optlab.median_of_groups, _multiples),
        frozenset({"stateless", *ELEMENTWISE}),
        hits=ALL,
        facts={"state_bytes": 0.0},
    ),
    Case(
        "combine_gradients",
        _fed_several(optlab.combine_gradients, _directions),
        frozenset({"stateless"}),
        hits=ALL,
        facts={"state_bytes": 0.0},
    ),
    link(
        "rolling_median",
        warmup="zeros",
        tags=ELEMENTWISE,
        hits=TENSORS,
        facts={"state_bytes": 8.0},
    ),
    link(
        "skip_bad_steps",
        inner=optlab.scale_by_moments(),
        tags={"wrapper", "scale_invariant"},
        facts={"state_bytes": 8.0},
    ),
)

CURVATURE = (
    Case(
        "sophia",
        partial(fed(optlab.sophia, curvature=_squared), learning_rate=0.1),
        frozenset({"recipe", "needs_params", *ELEMENTWISE}),
        hits=ALL,
        facts={"state_bytes": 8.0},
        fallback=partial(optlab.signum, 0.1, momentum=0.96),
    ),
    Case(
        "scale_by_clipped_curvature",
        fed(optlab.scale_by_clipped_curvature, curvature=_squared),
        frozenset({"needs_params", *ELEMENTWISE}),
        hits=ALL,
        facts={"state_bytes": 8.0},
        fallback=partial(optlab.scale_by_sign_momentum, 0.96),
    ),
    Case(
        "precondition_by_input_gram",
        fed(optlab.precondition_by_input_gram, input_gram=_grams),
        frozenset({"stateless", "layerwise"}),
        hits=MATRICES,
        facts={"state_bytes": 0.0},
    ),
)

STATE = (
    _quantized("fp8", codecs.fp8(), 2.09375),
    _quantized("int8", codecs.int8(), 2.0625),
    _quantized("linear", codecs.int8(map="linear"), 2.0625),
    _quantized("int4", codecs.int4(), 1.0625),
    _quantized("stochastic", codecs.int8(), 2.0625, stochastic=True),
    link(
        "compensated_updates",
        inner=optlab.heavy_ball(0.9),
        tags={"wrapper", "needs_params"},
        facts={"state_bytes": 4.0},
    ),
    link(
        "round_weights",
        bits=4,
        block=32,
        tags={"needs_params"},
        hits=MATRICES,
        facts={"state_bytes": 0.0},
    ),
    link(
        "round_weights",
        tag="int8",
        block=32,
        tags={"needs_params"},
        hits=MATRICES,
        facts={"state_bytes": 0.0},
    ),
    link(
        "watch",
        inner=optlab.scale_by_moments(),
        tags={"wrapper", *ELEMENTWISE},
        facts={"state_bytes": 8.0},
    ),
    # Every measure there is.
    link(
        "watch",
        inner=optax.scale(0.5),
        tag="all",
        measures=MEASURES,
        learning_rate=optax.linear_schedule(1.0, 0.0, 10),
        tags={"wrapper", "needs_params", "layerwise"},
        facts={"state_bytes": 0.0},
    ),
    # It passes updates through: what it must differ from is nothing.
    link(
        "average_params",
        optax.set_to_zero,
        tags={"needs_params", *ELEMENTWISE},
        facts={"state_bytes": 4.0},
    ),
    link(
        "average_params",
        optax.set_to_zero,
        tag="mean",
        decay=None,
        start=1,
        tags={"needs_params", *ELEMENTWISE},
        facts={"state_bytes": 4.0},
    ),
)

CASES = (*STABLE, *CURVATURE, *STATE)
