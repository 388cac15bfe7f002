"""One problem for every mesh: leaves of all kinds, their shardings, a loss, and the steps.

Used by `test_mesh_training.py`, `test_mesh_use.py` and, in two processes, `two_processes.py`.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from stepping import FULL

import optlab
from optlab import layout

AXES = ("data", "fsdp", "model")
# Many leaves of one shape on purpose: what is decided per shape must not mix up their shardings.
LEAVES = {
    "attn/out/kernel": ((2, 8, 8), P("model", None, "data")),
    "attn/query/kernel": ((8, 2, 8), P("fsdp", "model", None)),
    "conv/kernel": ((2, 2, 4, 8), P(None, None, "fsdp", "model")),
    "down/kernel": ((16, 8), P(("data", "fsdp"), None)),
    "embed/embedding": ((16, 8), P(("data", "fsdp"), "model")),
    "free/kernel": ((8, 16), P()),
    "gate/kernel": ((8, 16), P(None, "model")),
    "layers/kernel": ((4, 8, 8), P("data", "fsdp", None)),
    "up/bias": ((16,), P("model")),
    "up/kernel": ((8, 16), P("fsdp", "model")),
}
LAYOUT = layout.stacked("^layers/")
# Rates at which ten steps move every leaf far: what is rounding in the leaf is small beside that.
RATES = {"muon": 0.1, "normuon": 0.2, "scion": 0.01, "lanton": 0.1}


def recipe(name: str, shardings: Any = None, **hyperparameters: Any) -> Any:
    """Return the recipe of that name for the problem's leaves."""
    given = {"learning_rate": RATES[name], "fallback_learning_rate": 0.1, "layout": LAYOUT}
    return getattr(optlab, name)(**(given | hyperparameters), shardings=shardings)


def mesh_of(kind: AxisType, shape: tuple[int, ...] = (2, 2, 2)) -> jax.sharding.Mesh:
    """Return a mesh of the first devices."""
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(kind,) * len(shape), devices=devices)


def draw(seed: int, low: float = -1.0, high: float = 1.0, leaves: Any = LEAVES) -> Any:
    """Return random leaves on the host, the same for the same seed; float64 where JAX has it."""
    rng, dtype = np.random.default_rng(seed), jnp.result_type(float)
    return {k: rng.uniform(low, high, shape).astype(dtype) for k, (shape, _) in leaves.items()}


def shardings_on(mesh: jax.sharding.Mesh | None, leaves: Any = LEAVES) -> Any:
    """Return the sharding of every leaf; without a mesh, one device."""
    if mesh is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return dict.fromkeys(leaves, one)
    return {key: NamedSharding(mesh, spec) for key, (_, spec) in leaves.items()}


class Trees(NamedTuple):
    """Parameters, where they should go, and how much each entry of them counts."""

    params: Any
    goal: Any
    weights: Any


def trees(shardings: Any, leaves: Any = LEAVES) -> Trees:
    """Return the problem, placed; every process gives its own part of the arrays."""

    def place(x, s):
        return jax.make_array_from_callback(x.shape, s, lambda index: x[index])

    drawn = draw(0, leaves=leaves), draw(1, leaves=leaves), draw(2, 0.5, 2.0, leaves)
    return Trees(*(jax.tree.map(place, tree, shardings) for tree in drawn))


def loss(params: Any, goal: Any, weights: Any) -> jax.Array:
    """Return a convex loss whose gradients have full rank and turn as the parameters move."""
    terms = (jnp.sum(weights[k] * jnp.sqrt(1 + (params[k] - goal[k]) ** 2)) for k in params)
    return sum(terms, jnp.zeros([]))


class Run(NamedTuple):
    """Parameters and state at every asked step, and how often the step was traced."""

    at: dict[int, tuple[Any, Any]]
    traces: int


def train(tx: Any, problem: Trees, steps: int, *, state: Any = None, first: int = 0) -> Run:
    """Take steps with one compiled function; keep what there is at the start, halfway, the end."""
    traces = 0

    def step(params, state, goal, weights):
        nonlocal traces
        traces += 1
        updates, state = tx.update(jax.grad(loss)(params, goal, weights), state, params)
        return optax.apply_updates(params, updates), state

    step, params = jax.jit(step, compiler_options=FULL), problem.params
    state = jax.jit(tx.init)(params) if state is None else state
    at = {first: (params, state)}
    for number in range(first + 1, steps + 1):
        params, state = step(params, state, *problem[1:])
        # Two steps in flight on 8 host devices and few cores can wait for each other.
        jax.block_until_ready(params)
        at |= {number: (params, state)} if number in (steps // 2, steps) else {}
    return Run(at, traces)


@functools.cache
def trained(name: str, kind: AxisType | None) -> Run:
    """Return ten steps of a recipe on a mesh of that kind, or on one device."""
    if kind is None:
        return train(recipe(name), trees(shardings_on(None)), 10)
    with jax.set_mesh(mesh_of(kind)):
        problem = trees(shardings_on(mesh_of(kind)))
        # An Explicit mesh is in the types: nothing need be said.
        known = optlab.shardings_of(problem.params) if kind == AxisType.Auto else None
        return train(recipe(name, known), problem, 10)


def off(got: Any, want: Any, start: Any = None) -> float:
    """Return the largest difference of two trees, each leaf's in units of its largest value.

    With `start`, what is compared is how far each leaf has come from there.
    """
    start = jax.tree.map(lambda x: np.zeros(x.shape), want) if start is None else start
    worst = 0.0
    pairs = zip(*(jax.tree.leaves(tree) for tree in (got, want, start)), strict=True)
    for a, b, origin in pairs:
        a, b, origin = (np.asarray(x, np.float64) for x in (a, b, origin))
        size = np.max(np.abs(b - origin), initial=0.0)
        worst = max(worst, float(np.max(np.abs(a - b), initial=0.0) / max(size, 1e-30)))
    return worst
