"""Time low-rank projection: python -m benchmarks.low_rank.

Three tables. `refresh`: to find a subspace by SVD and by power iteration, on large matrices with
the spectra of the race model's gradients. `gradients`: how much of SVD's subspace power iteration
finds in those gradients themselves. `step`: a whole step on a GPT of 196 leaves, its slowest
hundredth with the refreshes at once and staggered, its memory, beside `optax.contrib.galore`.
Writes benchmarks/results/low_rank_{refresh,gradients,step}.{json,md}.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab
from benchmarks import gradients, hlo, methods, table, trees
from benchmarks.described import optimizer_step
from optlab.lab import report
from optlab.linalg import subspace

RESULTS = Path(__file__).parent / "results"
SEED = 0
LARGE = ((256, 1024, 32), (1024, 4096, 128))
TURNS = 5
# Steps of the race at which a gradient is kept, with the gradient before it.
KEPT = {20: 10, 30: 20, 200: 20, 210: 200}
STRETCHED = (20, 200)
Drifts = dict[tuple[int, str], float]
# One basis in EVERY steps: of STEPS, one in fifty takes a refresh, so the slowest hundredth is one.
RANK, EVERY, STEPS, FEWER_STEPS, TURN_STEPS = 32, 50, 200, 60, 10


@functools.cache
def _finders(rank: int) -> dict[str, Callable[..., jax.Array]]:
    """Return finds of (matrix, old basis)."""
    svd, power = (
        jax.jit(lambda x, old, key, first, p=p: p.find(x, old, rank, key, first))
        for p in (optlab.svd_projector(), optlab.power_projector())
    )
    # Arguments, not constants: the compiler must not know them.
    key, cold, warm = jax.random.key(SEED), jnp.array(True), jnp.array(False)
    return {
        "svd": lambda x, old: svd(x, old, key, cold),
        "cold": lambda x, old: power(x, old, key, cold),
        "warm": lambda x, old: power(x, old, key, warm),
    }


def _overlap(new: Any, old: Any) -> float:
    return round(float(subspace.overlap(jnp.asarray(new, "float32"), jnp.asarray(old))), 4)


def gradient_rows(found: gradients.Gradients) -> Iterator[dict[str, Any]]:
    """Yield a row per gradient: what power iteration finds of SVD's subspace."""
    for at, before in KEPT.items():
        for name in gradients.KERNELS:
            new, old = found[at, name], found[before, name]
            short = min(new.shape)
            rank = short // 8
            (u, values), (u_old, _) = gradients.left(new), gradients.left(old)
            x = jnp.asarray(new if new.shape[0] == short else new.T)
            exact, stale = (jnp.asarray(v[:, :rank], "float32") for v in (u, u_old))
            find = _finders(rank)
            cold, warm = (find[start](x, stale) for start in ("cold", "warm"))
            size = float(jnp.linalg.norm(exact.T @ x))
            yield {
                "kernel": name,
                "shape": "x".join(map(str, new.shape)),
                "r": rank,
                "step": at,
                "before": before,
                "s_r/s_1": round(float(values[rank - 1] / values[0]), 4),
                "old basis": _overlap(stale, exact),
                "cold": _overlap(cold, exact),
                "warm": _overlap(warm, exact),
                "gradient kept": round(float(jnp.linalg.norm(warm.T @ x)) / size, 5),
            }


def _seconds(find: Callable[..., jax.Array], *args: jax.Array) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(find(*args))
    return time.perf_counter() - begin


def refresh_rows(found: gradients.Gradients, drifts: Drifts) -> Iterator[dict[str, Any]]:
    """Yield a row per shape and spectrum; times for the first spectrum, overlaps for all."""
    for a, b, rank in LARGE:
        u, v = gradients.random_basis(a, a), gradients.random_basis(b, a)
        find, timed = _finders(rank), True
        exact = jnp.asarray(u[:, :rank], "float32")
        for (at, name), share in drifts.items():
            values = gradients.stretched(gradients.left(found[at, name])[1], a)
            x = jnp.asarray((u * values) @ v.T, "float32")
            old = jnp.asarray(gradients.turned(u, rank, share), "float32")
            yield {
                "shape": f"{a}x{b}",
                "r": rank,
                "spectrum": f"{name}, step {at}",
                "s_r/s_1": round(float(values[rank - 1]), 4),
                **_find_times(find, x, old, turns=TURNS if timed else 0),
                "old basis": share,
                "overlap, cold": _overlap(find["cold"](x, old), exact),
                "overlap, warm": _overlap(find["warm"](x, old), exact),
            }
            timed = False


