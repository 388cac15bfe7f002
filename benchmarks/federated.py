"""Federated methods with momentum beside their plain forms: python -m benchmarks.federated.

Handwritten digits (scikit-learn's), ten clients of two classes or so each, a Flax network of one
hidden layer. FedAvg-M and SCAFFOLD-M at three weights beta against beta = 1, FedAvg and SCAFFOLD:
the same rounds, local steps, batches and grid of rates; every form takes its best rate on three
seeds apart, and is measured on five others. Writes benchmarks/results/federated.{json,md,png}.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optlab
from benchmarks import table

RESULTS = Path(__file__).parent / "results"
CLIENTS, ROUNDS, STEPS, BATCH, HIDDEN = 10, 60, 10, 20, 32
RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2)
BETAS = (1.0, 0.4, 0.2, 0.1)
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (100, 101, 102)
METHODS: dict[str, Callable[..., Any]] = {
    "FedAvg": optlab.fedavg_m,
    "SCAFFOLD": optlab.scaffold_m,
}
GRAPH = nnx.graphdef(
    nnx.eval_shape(
        lambda: nnx.Sequential(
            nnx.Linear(64, HIDDEN, rngs=nnx.Rngs(0)),
            jax.nn.relu,
            nnx.Linear(HIDDEN, 10, rngs=nnx.Rngs(0)),
        )
    )
)


class Split(NamedTuple):
    """Digits of one seed: of every client, and held out."""

    inputs: Any  # arrays: (clients, images, 64)
    labels: Any
    test_inputs: Any
    test_labels: Any


def split(seed: int) -> Split:
    """Hold a fifth out, sort the others by label, and give every client two of twenty pieces."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(seed)
    inputs, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    inputs, labels = inputs[order].astype("float32") / 16, labels[order].astype("int32")
    held = len(labels) // 5
    train = held + np.argsort(labels[held:], kind="stable")
    size = len(train) // (2 * CLIENTS)
    pieces = train[: 2 * CLIENTS * size].reshape(2 * CLIENTS, size)
    owned = pieces[rng.permutation(2 * CLIENTS)].reshape(CLIENTS, 2 * size)
    return Split(inputs[owned], labels[owned], inputs[:held], labels[:held])


def initial(seed: int) -> Any:
    """Return the network's parameters."""
    rngs = nnx.Rngs(seed)
    model = nnx.Sequential(
        nnx.Linear(64, HIDDEN, rngs=rngs), jax.nn.relu, nnx.Linear(HIDDEN, 10, rngs=rngs)
    )
    return nnx.state(model, nnx.Param)


def logits_of(params: Any, inputs: jax.Array) -> jax.Array:
    """Return the network's output."""
    return nnx.merge(GRAPH, params)(inputs)


def cross_entropy(params: Any, batch: Any) -> jax.Array:
    """Return the mean loss of a batch."""
    inputs, labels = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_of(params, inputs), labels)
    return losses.mean()


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.vmap, in_axes=(None, None, None, 0, 0, 0, 0))
def curves(
    method: str,
    present: int,
    beta: jax.Array,
    rate: jax.Array,
    key: jax.Array,
    start: Any,
    data: Split,
) -> tuple[jax.Array, jax.Array]:
    """Return held-out loss and accuracy after every round, of a run per rate, key and split."""
    # The server takes the mean of the clients' parameters where beta = 1.
    rule = METHODS[method](cross_entropy, rate, optax.sgd(rate * STEPS), beta=beta)

    def step(carry, key):
        drawn, chosen = jax.random.split(key)
        images = jax.random.randint(drawn, (CLIENTS, STEPS, BATCH), 0, data.inputs.shape[1])
        pick = jax.vmap(lambda x, i: x[i])
        batches = (pick(data.inputs, images), pick(data.labels, images))
        here = jax.random.permutation(chosen, CLIENTS) < present
        params, state = rule.round(*carry, batches, participants=here)
        test = (data.test_inputs, data.test_labels)
        right = logits_of(params, test[0]).argmax(axis=-1) == test[1]
        return (params, state), (cross_entropy(params, test), right.mean())

    _, seen = jax.lax.scan(step, (start, rule.init(start, CLIENTS)), jax.random.split(key, ROUNDS))
    return seen


