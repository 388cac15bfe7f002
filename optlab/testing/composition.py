"""Composition: optax's combinators, hyperparameters, missing and unknown arguments."""

import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optlab.testing import compare
from optlab.testing.case import Case, Tree, default_of
from optlab.testing.select import applies


def two_steps(case: Case, tx, update=None) -> Tree:
    """Return the updates of the second step, with `update` in the place of `tx.update`."""
    state, update = tx.init(case.tree), update or tx.update
    for index in range(2):
        updates, state = update(case.grads(index), state, case.tree)
    return updates


def _run(tx, **extra_args):
    """Return `(params, grads) -> updates` of two steps on one gradient."""

    def run(params, grads):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params, **extra_args)
        return updates

    return run


def _same_two_steps(case: Case, tx, what: str, **extra_args) -> None:
    args = case.tree, case.grads()
    compare.same_results((_run(tx, **extra_args), *args), (_run(case.tx), *args), what)


@applies()
def check_chain(case: Case) -> None:
    """Inside `optax.chain` and `optax.named_chain` the update is the same."""
    chained = optax.chain(optax.identity(), case.make(), optax.identity())
    _same_two_steps(case, chained, "two steps in a chain")
    named = optax.named_chain(("first", optax.identity()), ("method", case.make()))
    _same_two_steps(case, named, "two steps in a named_chain")


_OUTSIDE = {"head": {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)}}


def _beside(case: Case, restrict: Callable[[Tree], Any], what: str) -> None:
    """Assert that `restrict(mask)`, a transformation of some leaves, leaves the others alone."""
    mask = {
        "inside": jax.tree.map(lambda _: True, case.tree),
        "outside": jax.tree.map(lambda _: False, _OUTSIDE),
    }

    def step(params, grads):
        params, grads = ({"inside": tree, "outside": _OUTSIDE} for tree in (params, grads))
        tx = restrict(mask)
        updates, _ = tx.update(grads, tx.init(params), params)
        compare.equal(updates["outside"], _OUTSIDE, f"leaves outside {what}")
        return updates["inside"]

    def alone(params, grads):
        return case.tx.update(grads, case.tx.init(params), params)[0]

    args = case.tree, case.grads()
    compare.same_results((step, *args), (alone, *args), f"leaves inside {what}")


@applies()
def check_masked(case: Case) -> None:
    """Under `optax.masked`, leaves outside keep their gradients, and those inside see no other."""
    _beside(case, lambda mask: optax.masked(case.make(), mask), "a mask")


@applies()
def check_partition(case: Case) -> None:
    """Under `optax.partition`, each branch is bit for bit what it is alone."""

    def restrict(mask):
        labels = jax.tree.map(lambda inside: "method" if inside else "other", mask)
        return optax.partition({"method": case.make(), "other": optax.identity()}, labels)

    _beside(case, restrict, "a branch")


@applies()
def check_multi_steps(case: Case) -> None:
    """`MultiSteps(3)` waits with zero updates and an untouched state, then steps on the mean."""
    multi = optax.MultiSteps(case.make(), every_k_schedule=3)
    update = jax.jit(multi.update)
    state = fresh = multi.init(case.tree)
    zeros = jax.tree.map(jnp.zeros_like, case.tree)
    for index in range(2):
        updates, state = update(case.grads(index), state, case.tree)
        compare.close(updates, zeros, "update before step 3")
        compare.equal(state.inner_opt_state, fresh.inner_opt_state, "state before step 3")
    updates, state = update(case.grads(2), state, case.tree)
    mean = jax.tree.map(lambda *g: sum(g) / 3, *(case.grads(i) for i in range(3)))
    want, inner = case.step(mean, case.tx.init(case.tree), case.tree)
    # The mean is accumulated in another order: a few roundings more.
    got, atol = (updates, state.inner_opt_state), max(1e-5, case.rounding)
    compare.close(got, (want, inner), "step 3", 1e-4, atol)
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), case.tree)
    init = jax.eval_shape(multi.init, half)
    compare.same_types(jax.eval_shape(multi.update, half, init, half)[1], init, "bfloat16 state")


