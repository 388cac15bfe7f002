"""What the command line takes, and what it calls."""

import dataclasses
import shlex
import sys
from typing import Annotated, Any

import tyro

from optlab.lab import catalog, config, race

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


def _optional(kind: type, metavar: str) -> Any:
    """Return how tyro reads an option that may be left out, without offering the word None."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: kind(words[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


Plain = tyro.conf.arg(help_behavior_hint="")
Whole = Annotated[int | None, _optional(int, "N"), Plain]
Word = Annotated[str | None, _optional(str, "NAME"), Plain]
Path = Annotated[str | None, _optional(str, "PATH"), Plain]


@dataclasses.dataclass(frozen=True)
class Race:
    """Train the same small GPT with several optimizers side by side and show who wins."""

    preset: Word = None
    """quick (default: under 3 minutes on 2 CPU cores), small or medium."""
    optimizers: Annotated[Repeated, tyro.conf.arg(metavar="NAME,NAME", help_behavior_hint="")] = ()
    """Who races; repeatable. `optlab list` prints the names; adamw and sgd are optax's."""
    lr: Annotated[Repeated, tyro.conf.arg(metavar="NAME=RATE", help_behavior_hint="")] = ()
    """Peak learning rate of one optimizer, such as lion=3e-4; repeatable."""
    schedule: Word = None
    """wsd (default), constant, cosine or warmup_linear_decay."""
    text: Path = None
    """File to learn (default: the source code of Python's standard library)."""
    steps: Whole = None
    """Training steps, instead of the preset's."""
    seed: Whole = None
    """Seed of the weights and of the batches (default 0)."""
    layers: Whole = None
    """Transformer blocks, instead of the preset's."""
    width: Whole = None
    """Width of the residual stream, instead of the preset's."""
    heads: Whole = None
    """Attention heads, instead of the preset's."""
    context: Whole = None
    """Bytes the model sees at once, instead of the preset's."""
    batch_size: Whole = None
    """Windows in a batch, instead of the preset's."""
    out: Path = None
    """Folder of the results (default: runs/race-PRESET)."""
    resume: Annotated[bool, Plain] = False
    """Continue the race saved in that folder."""

    def asked(self) -> dict[str, Any]:
        """Return what was given, in the words of `Config`."""
        fields = dataclasses.asdict(self)
        for name in ("out", "resume", "optimizers", "lr"):
            del fields[name]
        given = {name: value for name, value in fields.items() if value is not None}
        if self.optimizers:
            given["optimizers"] = config.split_names(self.optimizers)
        if self.lr:
            given["learning_rates"] = config.parse_rates(self.lr)
        return given


@dataclasses.dataclass(frozen=True)
class List:
    """Print the catalogue of optimizers."""


def run(argv: list[str]) -> int:
    """Do what the command line says and return the exit code."""
    options = tyro.cli(
        Race | List, prog="optlab", args=argv, config=(tyro.conf.FlagCreatePairsOff,)
    )
    if isinstance(options, List):
        catalog.show()
        return 0
    try:
        race.run(options.asked(), out=options.out, resume=options.resume)
    except race.Interrupted:
        again = argv if "--resume" in argv else [*argv, "--resume"]
        print(f"Saved. To go on: {shlex.join(['optlab', *again])}", file=sys.stderr)
        return 130
    return 0
