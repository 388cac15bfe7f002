"""What the command line takes, and what it calls."""

import dataclasses
import shlex
import sys
from typing import Annotated, Any

import tyro

from optlab.lab import catalog, config, race

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Race:
    """Train the same small GPT with several optimizers side by side and show who wins."""

    preset: str | None = None
    """quick (default: under 3 minutes on 2 CPU cores), small or medium."""
    optimizers: Annotated[Repeated, tyro.conf.arg(metavar="NAME,NAME")] = ()
    """Who races; repeatable. `optlab list` prints the names; adamw and sgd are optax's."""
    lr: Annotated[Repeated, tyro.conf.arg(metavar="NAME=RATE")] = ()
    """Peak learning rate of one optimizer, such as lion=3e-4; repeatable."""
    schedule: str | None = None
    """wsd (default), constant, cosine or warmup_linear_decay."""
    text: str | None = None
    """File to learn (default: the source code of Python's standard library)."""
    steps: int | None = None
    """Training steps."""
    seed: int | None = None
    """Seed of the weights and of the batches (default 0)."""
    layers: int | None = None
    """Transformer blocks."""
    width: int | None = None
    """Width of the residual stream."""
    heads: int | None = None
    """Attention heads."""
    context: int | None = None
    """Bytes the model sees at once."""
    batch_size: int | None = None
    """Windows in a batch."""
    out: str | None = None
    """Folder of the results (default: runs/race-PRESET)."""
    resume: bool = False
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