@applies(two_programs=True)
def check_apply_if_finite(case: Case) -> None:
    """`apply_if_finite` stops a NaN gradient: nothing moves, and the next step is as if first."""
    tx: Any = optax.apply_if_finite(case.make(), max_consecutive_errors=5)
    update = jax.jit(tx.update)
    fresh = tx.init(case.tree)
    nans = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), case.tree)
    updates, state = update(nans, fresh, case.tree)
    compare.close(updates, jax.tree.map(jnp.zeros_like, case.tree), "update of NaN gradients")
    compare.equal(state.inner_state, fresh.inner_state, "state after NaN gradients")
    updates, _ = update(case.grads(), state, case.tree)
    want, _ = case.step(case.grads(), case.tx.init(case.tree), case.tree)
    compare.close(updates, want, "first step after NaN gradients", atol=case.rounding)


def _admits_array(annotation: Any) -> bool:
    """Tell whether an annotation is `jax.Array` or a union with it, as `ScalarOrSchedule` is."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else ()
    return annotation is jax.Array or any(_admits_array(m) for m in members)


def injectable(make: Callable[..., Any]) -> list[str]:
    """Return the hyperparameters of `make` that may be traced, read from its annotations."""
    parameters = inspect.signature(make, eval_str=True).parameters
    return [name for name, p in parameters.items() if _admits_array(p.annotation)]


@applies(two_programs=True)
def check_inject_hyperparams(case: Case) -> None:
    """Hyperparameters annotated as arrays can be injected, traced, with the same numbers."""
    names = set(injectable(case.make))
    parameters = case.signature.parameters
    static = [
        name
        for name, p in parameters.items()
        if name not in names and p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    numbers = {name: default_of(case, name) for name in names}
    # Nearby values, so that a default baked in where the argument belongs shows.
    numbers = {k: 0.9 * v for k, v in numbers.items() if isinstance(v, (int, float))}
    injected = optax.inject_hyperparams(case.make, static_args=static)(**numbers)
    state: Any = injected.init(case.tree)
    absent = set(numbers) - set(state.hyperparams)
    assert not absent, f"{sorted(absent)} cannot be injected"
    got = two_steps(case, injected, jax.jit(injected.update))
    compare.close(
        got,
        two_steps(case, case.make(**numbers)),
        "two steps with injected numbers",
        atol=case.rounding,
    )


@applies()
def check_extra_args(case: Case) -> None:
    """Unknown extra arguments are ignored."""
    forms = [optax.with_extra_args_support(case.make())]
    if isinstance(case.tx, optax.GradientTransformationExtraArgs):
        forms.append(case.tx)
    for tx in forms:
        _same_two_steps(case, tx, "two steps with an unknown argument", unknown_argument=np.ones(3))


@applies(two_programs=True)
def check_params_none(case: Case) -> None:
    """Without params the update is the same, or a ValueError names the method and the call."""
    state = case.tx.init(case.tree)
    want, _ = case.step(case.grads(), state, case.tree)
    try:
        got, _ = case.tx.update(case.grads(), state)
    except ValueError as error:
        text = str(error)
        assert re.match(r"\w+: ", text), f"the message does not begin with a name: {text}"
        assert re.search(r"update\(.*params", text), f"the message shows no call: {text}"
        return
    assert "needs_params" not in case.tags, "an update that needs params ran without"
    compare.close(got, want, "update without params", atol=case.rounding)


@applies(needs=["wrapper"])
def check_wrapper_forwards(case: Case) -> None:
    """A wrapper hands its inner transformation gradients, params and extra arguments alike."""
    seen = {}

    def spy(updates, state, params=None, **extra_args):
        seen.update(params=params, **extra_args)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, spy)
    tx = case.make(inner=inner)
    tx.update(case.grads(), tx.init(case.tree), case.tree, note=3)
    assert seen.get("params") is not None, "the inner transformation got params=None"
    compare.same_structure(seen["params"], case.tree, "params of the inner transformation")
    assert seen.get("note") == 3, "extra arguments are not forwarded to the inner transformation"


@applies(needs=["recipe"], two_programs=True)
def check_constant_schedule(case: Case) -> None:
    """A constant schedule is the constant learning rate."""
    rate = default_of(case, "learning_rate")
    assert isinstance(rate, float), "give the row's `make` a default learning_rate"
    scheduled = case.make(learning_rate=optax.constant_schedule(rate))
    got, want = (
        two_steps(case, scheduled, jax.jit(scheduled.update)),
        two_steps(case, case.tx, case.step),
    )
    compare.close(got, want, "two steps under a constant schedule", atol=case.rounding)


__all__ = [name for name in dir() if name.startswith("check_")]