def _find_times(find: dict[str, Any], *args: jax.Array, turns: int) -> dict[str, float | None]:
    for f in find.values() if turns else ():
        _seconds(f, *args)
    times = {how: np.array([], "float64") for how in find}
    for _ in range(turns):
        for how, f in find.items():
            times[how] = np.append(times[how], _seconds(f, *args))
    typical = lambda x, digits: round(float(np.median(x)), digits) if turns else None  # noqa: E731
    found = {f"{how} ms": typical(1e3 * mine, 2) for how, mine in times.items()}
    return found | {f"svd/{how}": typical(times["svd"] / times[how], 1) for how in ("cold", "warm")}


def _galore_of_optax() -> optax.GradientTransformation:
    """Return optax's GaLore for kernels alone; by default it projects the embeddings too."""

    def sides(params: Any) -> Any:
        is_kernel = lambda path: "kernel" in jax.tree_util.keystr(path)  # noqa: E731
        numbers = optax.contrib.GaLoreDimensionNumbers()
        of = lambda path, _: numbers if is_kernel(path) else None  # noqa: E731
        return jax.tree_util.tree_map_with_path(of, params)

    return optax.contrib.galore(
        methods.RATE, rank=RANK, update_proj_gap=EVERY, weight_dimension_numbers=sides
    )


BASELINE = "optax.contrib.galore"
TAIL = ("p99 ms", "p99/p50")


def forms() -> dict[str, tuple[optax.GradientTransformation, int]]:
    """Return the optimizers and the steps each takes, optax's first."""
    galore: dict[str, Any] = {"rank": RANK, "every": EVERY, "scale": 1.0}
    svd, rate = {"projector": optlab.svd_projector()}, methods.RATE
    return {
        BASELINE: (_galore_of_optax(), STEPS),
        "galore": (optlab.galore(rate, **galore), STEPS),
        "galore, staggered": (optlab.galore(rate, **galore, stagger=True), STEPS),
        "galore, svd": (optlab.galore(rate, **galore, **svd), STEPS),
        "galore, svd, staggered": (optlab.galore(rate, **galore, **svd, stagger=True), STEPS),
        "fira": (optlab.fira(rate, rank=RANK, every=EVERY), FEWER_STEPS),
        "frugal": (optlab.frugal(rate, rank=RANK, every=EVERY), FEWER_STEPS),
        "apollo": (optlab.apollo(rate, rank=RANK, every=EVERY), FEWER_STEPS),
        "conda": (optlab.conda(rate, every=EVERY), FEWER_STEPS),
        "ldadam": (optlab.ldadam(rate, rank=RANK), FEWER_STEPS),
        "optax.adamw": (optax.adamw(rate), FEWER_STEPS),
    }


class Runner:
    """A compiled step with its own params and state, both donated, after its first step."""

    def __init__(self, tx: optax.GradientTransformation, grads: Any, steps: int):
        self.params = trees.normal(trees.gpt196(), SEED, 0.02)
        self.state, self.grads = jax.jit(tx.init)(self.params), grads
        lowered = jax.jit(optimizer_step(tx), donate_argnums=(0, 1)).lower(
            self.params, self.state, self.grads
        )
        begin = time.perf_counter()
        self.compiled: Any = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        self.left, self.times = steps, [self._milliseconds()]

    def _milliseconds(self) -> float:
        begin = time.perf_counter()
        self.params, self.state = self.compiled(self.params, self.state, self.grads)
        jax.block_until_ready((self.params, self.state))
        return 1e3 * (time.perf_counter() - begin)

    def turn(self) -> None:
        """Take the steps of a turn, or those that are left."""
        steps = min(self.left, TURN_STEPS)
        self.times += [self._milliseconds() for _ in range(steps)]
        self.left -= steps

    def counts(self) -> dict[str, Any]:
        """Return memory in percent of the parameters' bytes, program size, compile time."""
        size = 4 * trees.size(self.params)
        temp = self.compiled.memory_analysis().temp_size_in_bytes
        kept = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        return {
            "temp %": round(100 * temp / size, 2),
            "state %": round(100 * kept / size, 2),
            "instructions": hlo.instructions(self.compiled.as_text()),
            "compile s": round(self.compile_seconds, 1),
        }


def tail(times: np.ndarray) -> dict[str, float | None]:
    """Return quantiles of the times of the steps 1, 2, ..., and those at the multiples of EVERY.

    Every EVERY-th step does the same, so the tail is that of the medians over such steps: what the
    machine does beside, a tenth of a second in one step of a hundred, is not the optimizer's.
    """
    p50, again = float(np.median(times)), float(np.median(times[EVERY - 1 :: EVERY]))
    if len(times) < STEPS:
        return {"p50 ms": round(p50, 1), "refresh ms": round(again, 1)} | dict.fromkeys(TAIL)
    alike = np.median(times.reshape(-1, EVERY), axis=0)
    p99 = float(np.percentile(alike, 99, method="higher"))
    found = (round(p99, 1), round(p99 / p50, 2))
    return {
        "p50 ms": round(p50, 1),
        "refresh ms": round(again, 1),
        **dict(zip(TAIL, found, strict=True)),
    }


