"""Trees and leaves: containers, missing leaves, odd shapes, odd values."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab.testing import compare
from optlab.testing.case import Case, Tree, leaves_by_path, random_like
from optlab.testing.select import applies


class _Pair(NamedTuple):
    a: Tree
    b: Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Record:
    a: Tree
    b: Tree


_CONTAINERS = {
    "dict": lambda a, b: {"a": a, "b": b},
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "NamedTuple": _Pair,
    "dataclass": _Record,
}


def _one_step(case: Case, params: Tree, grads: Tree) -> tuple[Tree, Tree]:
    return case.tx.update(grads, case.tx.init(params), params)


@applies()
def check_structure_agnostic(case: Case) -> None:
    """The same leaves in a dict, list, tuple, NamedTuple or dataclass get the same updates."""
    trees = (case.tree, random_like(case.tree, seed=50)), (case.grads(), case.grads(1))
    calls = {
        name: (partial(_one_step, case), *(build(*pair) for pair in trees))
        for name, build in _CONTAINERS.items()
    }
    program = compare.program(*calls["dict"])
    for name, call in calls.items():
        what = f"leaves in a {name}, against a dict"
        compare.same_results(call, calls["dict"], what, program)


def _with_hole(case: Case, hole) -> None:
    full, grads = ({"extra": hole, "tree": tree} for tree in (case.tree, case.grads()))

    def step(params, grads):
        state = case.tx.init(params)
        for _ in range(2):
            updates, state = case.tx.update(grads, state, params)
        compare.same_structure(updates, grads, "updates of a tree with a hole")
        return updates

    without = {"tree": case.tree}, {"tree": case.grads()}
    compare.same_results((step, full, grads), (step, *without), "leaves beside the hole")


@applies()
def check_none_leaf(case: Case) -> None:
    """None in the place of a leaf stays None and disturbs no other leaf."""
    _with_hole(case, None)


@applies()
def check_masked_node(case: Case) -> None:
    """`optax.MaskedNode` in the place of a leaf stays and disturbs no other leaf."""
    _with_hole(case, optax.MaskedNode())


@applies()
def check_empty_tree(case: Case) -> None:
    """A tree without leaves is a tree."""
    for empty in ({}, [], ()):
        updates, _ = jax.eval_shape(partial(_one_step, case), empty, empty)
        compare.same_structure(updates, empty, "updates of a tree without leaves")


@applies()
def check_scalar_leaf(case: Case) -> None:
    """A scalar, and a leaf of one element, get an update of their shape and of sane size."""
    shapes = {"bias": (1,), "temperature": ()}
    params, grads = (
        {name: jnp.full(shape, value, jnp.float32) for name, shape in shapes.items()}
        for value in (0.5, 0.1)
    )
    state = case.tx.init(params)
    for _ in range(2):
        updates, state = case.step(grads, state, params)
        compare.same_types(updates, params, "updates of leaves of one element")
        for path, u in leaves_by_path(updates).items():
            good = abs(float(jnp.sum(u))) < 1e3
            assert good, f"gradient 0.1 of the one-element leaf '{path}' became {u}"


@applies()
def check_zero_size_leaf(case: Case) -> None:
    """Leaves without elements get updates without elements, and poison no other leaf."""
    shapes = {"dense": {"kernel": (0, 4), "bias": (0,)}, "other": {"kernel": (4, 0)}}
    empty = random_like(shapes, seed=0)
    step = jax.jit(partial(_one_step, case))
    updates, _ = step({"e": empty, "t": case.tree}, {"e": empty, "t": case.grads()})
    compare.same_types(updates["e"], empty, "updates of leaves without elements")
    compare.finite(updates, "updates beside leaves without elements")


def _finite_steps(case: Case, params: Tree, grads: Tree, what: str) -> Tree:
    """Assert that three updates are finite, and return the state."""
    state = case.tx.init(params)
    for _ in range(3):
        updates, state = case.step(grads, state, params)
        compare.finite(updates, f"updates, {what}")
    return state


@applies()
def check_zero_grads_finite(case: Case) -> None:
    """Zero gradients, from the first step on, give finite updates and finite state."""
    zeros = jax.tree.map(jnp.zeros_like, case.tree)
    state = _finite_steps(case, case.tree, zeros, "zero gradients")
    compare.finite(state, "state after zero gradients")


@applies()
def check_zero_params_finite(case: Case) -> None:
    """Zero parameters give finite updates, with gradients and without."""
    zeros = jax.tree.map(jnp.zeros_like, case.tree)
    _finite_steps(case, zeros, case.grads(), "zero parameters")
    _finite_steps(case, zeros, zeros, "zero parameters and gradients")


@applies()
def check_extreme_grads_finite(case: Case) -> None:
    """Gradients of 1e30 and of 1e-30, whose squares leave float32, give finite updates."""
    for size in (1e30, 1e-30):
        grads = jax.tree.map(lambda g, c=size: c * jnp.sign(g), case.grads())
        _finite_steps(case, case.tree, grads, f"gradients of {size}")


__all__ = [name for name in dir() if name.startswith("check_")]
