"""What a race is: sizes, lengths, learning rates; and the errors of a wrong command line."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from optlab.lab.workloads import WORKLOADS, Workload


class BadInput(ValueError):
    """A mistake in the command line or in a file it names: told in one line, exit code 2."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a race, apart from the machine."""

    preset: str
    optimizers: tuple[str, ...]
    learning_rates: Mapping[str, float]
    schedule: str
    text: str | None  # None is the standard library of the running Python
    text_sha256: str
    steps: int
    seed: int
    layers: int
    width: int
    heads: int
    context: int
    batch_size: int
    rounds: int  # times the optimizers take turns; each turn ends with an evaluation
    eval_windows: int
    workload: str = "gpt"  # what races saved before there were others

    @property
    def work(self) -> Workload:
        """What is learned."""
        return WORKLOADS[self.workload]

    @property
    def round_steps(self) -> int:
        """Steps an optimizer advances before the next one's turn."""
        return math.ceil(self.steps / self.rounds)

    @property
    def warmup_steps(self) -> int:
        """One twentieth of the run, and at least one step."""
        return max(1, self.steps // 20)

    @property
    def tokens_per_step(self) -> int:
        """What is predicted in one step: bytes, images or pixels."""
        return self.batch_size * self.context

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Config":
        """Read back what `dataclasses.asdict` and JSON made of a Config."""
        fields: dict[str, Any] = {**tree, "optimizers": tuple(tree["optimizers"])}
        return cls(**fields)


def workload(name: str) -> Workload:
    """Return the workload of that name."""
    if name not in WORKLOADS:
        raise BadInput(f"race: --workload must be one of {', '.join(WORKLOADS)}, got {name!r}.")
    return WORKLOADS[name]


def preset(name: str, of: str = "gpt") -> dict[str, int]:
    """Return the sizes of a workload's preset."""
    presets = workload(of).presets
    if name not in presets:
        raise BadInput(f"race: --preset must be one of {', '.join(presets)}, got {name!r}.")
    return dict(presets[name])


def refuse_strangers(asked: Mapping[str, Any], of: str) -> None:
    """Refuse what the workload has no use for: a text, attention heads."""
    found = workload(of)
    for name in (*found.without, *(() if found.own_text else ("text",))):
        if name in asked:
            raise BadInput(
                f"race: --{name} means nothing to --workload {of}, got {asked[name]!r}. "
                "Leave it out."
            )


def split_names(items: Iterable[str], command: str = "race") -> tuple[str, ...]:
    """Turn ("a,b", "c") into ("a", "b", "c"); the same name twice is an error."""
    names = tuple(name.strip() for item in items for name in item.split(",") if name.strip())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInput(
            f"{command}: --optimizers must differ, got {twice[0]!r} twice. Write it once."
        )
    if not names:
        raise BadInput(
            f"{command}: --optimizers is empty, got no name. Write for example adamw,lion."
        )
    return names


def parse_rates(items: Iterable[str]) -> dict[str, float]:
    """Turn ("lion=3e-4",) into {"lion": 3e-4}."""
    rates = {}
    for item in items:
        name, equals, value = item.partition("=")
        try:
            rate = float(value)
        except ValueError:
            rate = math.nan
        if not (name and equals and math.isfinite(rate) and rate > 0):
            raise BadInput(
                f"race: --lr must be NAME=RATE with a positive RATE, got {item!r}. "
                "Write for example --lr lion=3e-4."
            )
        rates[name.strip()] = rate
    return rates


def check(config: Config) -> Config:
    """Refuse sizes that cannot run."""
    for field in ("steps", "layers", "width", "heads", "context", "batch_size"):
        value = getattr(config, field)
        if value < 1:
            flag = field.replace("_", "-")
            raise BadInput(f"race: --{flag} must be at least 1, got {value}.")
    if not 0 <= config.seed < 2**31:
        raise BadInput(f"race: --seed must lie between 0 and 2**31 - 1, got {config.seed}.")
    if config.width % config.heads:
        raise BadInput(
            f"race: --width must be a multiple of --heads ({config.heads}), got {config.width}."
        )
    return config


def refuse_changes(saved: Config, asked: Mapping[str, Any]) -> None:
    """Raise when a resumed race is asked for anything other than what was saved."""
    changed = []
    for name, value in asked.items():
        if name == "learning_rates":
            before = {key: saved.learning_rates.get(key) for key in value}
        else:
            before = getattr(saved, name)
        if before != value:
            changed.append(f"{name} was {_plain(before)}, got {_plain(value)}")
    if changed:
        raise BadInput(
            f"race: --resume continues the saved race unchanged: {'; '.join(changed)}. "
            "Drop these options, or start another race with another --out."
        )


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={rate:g}" if rate else f"no {key}" for key, rate in value.items())
    return ",".join(value) if isinstance(value, tuple) else str(value)
