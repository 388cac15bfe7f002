"""Do rates carry over from narrow to wide? python -m benchmarks.mup_transfer [--smoke]

Two questions about the race's model under Adam, each with muP's multipliers and without, which is
Flax's standard parametrization:

1. Coordinate check: do activations move as much at width 1024 as at width 64, after four steps?
2. Where is the best learning rate at each width? Rates are powers of two; the sweep walks downhill
   until the best rate has a worse one on both sides, and a parabola through the three says where
   between them the minimum is. Losses are means over two seeds.

Heads grow in number, of 32 each, so that attention's own scale stays right. The readout starts at
zero in both, as the paper advises: a random one is most of the logits' movement in narrow models
and fades with the width. Losses go to
benchmarks/results/mup_transfer.json; what is there already is kept, so the sweep can be stopped and
gone on with. mup_coordinates.png and mup_rates.png are its pictures. --smoke runs all of it on
next to nothing and writes to a temporary folder.
"""

import dataclasses
import functools
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import optlab
from benchmarks.lr_sweep import downhill
from optlab.diagnostics import page
from optlab.diagnostics.coordinate_check import (
    CoordinateProblem,
    Coordinates,
    coordinate_check,
    draw_coordinates,
)
from optlab.lab import data, model, optimizers, report, train
from optlab.lab.config import Config
from optlab.lab.race import new_config
from optlab.schedules.mup import MupMultipliers

