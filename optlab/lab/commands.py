"""What the command line takes, and what it calls."""

import dataclasses
import shlex
import sys
from typing import Annotated, Any

import tyro

from optlab.lab import benchmark, catalog, config, memory, optimizers, race, schedule, study

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
_OF_STUDY = ("trials", "seeds", "targets")
_NOT_OF_CONFIG = ("out", "resume", "optimizers", "lr", "benchmark", "report")


@dataclasses.dataclass(frozen=True)
class Race:
    """Train the same small network with several optimizers side by side and show who wins."""

    workload: Word = None
    """gpt (default), digits (a convolution) or rows (a GRU); a study has all, or NAME,NAME."""
    preset: Word = None
    """quick (default: under 3 minutes on 2 CPU cores), small or medium."""
    optimizers: Annotated[Repeated, tyro.conf.arg(metavar="NAME,NAME", help_behavior_hint="")] = ()
    """Who races, or all; repeatable. `optlab list` prints the names; adamw and sgd are optax's."""
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
    """Transformer blocks, convolutions or GRUs, instead of the preset's."""
    width: Whole = None
    """Width of a layer, instead of the preset's."""
    heads: Whole = None
    """Attention heads, instead of the preset's."""
    context: Whole = None
    """Bytes the model sees at once, instead of the preset's."""
    batch_size: Whole = None
    """Windows or images in a batch, instead of the preset's."""
    out: Path = None
    """Folder of the results (default: runs/race-PRESET, runs/benchmark)."""
    resume: Annotated[bool, Plain] = False
    """Continue the race or the study saved in that folder."""
    benchmark: Annotated[bool, Plain] = False
    """A study instead: everyone tuned alike on every workload, seeds, targets (runs/benchmark)."""
    trials: Whole = None
    """Trials of a study to tune each optimizer (default 10)."""
    seeds: Whole = None
    """Seeds of a study to train with after that (default 3)."""
    targets: Path = None
    """Targets and sizes of a study from a file (default: the frozen ones)."""
    report: Annotated[bool, Plain] = False
    """Train nothing: write the page of the race or the study in the folder, report.html."""

    def asked(self) -> dict[str, Any]:
        """Return what was given, in the words of `Config`."""
        fields = dataclasses.asdict(self)
        for name in (*_NOT_OF_CONFIG, *_OF_STUDY):
            del fields[name]
        self._refuse(_OF_STUDY, "needs --benchmark, got it without. Add that, or leave it out.")
        given = {name: value for name, value in fields.items() if value is not None}
        if self.optimizers:
            given["optimizers"] = optimizers.asked(self.optimizers)
        if self.lr:
            given["learning_rates"] = config.parse_rates(self.lr)
        return given

    def plan(self) -> study.Plan:
        """Return the study that was asked for."""
        taken = {*_NOT_OF_CONFIG, *_OF_STUDY, "workload"} - {"lr"}
        others = tuple(f.name for f in dataclasses.fields(self) if f.name not in taken)
        self._refuse(
            others, "is fixed in a study, got it with --benchmark. Leave it out, or use --targets."
        )
        return benchmark.new_plan(
            optimizers.asked(self.optimizers) if self.optimizers else (),
            tuple(self.workload.split(",")) if self.workload else (),
            trials=self.trials,
            seeds=self.seeds,
            path=self.targets,
        )

    def _refuse(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            if getattr(self, name) not in (None, False, ()):
                raise config.BadInput(f"race: --{name.replace('_', '-')} {why}")

    def run(self) -> None:
        """Race, study, or write the page of what is there."""
        if self.report:
            studied = benchmark.folder(self.out)
            raced = race.folder(self.out, self.preset, self.workload)
            path = benchmark.write_page(studied if self.benchmark else raced)
            print(f"Written to {path}")
        elif self.benchmark:
            benchmark.run(self.plan(), out=self.out, resume=self.resume)
        else:
            race.run(self.asked(), out=self.out, resume=self.resume)


@dataclasses.dataclass(frozen=True)
class List:
    """Print the catalogue: optimizers, and all that they are made of."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Print the bytes of each optimizer's state for a model or a file; nothing is allocated."""

    model: Word = None
    """llama-60m, -130m, -350m, -1b, -7b, -13b, -70b, gpt2, -medium, -large, -xl, vit-b or vit-l."""
    file: Path = None
    """Parameters or their shapes: .pkl (its code is run), .npz, .safetensors, orbax checkpoint."""
    optimizers: Annotated[Repeated, tyro.conf.arg(metavar="NAME,NAME", help_behavior_hint="")] = ()
    """Whose state (default: everyone's); repeatable. `optlab list` prints the names."""
    rank: Whole = None
    """Rank of the low-rank recipes (default: a quarter of the model's width; a file: theirs)."""
    dtype: Word = None
    """Of the parameters: float32 (default of a model), bfloat16 or float16."""
    stacked: Annotated[bool, Plain] = False
    """A model's layers in one leaf, as `scan` wants them."""
    subtree: Path = None
    """Only what lies below this path in the file, such as params."""
    layout: Word = None
    """How a file's leaves are read: flax (default), per_head, by_ndim or output_first."""

    def subject(self) -> memory.Subject:
        """Return the parameters asked for."""
        if self.rank is not None and self.rank < 1:
            raise config.BadInput(f"memory: --rank must be at least 1, got {self.rank}.")
        if (self.model is None) == (self.file is None):
            raise config.BadInput(
                f"memory: give --model or --file, got {'both' if self.model else 'neither'}. "
                "Write for example --model llama-7b."
            )
        if self.model is not None:
            self._refuse("--file", subtree=self.subtree, layout=self.layout)
            return memory.of_model(
                self.model, dtype=self.dtype, stacked=self.stacked, rank=self.rank
            )
        self._refuse("--model", stacked=self.stacked)
        return memory.of_file(
            str(self.file),
            dtype=self.dtype,
            subtree=self.subtree,
            policy=self.layout,
            rank=self.rank,
        )

    def _refuse(self, other: str, **given: Any) -> None:
        for name, value in given.items():
            if value:
                raise config.BadInput(
                    f"memory: --{name} belongs to {other}, got it without. Leave it out."
                )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Draw a learning-rate schedule in the terminal and as a picture; without NAME list them."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME"), Plain] = ""
    """A schedule of optlab, such as wsd, or of optax."""
    arguments: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE ..."), Plain
    ] = ()
    """Its arguments: numbers, words, lists, calls of other schedules, @FILE of numbers."""
    steps: Whole = None
    """Draw so many steps (default: until the value stays, and a tenth more)."""
    out: Path = None
    """Where the picture goes (default: runs/schedule-NAME.png)."""


def run(argv: list[str]) -> int:
    """Do what the command line says and return the exit code."""
    options = tyro.cli(
        Race | List | Memory | Schedule,
        prog="optlab",
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    match options:
        case List():
            catalog.show()
            return 0
        case Memory():
            names = optimizers.asked(options.optimizers, "memory") if options.optimizers else ()
            memory.show(options.subject(), names)
            return 0
        case Schedule(name=""):
            schedule.show_names()
            return 0
        case Schedule():
            schedule.show(options.name, options.arguments, steps=options.steps, out=options.out)
            return 0
        case Race():
            return _race(options, argv)


def _race(options: Race, argv: list[str]) -> int:
    try:
        options.run()
    except race.Interrupted:
        again = argv if "--resume" in argv else [*argv, "--resume"]
        print(f"Saved. To go on: {shlex.join(['optlab', *again])}", file=sys.stderr)
        return 130
    return 0
