"""Rows of the catalogue: learning rates and averages that look at what they did."""

import functools
from functools import partial

import jax
import optax
from rows import ALL, fed, link

import optlab
from optlab.testing import Case


def _twice(updates):
    """Return another gradient: twice this one."""
    return jax.tree.map(lambda u: 2 * u, updates)


@functools.wraps(optlab.accuracy_gradient_rate)
def _after_two_epochs(**arguments):
    """Return the link seeing three epochs a step, of an accuracy that does not rise."""
    tx = optlab.accuracy_gradient_rate(**arguments)

    def update(updates, state, params=None, **extra_args):
        for _ in range(2):
            _, state = tx.update(updates, state, params, value=0.5)
        return tx.update(updates, state, params, value=0.5, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _row(name, make, fallback=optax.identity, *, facts, tags=(), tag="", **arguments):
    return Case(
        name + (f"[{tag}]" if tag else ""),
        partial(make, **arguments),
        frozenset(tags),
        hits=ALL,
        facts=facts,
        fallback=fallback,
    )


CASES = (
    _row(
        "accuracy_gradient_rate",
        _after_two_epochs,
        window=1,
        patience=0,
        factor=0.5,
        facts={"state_bytes": 0.0},
    ),
    _row(
        "hypergradient_rate",
        fed(optlab.hypergradient_rate, aux_grad=_twice),
        inner=optlab.scale_by_moments(),
        tags={"wrapper"},
        facts={"state_bytes": 8.0},
    ),
    _row(
        "hypergradient_rate",
        fed(optlab.hypergradient_rate, aux_grad=_twice),
        tag="previous",
        inner=optlab.scale_by_moments(),
        previous=True,
        tags={"wrapper"},
        facts={"state_bytes": 12.0},
    ),
    link(
        "adaptive_ema",
        inner=optax.sgd(0.1),
        tags={"wrapper", "needs_params"},
        facts={"state_bytes": 8.0},
    ),
)
