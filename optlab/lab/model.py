"""The networks of the workloads in Flax NNX, small enough to read in one sitting.

Each says by `split` how it reads a batch: what goes in, and the classes that should come out.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from optlab.lab.config import Config

BYTES = 256
DIGITS, SIDE, GREYS = 10, 8, 17  # classes; pixels of an image's side; values of a pixel


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

    @staticmethod
    def split(windows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return every byte but the last, and every byte but the first."""
        return windows[:, :-1].astype(jnp.int32), windows[:, 1:].astype(jnp.int32)


class Conv(nnx.Module):
    """A 3 x 3 convolution as one product of matrices.

    XLA's own is 18 times slower on a CPU inside a loop: 80 ms a step of this net, against 4.5.
    """

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        start = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(start(rngs.params(), (3, 3, inputs, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, height, width, inputs) to (batch, height, width, outputs)."""
        _, height, width, _ = x.shape
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        kernel = self.kernel[...]
        return jnp.concatenate(shifted, -1) @ kernel.reshape(-1, kernel.shape[-1])


class ConvNet(nnx.Module):
    """Classifier of digits: (batch, 8, 8) greys to (batch, 10) logits."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width, layers = config.width, range(config.layers)
        self.first_conv = Conv(1, width, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in layers])
        self.convs = nnx.List([Conv(width, width, rngs=rngs) for _ in layers])
        self.head = nnx.Linear(width, DIGITS, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits of the digits."""
        x = jax.nn.relu(self.first_conv(images[..., None] / (GREYS - 1)))
        x = nnx.avg_pool(x, (2, 2), (2, 2))
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + jax.nn.relu(conv(norm(x)))
        return self.head(x.mean((1, 2)))

    @staticmethod
    def split(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the images and what digits they are."""
        return _images(rows), rows[:, -1].astype(jnp.int32)


class GRU(nnx.Module):
    """Gated recurrent unit: (batch, time, inputs) to (batch, time, width)."""

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        self.inputs = nnx.Linear(inputs, 3 * width, rngs=rngs)
        start = nnx.initializers.orthogonal()
        self.state = nnx.Linear(width, 3 * width, use_bias=False, kernel_init=start, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the state after every input."""
        kernel = self.state.kernel[...]

        def step(state: jax.Array, given: jax.Array) -> tuple[jax.Array, jax.Array]:
            reset, keep, new = jnp.split(given, 3, -1)
            of_reset, of_keep, of_new = jnp.split(state @ kernel, 3, -1)
            keep = jax.nn.sigmoid(keep + of_keep)
            new = jnp.tanh(new + jax.nn.sigmoid(reset + of_reset) * of_new)
            state = keep * state + (1 - keep) * new
            return state, state

        start = jnp.zeros((len(x), kernel.shape[0]), x.dtype)
        given = self.inputs(x).swapaxes(0, 1)
        return jax.lax.scan(step, start, given, unroll=len(given))[1].swapaxes(0, 1)


class Draw(nnx.Module):
    """Draws digits: (batch, 8, 8) greys to (batch, 8, 8, 17) logits, a row from those above it."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        widths = [SIDE] + [config.width] * config.layers
        pairs = itertools.pairwise(widths)
        self.layers = nnx.List([GRU(a, b, rngs=rngs) for a, b in pairs])
        self.head = nnx.Linear(config.width, SIDE * GREYS, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits of every pixel."""
        x = jnp.pad(images[:, :-1] / (GREYS - 1), ((0, 0), (1, 0), (0, 0)))
        for layer in self.layers:
            x = layer(x)
        return self.head(x).reshape(*images.shape, GREYS)

    @staticmethod
    def split(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the images, twice: each row is given after it was guessed."""
        return _images(rows), _images(rows).astype(jnp.int32)


def _images(rows: jax.Array) -> jax.Array:
    return rows[:, :-1].reshape(-1, SIDE, SIDE).astype(jnp.float32)


NETWORKS = {"gpt": GPT, "digits": ConvNet, "rows": Draw}


def abstract(config: Config) -> tuple[nnx.GraphDef, nnx.State]:
    """Return the model's structure and its parameters as shapes, without computing anything."""
    model = nnx.eval_shape(lambda: NETWORKS[config.workload](config, rngs=nnx.Rngs(0)))
    structure, params = nnx.split(model, nnx.Param)
    return structure, params


def initial_params(config: Config) -> nnx.State:
    """Return the weights every optimizer starts from."""
    return make_initial_params(config)(config.seed)


def make_initial_params(config: Config) -> Callable[[int], nnx.State]:
    """Return seed -> first weights, compiled once for all seeds."""

    @jax.jit
    def create(key: jax.Array) -> nnx.State:
        return nnx.state(NETWORKS[config.workload](config, rngs=nnx.Rngs(key)), nnx.Param)

    return lambda seed: create(jax.random.key(seed))


def logits(structure: nnx.GraphDef, params: nnx.State, batch: jax.Array) -> jax.Array:
    """Return the logits of all that is to be predicted in a batch."""
    network = nnx.merge(structure, params)
    return network(network.split(batch)[0])


def loss(structure: nnx.GraphDef, params: nnx.State, batch: jax.Array) -> jax.Array:
    """Return the mean cross-entropy of a batch, in nats."""
    network = nnx.merge(structure, params)
    inputs, labels = network.split(batch)
    return optax.softmax_cross_entropy_with_integer_labels(network(inputs), labels).mean()