RESULTS = Path(__file__).parent / "results"
KINDS = ("muP", "standard")
HEAD = 32


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run: sizes and lengths."""

    widths: tuple[int, ...] = (64, 128, 256, 512)
    check_widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    check_steps: int = 4
    check_exponent: int = -8
    first_guess: int = -7
    seeds: tuple[int, ...] = (0, 1)
    sizes: tuple[tuple[str, Any], ...] = (
        ("layers", 2), ("context", 32), ("batch_size", 8), ("eval_windows", 256),
        ("steps", 200), ("schedule", "warmup_linear_decay"), ("optimizers", ("adamw",)),
    )  # fmt: skip

    @property
    def base(self) -> int:
        """The width at which all multipliers are 1."""
        return self.widths[0]


SMOKE = Plan(
    widths=(32, 64),
    check_widths=(32, 64),
    check_steps=2,
    seeds=(0,),
    sizes=(*Plan.sizes[:1], ("context", 8), ("batch_size", 2), ("eval_windows", 2), ("steps", 4),
           *Plan.sizes[5:]),
)  # fmt: skip


def config_of(plan: Plan, width: int, text: bytes, seed: int = 0) -> Config:
    own = {"width": width, "heads": width // HEAD, "seed": seed}
    return new_config(dict(plan.sizes) | own, text)


def multipliers(plan: Plan, kind: str, width: int, text: bytes) -> MupMultipliers:
    """Return the factors of one width; those of the standard parametrization are all 1.

    With the readout's own rate in the place of a factor in the model, the race's model is used as
    it is.
    """
    shapes = lambda width: model.abstract(config_of(plan, width, text))[1]  # noqa: E731
    base = plan.base if kind == "muP" else width
    return optlab.mup_multipliers(shapes(width), shapes(base), shapes(2 * base), readout="rate")


def first_weights(params: Any, mup: MupMultipliers) -> Any:
    """Return Flax's weights with muP's sizes, and zeros for the readout."""
    zeros = optlab.layerwise_rates(params, {"^head/": 0.0})
    return jax.tree.map(lambda p, m, z: p * m * z, params, mup.init, zeros)


def activations(structure: Any, params: Any, windows: jax.Array) -> dict[str, jax.Array]:
    """Return the residual stream after every part of the model, and the logits."""
    net, tokens = nnx.merge(structure, params), windows[:, :-1].astype(jnp.int32)
    x = net.token(tokens) + net.position(jnp.arange(tokens.shape[1])[None])
    found = {"embedding": x}
    for i, block in enumerate(net.blocks):
        x = found[f"block {i}"] = block(x)
    return found | {"logits": net.head(net.norm(x))}


def check(plan: Plan, kind: str, text: bytes) -> Coordinates:
    """Train every width for a few steps and measure its activations."""

    def make(width: int) -> CoordinateProblem:
        config = config_of(plan, width, text)
        corpus, mup = data.make_corpus(text, config), multipliers(plan, kind, width, text)
        structure, _ = model.abstract(config)
        batch = lambda step: data.batch(corpus.train, 0, step, config)  # noqa: E731

        def init(key: jax.Array) -> Any:
            fresh = nnx.state(model.GPT(config, rngs=nnx.Rngs(key)), nnx.Param)
            return first_weights(fresh, mup)

        return CoordinateProblem(
            init,
            optax.chain(optax.adam(2.0**plan.check_exponent), optlab.scale_by_rates(mup.rates)),
            lambda params, step: model.loss(structure, params, batch(step)),
            lambda params: activations(structure, params, batch(jnp.int32(10**6))),
        )

    return coordinate_check(make, plan.check_widths, steps=plan.check_steps, progress=True)


def make_trial(
    plan: Plan, kind: str, width: int, text: bytes, seed: int
) -> Callable[[int], float | None]:
    """Return exponent -> held-out loss at the rate 2^exponent, None where it diverged."""
    config = config_of(plan, width, text, seed)
    problem, mup = train.make_problem(config, text), multipliers(plan, kind, width, text)
    unit = optimizers.SCHEDULES[config.schedule](1.0, config.warmup_steps, config.steps)

    @jax.jit
    def run(params: Any, corpus: jax.Array, peak: jax.Array) -> tuple[Any, jax.Array]:
        adam = optax.adam(lambda step: peak * unit(step))
        tx = optax.chain(adam, optlab.scale_by_rates(mup.rates))
        chunk = train.make_chunk(
            problem.structure, optax.with_extra_args_support(tx), config, config.steps
        )
        params = first_weights(params, mup)
        params, _, losses = chunk(params, tx.init(params), corpus, np.int32(0))
        return params, losses

    def trial(exponent: int) -> float | None:
        params, losses = run(problem.params, problem.corpus.train, np.float32(2.0**exponent))
        loss = problem.evaluate(params)
        return loss if np.isfinite([*losses, loss]).all() else None

    return trial


def sweep(
    plan: Plan, kind: str, width: int, text: bytes, known: dict[str, float | None],
    save: Callable[[], None],
) -> None:  # fmt: skip
    """Fill `known`, exponent to loss, with what it takes to find the best rate of one width."""
    trial = functools.cache(lambda seed: make_trial(plan, kind, width, text, seed))

    def loss(exponent: int) -> float:
        key = str(exponent)
        if key not in known:
            begin = time.perf_counter()
            found = [trial(seed)(exponent) for seed in plan.seeds]
            finite = [loss for loss in found if loss is not None]
            known[key] = sum(finite) / len(found) if len(finite) == len(found) else None
            seconds = time.perf_counter() - begin
            print(f"{kind}, width {width}, 2^{key}: {known[key]} ({seconds:.0f} s)", flush=True)
            save()
        mean = known[key]
        return math.inf if mean is None else mean

    downhill(plan.first_guess, loss)


def best_exponent(known: Mapping[str, float | None]) -> float:
    """Return where the parabola through the best rate and its neighbours is lowest."""
    losses = {int(key): math.inf if x is None else x for key, x in known.items()}
    best = min(losses, key=losses.__getitem__)
    left, mid, right = (losses.get(best + i, math.inf) for i in (-1, 0, 1))
    if not math.isfinite(left + mid + right) or left + right == 2 * mid:
        return float(best)
    return best + (left - right) / (2 * (left + right - 2 * mid))


def moves(losses: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the factor by which the best rate moves from the first width to the last, by kind."""
    ends = {kind: [best_exponent(known) for known in of.values()] for kind, of in losses.items()}
    return {kind: 2.0 ** abs(bests[-1] - bests[0]) for kind, bests in ends.items()}


