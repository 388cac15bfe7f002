"""One optimizer's run: a compiled chunk of steps, its evaluation, its clocks."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike

from optlab import gauss_newton_diagonal
from optlab.lab import data, model
from optlab.lab.config import Config

Transform = optax.GradientTransformationExtraArgs
TIMED_UPDATES = 20


def make_chunk(
    structure: nnx.GraphDef,
    tx: Transform,
    config: Config,
    length: int,
    seed: ArrayLike | None = None,
) -> Callable:
    """Return `chunk(params, opt_state, train, start) -> params, opt_state, losses`.

    It runs `length` steps in one `lax.scan`; jit it with the first two arguments donated. The seed
    of the batches is the config's, unless another one is given, which may be traced.
    """
    seed = config.seed if seed is None else seed

    def one_step(train: jax.Array, carry: tuple, step: jax.Array) -> tuple[tuple, jax.Array]:
        params, opt_state = carry
        batch = data.batch(train, seed, step, config)
        value, grads = jax.value_and_grad(lambda p: model.loss(structure, p, batch))(params)
        # Sophia's estimate; it costs nothing where no one asks.
        curvature = gauss_newton_diagonal(lambda p: model.logits(structure, p, batch))
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        return (optax.apply_updates(params, updates), opt_state), value

    def chunk(params: Any, opt_state: Any, train: jax.Array, start: jax.Array) -> tuple:
        steps = start + jnp.arange(length, dtype=jnp.int32)
        carry, losses = jax.lax.scan(
            lambda carry, step: one_step(train, carry, step), (params, opt_state), steps
        )
        return *carry, losses

    return chunk


def make_updates_alone(tx: Transform) -> Callable:
    """Return `updates(params, opt_state, grads) -> params, opt_state`: the step less its gradient.

    The updates are repeated inside one call, as in the chunk, so that the time to launch the
    call does not count as the optimizer's. The barrier keeps work on the gradient in the loop.
    """

    def one_update(grads: Any, carry: tuple) -> tuple[tuple, None]:
        (params, opt_state), grads = jax.lax.optimization_barrier((carry, grads))
        updates, opt_state = tx.update(grads, opt_state, params, curvature=None)
        return (optax.apply_updates(params, updates), opt_state), None

    def updates(params: Any, opt_state: Any, grads: Any) -> tuple:
        return jax.lax.scan(
            lambda carry, _: one_update(grads, carry), (params, opt_state), length=TIMED_UPDATES
        )[0]

    return updates


class Problem(NamedTuple):
    """What all optimizers share: model, first weights, data and the compiled evaluation."""

    config: Config
    structure: nnx.GraphDef
    params: nnx.State
    corpus: data.Corpus
    evaluate: Callable[[nnx.State], float]

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def make_problem(config: Config, text: bytes) -> Problem:
    """Put data and first weights on the device and compile the evaluation."""
    corpus = data.make_corpus(text, config)
    structure, _ = model.abstract(config)

    @jax.jit
    def mean_loss(params: nnx.State, held_out: jax.Array) -> jax.Array:
        return jax.lax.map(lambda batch: model.loss(structure, params, batch), held_out).mean()

    def evaluate(params: nnx.State) -> float:
        return float(mean_loss(params, corpus.held_out))

    return Problem(config, structure, model.initial_params(config), corpus, evaluate)


def state_bytes_per_parameter(tx: Transform, params: Any) -> float:
    """Return the bytes of optimizer state that each parameter costs, from shapes alone."""
    state = jax.tree.leaves(jax.eval_shape(tx.init, params))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in state) / size


class Curve(NamedTuple):
    """What is measured at the end of every turn; `train` is the mean loss since the last."""

    step: list[int]
    train: list[float]
    held_out: list[float]
    seconds: list[float]


class Program:
    """One optimizer on a problem, compiled: the pieces of its runs, and its update alone.

    `transform(setting)` is the optimizer; a setting is a tree of arrays, so that runs which differ
    in their setting share what is compiled. A race has none.
    """

    def __init__(self, problem: Problem, transform: Callable[[Any], Transform]):
        self.problem = problem
        self.transform = transform
        self.init = jax.jit(lambda params, setting: transform(setting).init(params))
        self.update_seconds = 0.0
        self._compiled: dict[int, Callable] = {}

    def chunk(self, length: int) -> Callable:
        """Return `chunk(params, opt_state, train, start, setting)`, whose seed may be a setting."""

        def chunk(params: Any, opt_state: Any, train: jax.Array, start: jax.Array, setting: Any):
            problem, tx = self.problem, self.transform(setting)
            seed = getattr(setting, "seed", None)
            of_tx = make_chunk(problem.structure, tx, problem.config, length, seed)
            return of_tx(params, opt_state, train, start)

        return chunk

    def compiled(self, length: int, params: Any, opt_state: Any, setting: Any) -> tuple:
        """Return the compiled chunk, and the seconds it took to compile it now.

        It is compiled ahead, so that the clock of the steps never holds a compilation.
        """
        seconds = 0.0
        if length not in self._compiled:
            begin = time.perf_counter()
            arguments = (params, opt_state, self.problem.corpus.train, np.int32(0), setting)
            jitted = jax.jit(self.chunk(length), donate_argnums=(0, 1))
            self._compiled[length] = jitted.lower(*arguments).compile()
            seconds = time.perf_counter() - begin
            if not self.update_seconds:
                self.update_seconds = self._time_updates(opt_state, setting)
        return self._compiled[length], seconds

    def _time_updates(self, opt_state: Any, setting: Any) -> float:
        """Return the seconds of one update on the real tree, the best of three calls."""
        first = self.problem.params
        params, state = jax.tree.map(jnp.copy, (first, opt_state))
        # The time does not depend on the values, so the weights stand in for a gradient.
        updates = (
            jax.jit(make_updates_alone(self.transform(setting)), donate_argnums=(0, 1))
            .lower(params, state, first)
            .compile()
        )
        best = np.inf
        for _ in range(3):
            begin = time.perf_counter()
            params, state = jax.block_until_ready(updates(params, state, first))
            best = min(best, time.perf_counter() - begin)
        return best / TIMED_UPDATES


class Runner:
    """One run of an optimizer, from its first step to its last."""

    def __init__(self, name: str, program: Program, params: Any, setting: Any = ()):
        self.name = name
        self.program, self.setting = program, setting
        self.problem = program.problem
        self.params = jax.tree.map(jnp.copy, params)  # donated, so each has its own
        self.opt_state = program.init(self.params, setting)
        self.state_bytes = state_bytes_per_parameter(program.transform(setting), self.params)
        self.step = 0
        self.seconds = 0.0
        self.compile_seconds = 0.0
        self.diverged_at: int | None = None
        self.curve = Curve([], [], [], [])

    @property
    def racing(self) -> bool:
        """Whether there is a step left to take."""
        return self.diverged_at is None and self.step < self.problem.config.steps

    @property
    def optimizer_share(self) -> float | None:
        """Part of a step's time that the update takes; None before the first turn."""
        return self.program.update_seconds * self.step / self.seconds if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Training speed without compilation and evaluation; None before the first turn."""
        done = self.step * self.problem.config.tokens_per_step
        return done / self.seconds if self.seconds else None

    def advance(self) -> None:
        """Take one turn: a chunk of steps, then an evaluation."""
        config = self.problem.config
        length = min(config.round_steps - self.step % config.round_steps, config.steps - self.step)
        chunk, seconds = self.program.compiled(length, self.params, self.opt_state, self.setting)
        self.compile_seconds += seconds
        train, start = self.problem.corpus.train, np.int32(self.step)
        begin = time.perf_counter()
        self.params, self.opt_state, losses = chunk(
            self.params, self.opt_state, train, start, self.setting
        )
        losses = np.asarray(losses)
        self.seconds += time.perf_counter() - begin
        self.step += length
        self._record(losses)

    def _record(self, losses: np.ndarray) -> None:
        held_out = self.problem.evaluate(self.params)
        if not np.isfinite([*losses, held_out]).all():
            bad = np.flatnonzero(~np.isfinite(losses))
            self.diverged_at = self.step - len(losses) + int(bad[0]) if bad.size else self.step
            return
        self.curve.step.append(self.step)
        self.curve.train.append(float(losses.mean(dtype=np.float64)))
        self.curve.held_out.append(held_out)
        self.curve.seconds.append(self.seconds)

    def save(self) -> tuple[Any, dict[str, Any]]:
        """Return the arrays and the plain values of a checkpoint."""
        values = {
            "step": self.step,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "update_seconds": self.program.update_seconds,
            "diverged_at": self.diverged_at,
            "curve": self.curve._asdict(),
        }
        return (self.params, self.opt_state), values

    def restore(self, arrays: Any, values: dict[str, Any]) -> None:
        """Take over what `save` returned."""
        self.params, self.opt_state = arrays
        self.step, self.seconds = values["step"], values["seconds"]
        self.compile_seconds = values["compile_seconds"]
        self.program.update_seconds = values["update_seconds"]
        self.diverged_at = values["diverged_at"]
        self.curve = Curve(**values["curve"])
