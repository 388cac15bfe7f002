"""A byte-level GPT in Flax NNX, small enough to read in one sitting."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from optlab.lab.config import Config

BYTES = 256


class Block(nnx.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, use_bias=False, decode=False, rngs=rngs
        )
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, time, width) to the same shape; time never looks ahead."""
        causal = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.attention_norm(x), mask=causal)
        # The squared ReLU needs no transcendental, which a CPU step would feel.
        return x + self.down(jnp.square(jax.nn.relu(self.up(self.mlp_norm(x)))))


class GPT(nnx.Module):
    """Next-byte predictor: (batch, time) bytes to (batch, time, 256) logits."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.token = nnx.Embed(BYTES, config.width, rngs=rngs)
        self.position = nnx.Embed(config.context, config.width, rngs=rngs)
        self.blocks = nnx.List(
            [Block(config.width, config.heads, rngs=rngs) for _ in range(config.layers)]
        )
        self.norm = nnx.RMSNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, BYTES, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits of the byte that follows each position."""
        x = self.token(tokens) + self.position(jnp.arange(tokens.shape[1])[None])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def abstract(config: Config) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the model's structure and its parameters as shapes, without computing anything."""
    model = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)))
    structure, params = nnx.split(model, nnx.Param)
    return structure, params


def initial_params(config: Config) -> nnx.State:
    """Return the weights every optimizer starts from."""

    def create(key: jax.Array) -> nnx.State:
        return nnx.state(GPT(config, rngs=nnx.Rngs(key)), nnx.Param)

    return jax.jit(create)(jax.random.key(config.seed))


def logits(structure: nnx.GraphDef, params: nnx.State, windows: jax.Array) -> jax.Array:
    """Return the logits of every byte but the first of windows (batch, context + 1)."""
    return nnx.merge(structure, params)(windows[:, :-1].astype(jnp.int32))


def loss(structure: nnx.GraphDef, params: nnx.State, windows: jax.Array) -> jax.Array:
    """Return the mean cross-entropy, in nats per byte, of windows (batch, context + 1)."""
    labels = windows[:, 1:].astype(jnp.int32)
    found = logits(structure, params, windows)
    return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()
