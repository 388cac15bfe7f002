"""A small transformer trained on a mesh by the loops of NNX and Linen, as on one device."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from mesh_problem import mesh_of, off

import optlab

STEPS, VOCABULARY = 3, 16
LECUN = nnx.initializers.lecun_normal()
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (4, 6))
RECIPES = {
    "muon": functools.partial(optlab.muon, 0.1, fallback_learning_rate=0.1),
    "normuon": functools.partial(optlab.normuon, 0.2, fallback_learning_rate=0.1),
}
each_recipe = pytest.mark.parametrize("name", RECIPES)


def entropy(logits):
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], TOKENS[:, 1:])
    return jnp.mean(each)


def check_lies_with(params, state):
    """Assert that the state has an array for every kernel where the kernel lies."""
    lying = [(x.shape, x.sharding) for x in jax.tree.leaves(state)]
    kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
    assert len({x.sharding for x in kernels}) > 3
    for x in kernels:
        assert any(
            shape == x.shape and sharding.is_equivalent_to(x.sharding, x.ndim)
            for shape, sharding in lying
        ), x.sharding


class Transformer(nnx.Module):
    """One block between an embedding and a head; its parameters name the axes of the mesh."""

    def __init__(self, rngs, sharded):
        def init(*axes, draw=LECUN):
            return nnx.with_partitioning(draw, axes) if sharded else draw

        # No other biases: where a parameter names no axes, the compiler moves it.
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        ones, zeros = nnx.initializers.ones, nnx.initializers.zeros
        self.embed = nnx.Embed(VOCABULARY, 8, embedding_init=init("fsdp", "model"), rngs=rngs)
        self.norm = nnx.LayerNorm(
            8, scale_init=init("model", draw=ones), bias_init=init("model", draw=zeros), rngs=rngs
        )
        self.attn = nnx.MultiHeadAttention(
            2,
            8,
            decode=False,
            use_bias=False,
            kernel_init=init("fsdp", "model", None),
            out_kernel_init=init("model", None, "data"),
            rngs=rngs,
        )
        self.up = linear(8, 16, kernel_init=init(("data", "fsdp"), "model"))
        self.down = linear(16, 8, kernel_init=init("model", "fsdp"))
        self.lm_head = linear(8, VOCABULARY, kernel_init=init("fsdp", "model"))

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attn(self.norm(x))
        return self.lm_head(x + self.down(nnx.gelu(self.up(x))))


create = nnx.jit(Transformer, static_argnums=1)


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def train_nnx(name, sharded):
    """Return parameters at the start and at the end, and the optimizer."""
    model = create(nnx.Rngs(0), sharded)
    known = optlab.shardings_of(nnx.state(model, nnx.Param)) if sharded else None
    tx = RECIPES[name](shardings=known)
    optimizer = nnx.jit(lambda model: nnx.Optimizer(model, tx, wrt=nnx.Param))(model)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: entropy(m(TOKENS)))(model))

    start = jax.device_get(params_of(model))
    for _ in range(STEPS):
        step(model, optimizer)
        jax.block_until_ready(params_of(model))
    return start, params_of(model), optimizer


@each_recipe
def test_an_nnx_optimizer_on_a_mesh_is_that_of_one_device(name):
    start, want, _ = train_nnx(name, False)
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        same, got, optimizer = train_nnx(name, True)
    assert off(same, start) < 1e-6
    assert off(got, want, start) < 1e-5
    check_lies_with(got, nnx.to_pure_dict(nnx.state(optimizer)))


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        def init(*axes):
            return nn.with_partitioning(nn.initializers.lecun_normal(), axes)

        x = nn.Embed(VOCABULARY, 8, embedding_init=init("fsdp", "model"))(tokens)
        x = x + nn.MultiHeadDotProductAttention(
            2,
            use_bias=False,
            kernel_init=init("fsdp", "model", None),
            out_kernel_init=init("model", None, "data"),
        )(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(16, kernel_init=init(("data", "fsdp"), "model"))(x))
        x = x + nn.Dense(8, kernel_init=init("model", "fsdp"))(hidden)
        return nn.Dense(VOCABULARY, use_bias=False, name="lm_head")(x)


MODEL = LinenTransformer()


@functools.cache
def linen_params(mesh):
    """Return boxed parameters on the mesh, and their shardings; without a mesh, plain ones."""
    draw = lambda key: MODEL.init(key, TOKENS)["params"]  # noqa: E731
    if mesh is None:
        return jax.jit(lambda key: nn.unbox(draw(key)))(jax.random.key(0)), None
    known = nn.get_sharding(jax.eval_shape(draw, jax.random.key(0)), mesh)
    return jax.jit(draw, out_shardings=known)(jax.random.key(0)), known


def train_linen(name, mesh):
    """Return parameters at the start and at the end, and the optimizer's state."""
    params, known = linen_params(mesh)
    tx = RECIPES[name](shardings=known)
    state = TrainState.create(apply_fn=MODEL.apply, params=params, tx=tx)
    where = None
    if mesh:
        where = nn.get_sharding(state, mesh).replace(step=NamedSharding(mesh, PartitionSpec()))
    state = jax.device_put(state, where)

    @functools.partial(jax.jit, out_shardings=where)
    def step(state):
        grads = jax.grad(lambda p: entropy(state.apply_fn({"params": p}, TOKENS)))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(STEPS):
        state = jax.block_until_ready(step(state))
    return jax.device_get(nn.unbox(params)), nn.unbox(state.params), nn.unbox(state.opt_state)


@each_recipe
def test_a_linen_train_state_on_a_mesh_is_that_of_one_device(name):
    start, want, _ = train_linen(name, None)
    # Not inside jax.set_mesh: there Flax's DenseGeneral constrains a flat kernel as one of rank 3.
    same, got, state = train_linen(name, mesh_of(AxisType.Auto))
    assert off(same, start) < 1e-6
    assert off(got, want, start) < 1e-5
    check_lies_with(got, state)
