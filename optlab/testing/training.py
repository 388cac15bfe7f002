"""Training: small problems to the end, and Flax's own loops with sharding metadata."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding

from optlab.testing import compare
from optlab.testing.case import Case
from optlab.testing.select import applies
from optlab.testing.sharding import mesh_of


def _quadratic(case: Case):
    """Return a problem every leaf of which has its own minimum, and its start."""
    start, goal = case.tree, case.grads(9)

    def loss(params):
        return sum(
            jnp.sum((p - g) ** 2)
            for p, g in zip(jax.tree.leaves(params), jax.tree.leaves(goal), strict=True)
        )

    return loss, start


def _angular(case: Case):
    """Return a problem of directions alone, for methods that keep norms.

    The goal is the start, its inputs reversed: every output channel keeps its norm.
    """
    goal = {path: jnp.flip(p, axis=0) for path, p in case.hit_leaves(case.tree).items()}
    assert goal, "an angular method states the leaves it hits"

    def loss(params):
        moved = case.hit_leaves(params)
        cosine = lambda p, g: jnp.sum(p * g) / jnp.sqrt(jnp.sum(p**2) * jnp.sum(g**2))  # noqa: E731
        return sum(1 - cosine(p, goal[path]) for path, p in moved.items())

    return loss, case.tree


@applies(needs=["recipe"])
def check_convergence(case: Case) -> None:
    """1000 steps of a decaying learning rate bring a small problem to a hundredth of its loss."""
    steps = 1000
    loss, start = (_angular if "angular" in case.tags else _quadratic)(case)
    rate = case.facts.get("convergence_rate", 0.1)
    quiet = {"weight_decay": 0.0} if "weight_decay" in case.signature.parameters else {}
    tx = case.make(learning_rate=optax.linear_schedule(rate, 0.0, steps), **quiet)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), length=steps)[0][0])
    first, last = float(loss(start)), float(loss(run(start)))
    assert last < 0.01 * first, f"the loss fell from {first:.4g} to {last:.4g} in {steps} steps"


@functools.cache
def _nnx_model() -> tuple[Any, Any, Any]:
    """Return a model with sharded kernels, taken apart, and gradients of its parameters."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self, rngs):
            kernel = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
            self.dense = nnx.Linear(8, 16, kernel_init=kernel, rngs=rngs)
            self.norm = nnx.LayerNorm(16, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.dense(x))

    model, x = Model(nnx.Rngs(0)), jnp.linspace(-1.0, 1.0, 32).reshape(4, 8)
    grads = nnx.jit(nnx.grad(lambda model: jnp.mean((model(x) - 1.0) ** 2)))(model)
    return *nnx.split(model), grads


@applies(needs=["recipe"])
def check_nnx_optimizer(case: Case) -> None:
    """One step of `nnx.Optimizer` on a model with sharded kernels is the step on its arrays."""
    from flax import nnx

    # Compiled as in a training loop: op by op, hundreds of collectives are in flight at once, and
    # on a few cores 8 host devices can wait for each other until XLA aborts.
    step = nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads))
    arrays = lambda model: nnx.to_pure_dict(nnx.state(model, nnx.Param))  # noqa: E731
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        *apart, grads = _nnx_model()
        model = nnx.merge(*apart, copy=True)
        params, pure = arrays(model), nnx.to_pure_dict(nnx.state(grads))
        optimizer = nnx.Optimizer(model, case.make(), wrt=nnx.Param)
        want, _ = jax.jit(case.tx.update)(pure, case.tx.init(params), params)
        want = jax.tree.map(np.add, params, want)
        step(optimizer, model, grads)
        compare.close(arrays(model), want, "NNX parameters", 1e-4)
        step(optimizer, model, grads)
        compare.finite(arrays(model), "NNX parameters, step two")


@functools.cache
def _linen_model() -> tuple[Any, Any, Any]:
    """Return a model, its parameters in boxes that name mesh axes, and their gradients."""
    from flax import linen as nn

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("data", "model"))
            return nn.LayerNorm(name="norm")(nn.Dense(16, kernel_init=kernel, name="dense")(x))

    x, model = jnp.linspace(-1.0, 1.0, 32).reshape(4, 8), Model()
    boxed = model.init(jax.random.key(0), x)["params"]
    loss = lambda p: jnp.mean((jnp.asarray(model.apply({"params": p}, x)) - 1.0) ** 2)  # noqa: E731
    return model, boxed, jax.grad(loss)(boxed)


@applies(needs=["recipe"])
def check_linen_train_state(case: Case) -> None:
    """One step of Linen's `TrainState`, plain and with boxed parameters, is the same step."""
    from flax import linen as nn
    from flax.training.train_state import TrainState

    model, boxed, grads = _linen_model()
    plain: Any = nn.unbox(boxed)
    want, _ = case.tx.update(nn.unbox(grads), case.tx.init(plain), plain)
    want = jax.tree.map(jnp.add, plain, want)
    for params, of_params in ((plain, nn.unbox(grads)), (boxed, grads)):
        state = TrainState.create(apply_fn=model.apply, params=params, tx=case.make())
        new = state.apply_gradients(grads=of_params)
        compare.close(nn.unbox(new.params), want, "Linen parameters", 1e-4)
    # Names of axes are copied onto the state: they must fit what they are copied onto.
    mesh, specs = mesh_of(AxisType.Auto), nn.get_partition_spec(state.opt_state)
    jax.tree.map(
        lambda x, spec: NamedSharding(mesh, spec).shard_shape(jnp.shape(x)),
        nn.unbox(state.opt_state),
        specs,
    )


__all__ = [name for name in dir() if name.startswith("check_")]
