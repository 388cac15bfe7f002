"""What an installed optlab does with its required dependencies alone: `python .ci/smoke.py`."""

import importlib.metadata
import pathlib
import sys

import jax
import jax.numpy as jnp
import optax

import optlab

home = pathlib.Path(optlab.__file__).parent
assert home.is_relative_to(sys.prefix), f"optlab was imported from {home}, not from {sys.prefix}"
assert importlib.metadata.version("optlab") == optlab.__version__
assert (home / "py.typed").exists()

inputs = jax.random.normal(jax.random.key(0), (32, 16))
params = {"dense": {"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros(8)}}
tx = optlab.muon(0.02)
state = tx.init(params)


def loss(params):
    """Return how far the outputs are from the first inputs."""
    outputs = inputs @ params["dense"]["kernel"] + params["dense"]["bias"]
    return jnp.mean((outputs - inputs[:, :8]) ** 2)


@jax.jit
def step(params, state):
    """Take a step of the training."""
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


losses = []
for _ in range(20):
    params, state, value = step(params, state)
    losses.append(float(value))
assert losses[-1] < 0.7 * losses[0], losses
print(
    f"optlab {optlab.__version__}, jax {jax.__version__}, Python {sys.version.split()[0]}:", end=" "
)
print(f"20 steps of muon, loss {losses[0]:.3f} to {losses[-1]:.3f}")
