"""How rows of the catalogue are written."""

import functools
from functools import partial

import optax

import optlab
from optlab.testing import Case, default_params, random_like

MATRICES = ("attn/query/kernel", "conv/kernel", "dense/kernel")
VECTORS = ("dense/bias", "norm/scale")
TENSORS = MATRICES + VECTORS
ALL = (*TENSORS, "temperature")

ELEMENTWISE = {"elementwise", "layerwise"}


def recipe(name: str, fallback=None, *, tags=(), hits=ALL, facts=(), tag="", **arguments) -> Case:
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


def link(
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


def stacked_params():
    """Return two layers in one leaf, as `scan` stacks them, beside an unstacked head."""
    layers = {"dense": {"bias": (2, 16), "kernel": (2, 8, 16)}}
    return random_like({"layers": layers, "head": {"kernel": (16, 4)}}, seed=0)


STACKED = {
    "tag": "stacked",
    "layout": optlab.layout.stacked("layers/"),
    "params": stacked_params,
    "hits": ("layers/dense/kernel",),
}


def fed(make, **extra):
    """Return `make` whose update is given these extra arguments, functions of the updates."""

    @functools.wraps(make)
    def build(**arguments):
        tx = make(**arguments)

        def update(updates, state, params=None, **extra_args):
            given = {key: value(updates) for key, value in extra.items()}
            return tx.update(updates, state, params, **given, **extra_args)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return build
