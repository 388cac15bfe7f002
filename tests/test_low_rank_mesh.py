"""The low-rank recipes on meshes of 8 devices: the numbers, the places, and what is gathered."""

import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_problem import mesh_of, off
from sharded import QUICK

import optlab

EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
M, N, RANK = 16, 48, 4
LEAVES = {
    "both/kernel": ((N, M), P("data", "model")),
    "inputs/kernel": ((M, N), P("fsdp", None)),
    "outputs/kernel": ((M, N), P(None, "fsdp")),
    "whole/bias": ((N,), P("model")),
}
COMMON = {"every": 2, "eps": 1e-3}
RECIPES = {
    "galore": functools.partial(optlab.galore, 0.1, rank=RANK, **COMMON),
    "q_galore": functools.partial(optlab.q_galore, 0.1, rank=RANK, block=8, **COMMON),
    "fira": functools.partial(optlab.fira, 0.1, rank=RANK, **COMMON),
    "frugal": functools.partial(optlab.frugal, 0.1, **COMMON),
    "apollo": functools.partial(optlab.apollo, 0.1, rank=RANK, **COMMON),
    "conda": functools.partial(optlab.conda, 0.1, **COMMON),
    "ldadam": functools.partial(optlab.ldadam, 0.1, rank=RANK, eps=1e-3),
    "grad_norm_lorp": functools.partial(optlab.grad_norm_lorp, 0.1, rank=RANK, **COMMON),
}


# Power iteration to a basis of full rank makes roundings (s_1/s_m)^2 = 130 times as large.
WIDE = {"conda"}


def draw(seed, dtype="f4"):
    """Return a tree whose matrices have the singular values 0.85^i."""
    rng, tree = np.random.default_rng(seed), {}
    for name, (shape, _) in LEAVES.items():
        x = rng.normal(size=shape)
        if x.ndim == 2:
            u, s, vt = np.linalg.svd(x, full_matrices=False)
            x = (u * 3 * 0.85 ** np.arange(len(s))) @ vt
        tree[name] = x.astype(dtype)
    return tree


def on(mesh, tree):
    return {k: jax.device_put(x, NamedSharding(mesh, LEAVES[k][1])) for k, x in tree.items()}


def trained(tx, place, steps=3, dtype="f4"):
    """Return parameters and states of all steps, and the compiled step."""

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = place(draw(0, dtype))
    states = [jax.jit(tx.init)(params)]
    step = jax.jit(step).lower(place(draw(1, dtype)), states[0], params).compile(QUICK)
    for t in range(steps):
        params, state = step(place(draw(t + 1, dtype)), states[-1], params)
        jax.block_until_ready(params)
        states.append(state)
    return params, states, step


@functools.cache
def alone(name, dtype):
    return trained(RECIPES[name](), lambda tree: jax.tree.map(jnp.asarray, tree), dtype=dtype)[0]


def largest_moved(text):
    """Return the number of elements of the largest array that a collective gives to a device."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf" = (.*?) (?:{kinds})(?:-start)?\(", text)
    shapes = re.findall(r"\[([\d,]*)\]", " ".join(found))
    return max((math.prod(int(n) for n in s.split(",") if n) for s in shapes), default=0)


def parts(x):
    """Return into how many different pieces an array is cut."""
    return x.size // math.prod(x.sharding.shard_shape(x.shape))


@pytest.mark.parametrize("kind", [EXPLICIT, AUTO], ids=["explicit", "auto"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_sharded_run_is_that_of_one_device(name, kind):
    dtype, mesh = "f8" if name in WIDE else "f4", mesh_of(kind)
    with jax.enable_x64(name in WIDE):
        want = alone(name, dtype)
        with jax.set_mesh(mesh):
            params = on(mesh, draw(0, dtype))
            tx = RECIPES[name](shardings=optlab.shardings_of(params) if kind == AUTO else None)
            got, states, step = trained(tx, functools.partial(on, mesh), dtype=dtype)
            told = optlab.state_sharding(tx, params)
        assert off(got, want, draw(0, dtype)) < (1e-12 if name in WIDE else 1e-5)
    for leaf, start in params.items():
        assert got[leaf].sharding.is_equivalent_to(start.sharding, start.ndim)
    for state in states:
        for x, sharding in zip(*map(jax.tree.leaves, (state, told)), strict=True):
            assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.shape, x.sharding, sharding)
    # What has the rank of a leaf is cut into as many pieces as the leaf, but for sums over slices.
    matrices = [x for x in jax.tree.leaves(states[-1]) if x.ndim == 2 and 1 not in x.shape]
    cut = [parts(x) for x in matrices if N in x.shape]
    assert len(cut) >= 3
    assert set(cut) <= {2, 4}
    assert 0 < largest_moved(step.as_text()) < M * N


def test_an_exact_svd_does_move_a_whole_matrix():
    mesh = mesh_of(AUTO)
    with jax.set_mesh(mesh):
        known = optlab.shardings_of(on(mesh, draw(0)))
        tx = optlab.galore(0.1, rank=RANK, projector=optlab.svd_projector(), shardings=known)
        *_, step = trained(tx, functools.partial(on, mesh), steps=0)
    assert largest_moved(step.as_text()) >= M * N


INPUT = np.random.default_rng(1).normal(size=(5, 8)).astype("f4")
AXES = ("fsdp", "model")
# Not divisible by the axes of the mesh, which the boxes name.
BOXED = functools.partial(optlab.galore, 0.1, rank=3, every=2, eps=1e-3)


def nnx_run(sharded):
    """Return the kernel after three steps of an NNX optimizer, and its state."""
    draw = nnx.initializers.lecun_normal()
    make = lambda: nnx.Linear(  # noqa: E731
        8,
        16,
        kernel_init=nnx.with_partitioning(draw, AXES) if sharded else draw,
        rngs=nnx.Rngs(0),
    )
    model = nnx.jit(make)()
    known = optlab.shardings_of(nnx.state(model, nnx.Param)) if sharded else None
    tx = BOXED(shardings=known)
    optimizer = nnx.jit(lambda model: nnx.Optimizer(model, tx, wrt=nnx.Param))(model)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(jnp.tanh(m(INPUT)) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer)
        jax.block_until_ready(nnx.state(model))
    return model.kernel[...], nnx.to_pure_dict(nnx.state(optimizer))


def linen_run(sharded):
    """Return the kernel after three steps on Linen's boxes, and the state of the optimizer."""
    draw = nn.initializers.lecun_normal()
    layer = nn.Dense(16, kernel_init=nn.with_partitioning(draw, AXES) if sharded else draw)
    params = jax.jit(layer.init)(jax.random.key(0), INPUT)["params"]
    tx = BOXED(shardings=optlab.shardings_of(params) if sharded else None)
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.sum(jnp.tanh(layer.apply({"params": p}, INPUT)) ** 2))(
            params
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = jax.block_until_ready(step(params, state))
    return nn.unbox(params)["kernel"], nn.unbox(state)


@pytest.mark.parametrize("run", [nnx_run, linen_run])
def test_boxes_that_name_axes_hold_no_coordinates(run):
    want, state = run(False)
    with jax.set_mesh(mesh_of(AUTO)):
        got, on_mesh = run(True)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
    shapes = [sorted(x.shape for x in jax.tree.leaves(tree)) for tree in (state, on_mesh)]
    assert shapes[0] == shapes[1]
    assert shapes[0].count((3, 16)) == 2