def draw_rates(losses: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the loss over the learning rate, a line per width and a panel per kind."""
    says = (
        "Held-out loss over Adam's peak rate, nats a byte. Beside each width its best rate, ringed."
    )
    ends = [x for of in losses.values() for k in of.values() for x in k.values() if x is not None]
    with page.page(path, "Best learning rate and width", says, (1,) * len(losses)) as axes:
        for ax, (kind, of) in zip(np.atleast_1d(axes), losses.items(), strict=True):
            labels = []
            for (width, known), colour in zip(of.items(), itertools.cycle(page.COLOURS)):
                line = sorted((int(k), x) for k, x in known.items() if x is not None)
                exponents, values = zip(*line, strict=True)
                ax.plot(exponents, values, "o-", color=colour, linewidth=2, markersize=4)
                best = best_exponent(known)
                ax.plot(best, min(values), "o", markersize=12, markerfacecolor="none",
                        markeredgecolor=colour, markeredgewidth=2)  # fmt: skip
                labels.append((f"{width}  2^{best:.1f}", values[-1], colour))
            least, most = _span(losses)
            ax.set_xlim(least - 0.3, most + 0.3)
            ax.set_xticks(range(least, most + 1))
            low, high = min(ends), min(max(ends), min(ends) + 1)
            ax.set_ylim(low - 0.08 * (high - low), high)
            last = kind == list(losses)[-1]
            page.name_axes(ax, "log2 of the learning rate" if last else None, kind)
            page.beside(ax, labels)


def _span(losses: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    found = [int(k) for of in losses.values() for known in of.values() for k in known]
    return min(found), max(found)


def _as_json(found: Coordinates) -> dict[str, Any]:
    number = lambda x: float(x) if np.isfinite(x) else None  # noqa: E731
    lists, slopes = {}, {}
    for of in ("size", "change"):
        values = getattr(found, of)
        lists[of] = {k: [[number(n) for n in row] for row in x] for k, x in values.items()}
        slopes[f"slopes_of_{of}"] = {k: number(x) for k, x in found.slopes(of).items()}
    return {"widths": list(found.widths), **lists, **slopes}


def _from_json(known: Mapping[str, Any]) -> Coordinates:
    size, change = (
        {k: np.array(x, float) for k, x in known[of].items()} for of in ("size", "change")
    )
    return Coordinates(tuple(known["widths"]), size, change)


def main(plan: Plan, folder: Path) -> dict[str, Any]:
    path, text = folder / "mup_transfer.json", data.read_text(None)
    about = json.loads(json.dumps(dataclasses.asdict(plan) | {"sizes": dict(plan.sizes)}))
    found: dict[str, Any] = {
        "plan": about, "versions": report.versions(), "device": report.device(),
    }  # fmt: skip
    before = json.loads(path.read_text()) if path.exists() else {}
    same = all(before.get(key) == found[key] for key in found)
    found |= {"coordinates": {}, "losses": {}} | (before if same else {})

    def save() -> None:
        found["moves"] = moves(found["losses"]) if found["losses"] else {}
        report.write_whole(path, json.dumps(found, indent=1, allow_nan=False) + "\n")

    for kind in KINDS:
        if kind not in found["coordinates"]:
            found["coordinates"][kind] = _as_json(check(plan, kind, text))
            save()
    draw_coordinates(
        {kind: _from_json(found["coordinates"][kind]) for kind in KINDS},
        folder / "mup_coordinates.png",
    )
    for kind, width in itertools.product(KINDS, plan.widths):
        known = found["losses"].setdefault(kind, {}).setdefault(str(width), {})
        sweep(plan, kind, width, text, known, save)
    save()
    draw_rates(found["losses"], folder / "mup_rates.png")
    for kind in KINDS:
        slopes = found["coordinates"][kind]["slopes_of_change"]
        print(f"{kind}: powers of the width {slopes}, best rate moves {found['moves'][kind]:.2f}x")
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["--smoke"]:
        with tempfile.TemporaryDirectory() as folder:
            main(SMOKE, Path(folder))
    else:
        main(Plan(), RESULTS)
