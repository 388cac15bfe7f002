"""Parameter trees of real models, each as its library builds it.

Shapes come from the library (`eval_shape` of its own initialisation), values from NumPy: no forward
pass runs and nothing is compiled. d = 8, two heads of 4, vocabulary 16, feed-forward 12.
"""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def filled(tree):
    """Give every abstract leaf of a tree normal values, the same in every run."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, use_bias=False, rngs=rngs)


class Transformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.final = nnx.RMSNorm(8, rngs=rngs)
        self.lm_head = nnx.Linear(8, 16, use_bias=False, rngs=rngs)


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(4, rngs=rngs)
        self.depthwise_conv = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
        self.grouped_conv = nnx.Conv(4, 6, (5,), feature_group_count=2, rngs=rngs)
        self.conv_up = nnx.ConvTranspose(6, 4, (2, 2), use_bias=False, rngs=rngs)
        self.head = nnx.Linear(4, 10, rngs=rngs)


class Adapted(nnx.Module):
    def __init__(self, rngs):
        self.standalone = nnx.LoRA(8, 2, 12, rngs=rngs)
        self.linear = nnx.LoRALinear(8, 12, lora_rank=2, rngs=rngs)


def nnx_module(cls):
    """Build an NNX module of class `cls` with filled parameters."""
    graph, state = nnx.split(nnx.eval_shape(lambda: cls(nnx.Rngs(0))))
    params, rest = nnx.split_state(state, nnx.Param, ...)
    rest = jax.tree.map(_zeros, rest)
    return nnx.merge(graph, filled(params), rest)


def _zeros(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.zeros(x.shape, x.dtype)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(12)(x))), None


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x, _ = LinenBlock()(nn.Embed(16, 8)(tokens))
        x = x + nn.MultiHeadDotProductAttention(2, name="SelfAttention_0")(x)
        x = x + nn.DenseGeneral((3, 2, 4), name="qkv")(x).sum(axis=2).reshape(x.shape)
        return nn.Dense(16, name="logits")(x)


class LinenScan(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        stack = nn.scan(LinenBlock, {"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(name="layers")(nn.Embed(16, 8)(tokens), None)
        return nn.Dense(16, name="lm_head")(x)


class LinenBoxed(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(12, kernel_init=init)(nn.Embed(16, 8)(tokens))


def linen_params(module):
    """Parameters of a Linen module, as its `init` returns them."""
    tokens = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    return filled(jax.eval_shape(module.init, jax.random.key(0), tokens)["params"])


class EquinoxModel(eqx.Module):
    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    conv: eqx.nn.Conv2d
    depthwise_conv: eqx.nn.Conv2d
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.embedding = eqx.nn.Embedding(16, 8, key=key)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=key)
        self.norm = eqx.nn.LayerNorm((2, 8))
        self.conv = eqx.nn.Conv2d(3, 4, 3, key=key)
        self.depthwise_conv = eqx.nn.Conv2d(4, 4, 3, groups=4, use_bias=False, key=key)
        self.mlp = eqx.nn.MLP(8, 3, 12, 1, key=key)


def equinox_params():
    """Arrays of an Equinox model; None for the rest, as `eqx.filter` leaves it."""
    return filled(eqx.filter(eqx.filter_eval_shape(EquinoxModel, jax.random.key(0)), _is_shape))


def _is_shape(x):
    return isinstance(x, jax.ShapeDtypeStruct)


def plain_params():
    """Nested dicts, lists and tuples under names that mean nothing."""
    shapes = {"a": [(8, 4), (4,)], "b": {"w": (4, 3), "gain": ()}, "c": ((6, 5), (5,))}
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)  # noqa: E731
    return filled(jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "f4"), shapes, is_leaf=is_shape))


_BUILDERS = {
    "nnx_transformer": lambda: nnx.state(nnx_module(Transformer), nnx.Param),
    "nnx_conv": lambda: nnx.state(nnx_module(ConvNet), nnx.Param),
    "nnx_lora": lambda: nnx.state(nnx_module(Adapted), nnx.Param),
    "linen_transformer": lambda: linen_params(LinenTransformer()),
    "linen_scan": lambda: linen_params(LinenScan()),
    "linen_boxed": lambda: linen_params(LinenBoxed()),
    "equinox": equinox_params,
    "plain": plain_params,
}
NAMES = tuple(_BUILDERS)


@functools.cache
def params(name):
    """Return the parameter tree called `name` (one of NAMES), built once."""
    return _BUILDERS[name]()
