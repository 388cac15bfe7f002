"""Time orthogonalization beside the standard iteration: python -m benchmarks.orthogonalize.

Every method of `optlab.linalg.polar` on matrices of 512 rows and one, four and eight times as many
columns, one or four of them: FLOPs by the compiler's count, time, and accuracy, the first two as
ratios to five steps of Keller Jordan's quintic in the direct form. Methods take turns in one
process, and a ratio is the median over turns. Then the seconds that a whole optimizer takes to
compile, beside optax's. Writes benchmarks/results/orthogonalize{,_compile}.{json,md}.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab
from benchmarks import hlo, methods, table, trees
from optlab.lab import report
from optlab.linalg import polar

RESULTS = Path(__file__).parent / "results"
SEED, TURNS, COMPILATIONS = 0, 15, 5
# A turn of each method lasts at least so long, or the clock decides.
TURN_SECONDS = 0.05
SIDE, ASPECTS, BATCHES = 512, (1, 4, 8), (1, 4)
# Time by the standard's, over FLOPs by the standard's: what a method may take beyond its promise.
SLACK = 1.15

STANDARD = "keller, direct"
METHODS: dict[str, polar.PolarFn] = {
    STANDARD: polar.keller(form="direct"),
    "keller": polar.keller(),
    "keller, gram, no restart": polar.keller(form="gram", restarts=()),
    "you": polar.you(),
    "polar express, 5": polar.polar_express(5),
    "polar express, 6": polar.polar_express(6),
    "polar express, 8": polar.polar_express(8),
    "turbo": polar.turbo(),
    "cans": polar.cans(),
    "eigh": polar.eigh_polar,
}


def _ill_conditioned(cols: int) -> np.ndarray:
    """Return a matrix of SIDE rows whose singular values go down to 1e-4 of the largest."""
    rng, values = np.random.default_rng(SEED), np.geomspace(1e-4, 1, SIDE)
    u, v = (np.linalg.qr(rng.normal(size=(size, SIDE)))[0] for size in (SIDE, cols))
    return ((u * values) @ v.T).astype(np.float32)


def _exact(method: polar.PolarFn, x: np.ndarray) -> np.ndarray:
    """Return what the method means: its direct form, or the polar factor, in float64."""
    if isinstance(method, polar.NewtonSchulz):
        method = dataclasses.replace(method, form="direct")
    else:
        method = polar.svd_polar
    with jax.enable_x64(True):
        return np.asarray(method(jnp.asarray(x, "float64")))


def _error(found: Any, method: polar.PolarFn, x: np.ndarray) -> float:
    return float(f"{np.abs(np.asarray(found, np.float64) - _exact(method, x)).max():.1e}")


class Runner:
    """A compiled method and its result."""

    def __init__(self, method: polar.PolarFn, x: jax.Array):
        self.method, self.x = method, x
        self.compiled: Any = jax.jit(method).lower(x).compile()
        self.found = np.asarray(self.compiled(x), np.float64)
        self.calls = max(1, round(TURN_SECONDS / self.seconds(1)))

    def seconds(self, calls: int | None = None) -> float:
        """Run for a turn and return the time of one call."""
        calls, out = calls or self.calls, None
        begin = time.perf_counter()
        for _ in range(calls):
            out = self.compiled(self.x)
        jax.block_until_ready(out)
        return (time.perf_counter() - begin) / calls

    def flops(self) -> float | None:
        """Return the compiler's count; LAPACK's work it does not know."""
        known = isinstance(self.method, polar.NewtonSchulz)
        return self.compiled.cost_analysis()["flops"] if known else None

    def accuracy(self) -> dict[str, float | None]:
        """Return the largest error of an entry, here and at a condition of 1e4; the values."""
        squares = np.linalg.eigvalsh(self.found @ np.swapaxes(self.found, -1, -2))
        values = np.sqrt(np.maximum(squares, 0))
        hard = _ill_conditioned(self.x.shape[-1]) if self.x.ndim == 2 else None
        return {
            "error": _error(self.found, self.method, np.asarray(self.x)),
            "at 1e4": None if hard is None else _error(self.compiled(hard), self.method, hard),
            "smallest": round(float(values.min()), 4),
            "largest": round(float(values.max()), 4),
        }

    def form(self) -> str:
        """Return the form that runs."""
        if not isinstance(self.method, polar.NewtonSchulz):
            return "-"
        rows, cols = self.x.shape[-2:]
        gram = self.method.uses_gram(rows, cols, self.x.dtype)
        return "gram" if gram else "direct"


def _ratio(flops: float | None, standard: float | None) -> float | None:
    return round(flops / standard, 3) if flops and standard else None


def kernel_rows(aspect: int, batch: int, turns: int) -> Iterator[dict[str, Any]]:
    """Yield a row per method for one shape, the standard first."""
    shape = (*((batch,) if batch > 1 else ()), SIDE, aspect * SIDE)
    x = jax.random.normal(jax.random.key(SEED), shape)
    runners = {name: Runner(method, x) for name, method in METHODS.items()}
    times: dict[str, list[float]] = {name: [] for name in runners}
    rng = np.random.default_rng(SEED)
    for _ in range(turns):
        # In a new order every turn, so that none always runs after the same one.
        for name in rng.permutation(list(runners)):
            times[name].append(runners[name].seconds())
    for name, runner in runners.items():
        wall = float(np.median(np.array(times[name]) / np.array(times[STANDARD])))
        promise = _ratio(runner.flops(), runners[STANDARD].flops())
        yield {
            "shape": "x".join(map(str, shape)),
            "method": name,
            "form": runner.form(),
            "ms": round(1e3 * float(np.median(times[name])), 1),
            "flops": promise,
            "wall": round(wall, 3),
            "wall/flops": None if promise is None else round(wall / promise, 3),
            **runner.accuracy(),
        }


def _small_leaves() -> dict[str, Any]:
    """400 leaves of (64, 64)."""
    return {f"layer{i}": {"kernel": (64, 64)} for i in range(400)}


def _compile_seconds(tx: optax.GradientTransformation, params: Any) -> tuple[float, float, Any]:
    """Return the seconds to trace and to compile one step, the least of several, and the step."""
    from benchmarks.described import optimizer_step

    state, found = jax.eval_shape(tx.init, params), []
    for _ in range(COMPILATIONS):
        step = jax.jit(optimizer_step(tx), donate_argnums=(0, 1))
        begin = time.perf_counter()
        lowered = step.lower(params, state, params)
        middle = time.perf_counter()
        compiled = lowered.compile()
        found.append((middle - begin, time.perf_counter() - middle))
    trace, compile_ = map(min, zip(*found, strict=True))
    return trace, compile_, compiled


def compile_rows() -> Iterator[dict[str, Any]]:
    """Yield a row per tree and optimizer: seconds to trace and to compile one step, optax first."""
    shapes = {"400 x (64, 64)": _small_leaves(), "gpt196": trees.gpt196()}
    # Smaller programs first: what optax leaves in memory slows the next ones.
    found = {
        (title, name): _compile_seconds(make(methods.RATE), trees.shapes(tree))
        for name, make in (("optlab", optlab.muon), ("optax", optax.contrib.muon))
        for title, tree in reversed(shapes.items())
    }
    for title, name in itertools.product(shapes, ("optax", "optlab")):
        trace, seconds, compiled = found[title, name]
        yield {
            "tree": title,
            "muon of": name,
            "trace s": round(trace, 2),
            "compile s": round(seconds, 2),
            "ratio": round(seconds / found[title, "optax"][1], 3),
            "instructions": hlo.instructions(compiled.as_text()),
        }


def _collect(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        print(", ".join(f"{head} {value}" for head, value in row.items()), flush=True)
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orthogonalize", description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--skip", choices=("kernels", "compile"), help="leave one table alone")
    asked = parser.parse_args()
    facts = table.about(report.device(), SEED)
    if asked.skip != "compile":
        notes = (
            f"One step of the optimizer, params and state donated; the least of {COMPILATIONS} "
            "times. Each with its own defaults: optax's muon orthogonalizes the embeddings too."
        )
        title, out = "Seconds to compile Muon", asked.out / "orthogonalize_compile"
        table.write(out, title, facts, _collect(compile_rows()), notes)
    if asked.skip != "kernels":
        rows = [
            row
            for aspect in ASPECTS
            for batch in BATCHES
            for row in _collect(kernel_rows(aspect, batch, asked.turns))
        ]
        notes = (
            "Normal float32 matrices. `flops`, `wall`: by those of five direct steps of Keller "
            f"Jordan's quintic; FLOPs by the compiler's count, time the median over {asked.turns} "
            "turns. `error`: largest of an entry, to the same iteration in the direct form in "
            "float64, or to the SVD's polar factor; `at 1e4`: of a matrix of that condition. "
            "`smallest`, `largest`: singular values of the result."
        )
        table.write(asked.out / "orthogonalize", "Orthogonalization", facts, rows, notes)
        late = [row for row in rows if (row["wall/flops"] or 0) > SLACK]
        print(f"{len(late)} of {len(rows)} take over {SLACK} times what their FLOPs promise.")
        for row in late:
            print(f"  {row['shape']} {row['method']}: {row['wall/flops']}")


if __name__ == "__main__":
    main()
