"""The study: the same tuning budget for every optimizer, on every workload, then fresh seeds.

Every run is kept in study.json as soon as it ends, so that a study can be stopped and gone on with.
Seeds run one after another: three of them under `vmap` took 2.6 times as long as one (the GRU) and
2.9 times (the convolutional net; medians of three turns on two busy CPU cores), and the seconds of
one among three would be no one's.
"""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optlab.lab import data, findings, model, optimizers, report
from optlab.lab.config import BadInput, Config
from optlab.lab.rates import RATES
from optlab.lab.train import Program, Runner, make_problem

STORE = "study.json"
DEFAULT_OPTIMIZERS = ("adamw", "sgd", "muon", "normuon", "lion", "diffgrad")
# The first five of these trials miss the best rate of AdamW on rows, and everyone the target there.
TRIALS, SEEDS = 10, 3
SCHEDULE = "warmup_linear_decay"
TUNING_SEED = 0  # the seeds that count are 1, 2, ...: no one was tuned on them
# The one space for all; weight decay where the recipe has it.
DECADES = 2.0  # of the rate, half of them on each side of the recorded one
WARMUP = (0.02, 0.1)  # share of the run
WEIGHT_DECAY = (1e-4, 1e-1)
# What an optimizer has to beat to be more than another one in disguise: (who, its rate times what).
CONTROLS = {"diffgrad": ("adamw", 0.5)}  # far from the minimum its friction is about 1/2
Record = dict[str, Any]


class Choice(NamedTuple):
    """What is tuned; a weight decay of None is the recipe's own."""

    learning_rate: float
    warmup: float = 0.05
    weight_decay: float | None = None


class Setting(NamedTuple):
    """What runs of one compiled program differ in."""

    seed: ArrayLike
    rates: ArrayLike  # (steps,)
    weight_decay: ArrayLike


def _between(low: float, high: float, part: float) -> float:
    """Return the point of a logarithmic scale, to four digits."""
    return float(f"{low * (high / low) ** part:.4g}")


def choices(name: str, trials: int) -> list[Choice]:
    """Return the trials of an optimizer: points of a Halton sequence, the same for everyone.

    The first has the recorded rate.
    """
    from scipy.stats import qmc  # slow to import, and a race does without

    sequence = qmc.Halton(3, scramble=False).fast_forward(1)
    centre, half, decays = RATES[name.partition("+")[0]], 10 ** (DECADES / 2), takes_decay(name)
    return [
        Choice(
            _between(centre / half, centre * half, rate),
            round(float(WARMUP[0] + (WARMUP[1] - WARMUP[0]) * warmup), 4),
            _between(*WEIGHT_DECAY, decay) if decays else None,
        )
        for rate, warmup, decay in sequence.random(trials)
    ]


def takes_decay(name: str) -> bool:
    """Whether the optimizer has a weight decay."""
    return "weight_decay" in inspect.signature(optimizers.recipe(name)).parameters


def own_decay(name: str) -> float:
    """Return the weight decay that an optimizer has when it is not told one; 0 without any."""
    parameters = inspect.signature(optimizers.recipe(name)).parameters
    return float(parameters["weight_decay"].default) if takes_decay(name) else 0.0


def transform(name: str, setting: Setting) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer with the rates and the decay of a setting, which may be traced."""
    rates = jnp.asarray(setting.rates)
    more = {"weight_decay": jnp.asarray(setting.weight_decay)} if takes_decay(name) else {}
    return optimizers.make(name, lambda step: rates[step], **more)


class Bench:
    """One workload: its problem, and a compiled program for every optimizer."""

    def __init__(self, config: Config, raw: bytes):
        self.problem = make_problem(config, raw)
        self.program = functools.cache(self._program)
        self.weights = functools.cache(model.make_initial_params(config))

    def run(self, name: str, choice: Choice, seed: int) -> Record:
        """Train once, to the end or to where it diverges."""
        setting = self._setting(name, choice, seed)
        runner = Runner(name, self.program(name), self.weights(seed), setting)
        while runner.racing:
            runner.advance()
        return {
            "choice": choice._asdict(),
            "seed": seed,
            **runner.curve._asdict(),
            "diverged_at": runner.diverged_at,
            "step_seconds": runner.seconds / runner.step,
            "compile_seconds": runner.compile_seconds,
            "optimizer_share": runner.optimizer_share,
            "state_bytes_per_parameter": runner.state_bytes,
        }

    def _setting(self, name: str, choice: Choice, seed: int) -> Setting:
        steps = self.problem.config.steps
        warmup = max(1, round(choice.warmup * steps))
        schedule = optimizers.SCHEDULES[SCHEDULE](choice.learning_rate, warmup, steps)
        rates = np.asarray(jax.vmap(schedule)(jnp.arange(steps)), np.float32)
        decay = own_decay(name) if choice.weight_decay is None else choice.weight_decay
        return Setting(np.int32(seed), rates, np.float32(decay))

    def _program(self, name: str) -> Program:
        return Program(self.problem, functools.partial(transform, name))


def config_of(workload: str, sizes: Mapping[str, int], raw: bytes) -> Config:
    """Return a workload of the study; who runs, and at which rate, is not its matter."""
    return Config(
        preset="study", optimizers=(), learning_rates={}, schedule=SCHEDULE, text=None,
        text_sha256=data.fingerprint(raw), seed=TUNING_SEED, workload=workload, **sizes,
    )  # fmt: skip


def best(records: Mapping[Any, Record], target: float) -> Any:
    """Return the key of the trial that came first to the target; of none, of the lowest curve."""

    def order(key: Any) -> tuple[float, float]:
        record = records[key]
        lowest = min(record["held_out"], default=np.inf)
        steps = findings.time(record, "step", target)
        return (steps, np.inf if record["diverged_at"] else lowest)

    return min(records, key=order)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a study consists of."""

    optimizers: tuple[str, ...]
    workloads: tuple[str, ...]
    trials: int
    seeds: int
    targets: Mapping[str, Any]

    def about(self) -> dict[str, Any]:
        """Return all that the numbers of any one run depend on."""
        return {
            "trials": self.trials,
            "seeds": self.seeds,
            "schedule": SCHEDULE,
            "space": {"decades": DECADES, "warmup": WARMUP, "weight_decay": WEIGHT_DECAY},
            "targets": {name: self.targets[name] for name in self.workloads},
            "versions": report.versions(),
            "device": report.device(),
        }

    def controls(self) -> list[tuple[str, str, float]]:
        """Return the optimizers that have a control, who that is, and at which part of its rate."""
        return [(name, *CONTROLS[name]) for name in self.optimizers if name in CONTROLS]

    def size(self) -> int:
        """Return the number of runs."""
        each = len(self.optimizers) * (self.trials + 2 * self.seeds)
        return len(self.workloads) * (each + len(self.controls()) * self.seeds)