def measured(
    method: str, present: int, beta: float, rates: tuple[float, ...], seeds: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return losses and accuracies, (rates, seeds, rounds)."""
    pairs = list(itertools.product(rates, seeds))
    stack = lambda trees: jax.tree.map(lambda *x: np.stack(x), *trees)  # noqa: E731
    found = curves(
        method,
        present,
        beta,
        np.asarray([rate for rate, _ in pairs], "float32"),
        jnp.stack([jax.random.key(seed) for _, seed in pairs]),
        stack([initial(seed) for _, seed in pairs]),
        stack([split(seed) for _, seed in pairs]),
    )
    losses, accuracies = (np.asarray(x).reshape(len(rates), len(seeds), -1) for x in found)
    return losses, accuracies


def compared(method: str, present: int) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield a row and the losses (seeds, rounds) of the plain form and of those with momentum."""
    plain = None
    for beta in BETAS:
        tuned, _ = measured(method, present, beta, RATES, TUNING_SEEDS)
        ends = np.nan_to_num(tuned[..., -1], nan=np.inf).mean(axis=1)
        rate = RATES[int(ends.argmin())]
        (losses,), (accuracies,) = measured(method, present, beta, (rate,), SEEDS)
        last, right = losses[:, -1], accuracies[:, -1]
        plain = last if plain is None else plain
        yield (
            {
                "method": method + ("" if beta == 1 else "-M"),
                "clients a round": f"{present} of {CLIENTS}",
                "beta": beta,
                "rate": rate,
                "loss": round(float(last.mean()), 4),
                "std": round(float(last.std(ddof=1)), 4),
                "accuracy": round(float(right.mean()), 4),
                "better than plain": None
                if beta == 1
                else f"{(last < plain).sum()} of {len(SEEDS)}",
                "least gain": None if beta == 1 else round(float((plain - last).min()), 4),
            },
            losses,
        )


def _panel(row: dict[str, Any]) -> str:
    return f"{row['method'].removesuffix('-M')}, {row['clients a round']} clients a round"


def draw(found: list[tuple[dict[str, Any], np.ndarray]]) -> None:
    """Draw the held-out losses by round, mean and range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys(_panel(row) for row, _ in found))
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5), sharex=True, sharey=True)
    shades = dict(zip(BETAS, ("black", *plt.cm.viridis([0.8, 0.5, 0.15])), strict=True))
    for row, losses in found:
        axis, beta = axes.flat[panels.index(_panel(row))], row["beta"]
        rounds, low, high = np.arange(1, ROUNDS + 1), losses.min(axis=0), losses.max(axis=0)
        label = f"{'plain' if beta == 1 else f'beta = {beta}'}, rate {row['rate']}"
        style = "--" if beta == 1 else "-"
        axis.plot(rounds, losses.mean(axis=0), style, color=shades[beta], label=label)
        axis.fill_between(rounds, low, high, color=shades[beta], alpha=0.12, lw=0)
        axis.set(title=_panel(row), yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.supxlabel("round")
    figure.supylabel("held-out loss (mean and range of five seeds)")
    figure.tight_layout()
    figure.savefig(RESULTS / "federated.png", dpi=110)


def main() -> None:
    """Run everything and write the table and the picture."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    begin = time.perf_counter()
    found = [pair for p in (CLIENTS, 3) for m in METHODS for pair in compared(m, p)]
    rows = [row for row, _ in found]
    print(table.text(rows))
    notes = (
        f"Held-out cross-entropy after {ROUNDS} rounds of {STEPS} local steps on {BATCH} images: "
        f"mean and standard deviation over seeds {SEEDS}, which set split, network, batches and "
        f"participants. Rates from {RATES} by seeds {TUNING_SEEDS}; server: optax.sgd(rate * "
        f"{STEPS}). `least gain`: the smallest difference of losses to the plain form over the "
        "seeds, each its own."
    )
    facts = table.about(jax.devices()[0].device_kind)
    table.write(RESULTS / "federated", "Federated learning of digits", facts, rows, notes)
    draw(found)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
