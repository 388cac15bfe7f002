"""Watch gradient descent reach the edge of stability: python -m benchmarks.edge_of_stability

A small tanh network learns 500 of scikit-learn's digits with a squared loss, by full-batch gradient
descent, once per learning rate. The sharpness rises until it meets 2 / learning rate, and then
hovers there while the loss goes on falling, no longer at every step. Writes
benchmarks/results/edge_of_stability.json and .png in 20 seconds of one core.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from optlab.diagnostics import picture, sharpness, stability_limit
from optlab.lab import report

RESULTS = Path(__file__).parent / "results" / "edge_of_stability.json"
RATES = (0.4, 0.3, 0.23)
STEPS, EVERY = 4000, 20
IMAGES, WIDTH, SEED = 500, 48, 0


class Network(nn.Module):
    """Two hidden layers: smooth, so that the Hessian is what the loss looks like."""

    @nn.compact
    def __call__(self, x):
        """Return one number per digit."""
        for _ in range(2):
            x = jnp.tanh(nn.Dense(WIDTH)(x))
        return nn.Dense(10)(x)


def images() -> tuple[jax.Array, jax.Array]:
    """Return centred images, (IMAGES, 64), and their digits as one-hot rows."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    chosen = np.random.default_rng(SEED).permutation(len(digits.data))[:IMAGES]
    x = np.asarray(digits.data[chosen], np.float32) / 16
    return jnp.asarray(x - x.mean(0)), jax.nn.one_hot(digits.target[chosen], 10)


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    out: Any = Network().apply(params, x)
    return jnp.mean(jnp.sum((out - y) ** 2, -1)) / 2


@jax.jit
def descend(params: Any, rate: jax.Array, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
    """Take EVERY steps; return the loss before each."""

    def step(params, _):
        value, gradient = jax.value_and_grad(loss)(params, x, y)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient), value

    return jax.lax.scan(step, params, None, length=EVERY)


def train(rate: float, params: Any, x: jax.Array, y: jax.Array) -> dict[str, Any]:
    """Train and measure; one history."""
    found: dict[str, Any] = {"step": [], "loss": [], "sharpness": []}
    losses = []
    for step in range(0, STEPS + 1, EVERY):
        found["step"].append(step)
        found["loss"].append(round(float(loss(params, x, y)), 6))
        found["sharpness"].append(round(float(sharpness(loss, params, x, y)), 4))
        params, values = descend(params, rate, x, y)
        losses.append(np.asarray(values))
    rises = np.diff(np.concatenate(losses)) > 0
    found["limit"] = float(stability_limit(rate))
    found["share_of_rising_steps"] = float(rises.mean())
    return found


def summary(history: dict[str, Any]) -> dict[str, float]:
    """Return how the second half of a run relates to its limit."""
    ratio = np.asarray(history["sharpness"]) / history["limit"]
    late = ratio[len(ratio) // 2 :]
    return {
        "start": float(ratio[0]),
        "late_mean": float(late.mean()),
        "late_least": float(late.min()),
        "late_most": float(late.max()),
    }


def main() -> None:
    x, y = images()
    params = Network().init(jax.random.key(SEED), x)
    runs = {f"rate {rate:g}": train(rate, params, x, y) for rate in RATES}
    ratios = {name: summary(history) for name, history in runs.items()}
    for name, ratio in ratios.items():
        text = ", ".join(f"{key} {value:.3f}" for key, value in ratio.items())
        print(f"{name}: sharpness over 2 / rate: {text}")
    about = {"images": IMAGES, "width": WIDTH, "steps": STEPS, "seed": SEED}
    found = {"about": about, "versions": report.versions(), "device": report.device()}
    found |= {"sharpness_over_limit": ratios, "runs": runs}
    report.write_whole(RESULTS, json.dumps(found, allow_nan=False) + "\n")
    picture.draw_sharpness(runs, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