class Store:
    """study.json: what the study depends on, and every run by its name."""

    def __init__(self, folder: Path, about: Mapping[str, Any]):
        self.path = folder / STORE
        self.about = json.loads(json.dumps(about))
        self.runs: dict[str, Record] = {}

    def resume(self) -> None:
        """Take over what is there; refuse what another study left."""
        before = read(self.path.parent)
        changed = [key for key in self.about if before["about"].get(key) != self.about[key]]
        if changed:
            raise BadInput(
                f"race: --resume continues the saved study unchanged, got another "
                f"{' and another '.join(changed)}. Give what it began with, or another --out."
            )
        self.runs = before["runs"]

    def do(self, key: str, run: Callable[[], Record]) -> Record:
        """Return a run, and keep it."""
        if key not in self.runs:
            self.runs[key] = run()
            text = json.dumps({"about": self.about, "runs": self.runs}, allow_nan=False)
            report.write_whole(self.path, text + "\n")
        return self.runs[key]


def read(folder: Path) -> dict[str, Any]:
    """Return the study of a folder."""
    try:
        return json.loads((folder / STORE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise BadInput(
            f"race: --benchmark found no study to go on with, got {str(folder)!r}. "
            "Start it without --resume, or name its folder with --out."
        ) from None


def work(plan: Plan, store: Store) -> Iterator[tuple[str, Record]]:
    """Make every run that is missing, and yield each with its name."""
    for workload in plan.workloads:
        yield from _work_on(workload, plan, store)


def _work_on(workload: str, plan: Plan, store: Store) -> Iterator[tuple[str, Record]]:
    goal, raw = plan.targets[workload], data.read(workload, None)
    bench = Bench(config_of(workload, goal["sizes"], raw), raw)
    seeds = range(1, plan.seeds + 1)
    tuned: dict[str, Choice] = {}

    def run(label: str, kind: str, who: str, choice: Choice, seed: int) -> tuple[str, Record]:
        key = f"{workload}/{label}/{kind}"
        return key, store.do(key, lambda: bench.run(who, choice, seed))

    for name in plan.optimizers:
        found = {}
        for i, choice in enumerate(choices(name, plan.trials)):
            key, found[choice] = run(name, f"trial/{i}", name, choice, TUNING_SEED)
            yield key, found[choice]
        tuned[name] = best(found, goal["target"])
        default = Choice(RATES[name.partition("+")[0]])
        for kind, choice in (("tuned", tuned[name]), ("default", default)):
            for seed in seeds:
                yield run(name, f"{kind}/{seed}", name, choice, seed)
    for name, who, part in plan.controls():
        choice = tuned[name]._replace(learning_rate=part * tuned[name].learning_rate)
        for seed in seeds:
            yield run(control_name(name), f"tuned/{seed}", who, choice, seed)


def control_name(name: str) -> str:
    """Return what the control of an optimizer is called."""
    who, part = CONTROLS[name]
    return f"{who} at {part:g} of {name}'s rate"


def other_data(plan: Plan) -> list[str]:
    """Say what makes the numbers others than those of the targets' makers."""
    notes = []
    for workload in plan.workloads:
        goal = plan.targets[workload]
        if data.fingerprint(data.read(workload, None)) != goal["data_sha256"]:
            notes.append(
                f"{workload}: the target was set on {goal['data']}, which is not what is read "
                "here. Times to it compare optimizers, but not with the record."
            )
    return notes