def _ratio(times: np.ndarray, baseline: np.ndarray) -> float:
    """Return the median over turns of the typical step's time by the baseline's."""
    turns = (x[: len(times)].reshape(-1, TURN_STEPS) for x in (times, baseline))
    mine, other = (np.median(x, axis=1) for x in turns)
    return round(float(np.median(mine / other)), 3)


def step_rows() -> Iterator[dict[str, Any]]:
    """Yield a row per optimizer; they take turns."""
    grads = trees.normal(trees.gpt196(), SEED + 1, 1e-3)
    runners = {}
    for name, (tx, steps) in forms().items():
        runners[name] = Runner(tx, grads, steps)
        print(f"{name}: compiled in {runners[name].compile_seconds:.1f} s", flush=True)
    while any(runner.left for runner in runners.values()):
        for runner in runners.values():
            runner.turn()
    times = {name: np.array(runner.times[1:]) for name, runner in runners.items()}
    for name, runner in runners.items():
        ratio = _ratio(times[name], times[BASELINE])
        yield {"optimizer": name, **tail(times[name]), "p50/optax": ratio, **runner.counts()}


def _collect(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        print(", ".join(f"{head} {value}" for head, value in row.items()), flush=True)
        found.append(row)
    return found


def _judge(refreshes: list[dict[str, Any]], steps: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield what was asked of this benchmark, and what was found."""
    large = [row for row in refreshes if row["r"] == 128]
    faster = large[0]["svd/warm"]
    yield f"Warm power iteration at r = 128: {faster} times as fast as SVD (10 asked)."
    least = min(row[f"overlap, {how}"] for row in large for how in ("cold", "warm"))
    yield f"Its least overlap with the exact subspace: {least} (0.99 asked)."
    for how in ("galore", "galore, svd"):
        once, spread = (steps[name]["p99/p50"] for name in (how, f"{how}, staggered"))
        yield f"{how}: p99/p50 {once} at once, {spread} staggered (2 asked where that exceeds 5)."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.low_rank", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    threads = os.environ.get("OPENBLAS_NUM_THREADS")
    facts = table.about(f"{report.device()}, OPENBLAS_NUM_THREADS {threads or 'not set'}", SEED)

    found = gradients.race_gradients({*KEPT, *KEPT.values()})
    small = _collect(gradient_rows(found))
    drifts = {
        (row["step"], row["kernel"]): row["old basis"] for row in small if row["step"] in STRETCHED
    }
    large = _collect(refresh_rows(found, drifts))
    steps = _collect(step_rows())
    for name, title, rows in (
        ("gradients", "Subspaces of real gradients", small),
        ("refresh", "To find a subspace", large),
        ("step", "Steps in a subspace", steps),
    ):
        table.write(asked.out / f"low_rank_{name}", title, facts, rows, NOTES[name])
    print("\n".join(_judge(large, {row["optimizer"]: row for row in steps})))


NOTES = {
    "gradients": (
        "Gradients of a block of the race's quick model under AdamW. `old basis`: overlap of the "
        "SVD's subspaces of the gradients at the steps `before` and `step`; `cold`, `warm`: of "
        "`power_projector()` from random columns, and from that old basis, with the SVD's. "
        "`gradient kept`: norm of the gradient within the subspace found warm, by the SVD's."
    ),
    "refresh": (
        "Matrices with the spectra of the gradients above, stretched to their size, and random "
        "singular vectors. `cold`: `power_projector()` from random columns; `warm`: from a basis "
        "that has as much of the subspace, of each direction alike, as the older gradient's had "
        f"(`old basis`). Times of one call, compiled: medians over {TURNS} turns, as the ratios. "
        "Overlaps with the r first of the singular vectors that the matrix was made of."
    ),
    "step": (
        f"GPT of 196 leaves, 11.8 M float32 parameters, donated; rank {RANK}, a refresh every "
        f"{EVERY} steps, {STEPS} steps after the first, {FEWER_STEPS} where there is no p99, in "
        f"turns of {TURN_STEPS}; conda at full rank, ldadam with a refresh at every step. "
        "`refresh ms`: the steps in which all is found anew that is not staggered. `p99`: of the "
        f"{EVERY} kinds of steps, each the median of those that do the same. `p50/optax`: "
        "median over turns. `temp %`, `state %`: of the parameters' bytes. optax's GaLore is told "
        "to leave the embeddings whole, and projects the long side."
    ),
}

if __name__ == "__main__":
    main()
