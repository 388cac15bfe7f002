"""Optimizers and schedules by name: every recipe of optlab, and optax's two baselines."""

import difflib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import optax

from optlab import codecs, quantize_state, recipes, warmup_linear_decay, wsd
from optlab.lab import config as configs
from optlab.lab.config import BadInput, Config
from optlab.lab.rates import RATES


def _wsd(peak: float, warmup: int, steps: int) -> optax.Schedule:
    """Warm up, hold, and spend the last fifth of the run going down to zero."""
    decay = steps // 5
    return wsd(peak, warmup, max(0, steps - warmup - decay), decay)


BASELINES: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "sgd": lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
}
SCHEDULES: dict[str, Callable[[float, int, int], optax.Schedule]] = {
    "constant": lambda peak, warmup, steps: optax.constant_schedule(peak),
    "cosine": lambda peak, warmup, steps: optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup, max(steps, warmup + 1)
    ),
    "warmup_linear_decay": lambda peak, warmup, steps: warmup_linear_decay(
        peak, warmup, max(warmup, steps)
    ),
    "wsd": _wsd,
}

EVERYONE = "all"
CODECS = {"fp8": codecs.fp8(), "int8": codecs.int8(), "int4": codecs.int4()}


def names() -> tuple[str, ...]:
    """Return every name `--optimizers` takes; each can be followed by + and one of `CODECS`."""
    return (*BASELINES, *recipes.__all__)


def asked(items: Iterable[str], command: str = "race") -> tuple[str, ...]:
    """Return the names that `--optimizers` gives: everyone's for all, and no name twice."""
    found = configs.split_names(items, command)
    return names() if found == (EVERYONE,) else found


def nearest(name: str, known: list[str]) -> str:
    """Return a question that ends an error: did you mean this one? Or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_names(
    asked: tuple[str, ...], option: str = "--optimizers", command: str = "race"
) -> None:
    """Refuse a name that is no optimizer, and say the nearest one that is."""
    for name in asked:
        plain, plus, codec = name.partition("+")
        if plain not in names():
            raise BadInput(
                f"{command}: {option} has no optimizer of that name, got {name!r}."
                f"{nearest(plain, list(names()))} `optlab list` prints them all."
            )
        if plus and codec not in CODECS:
            raise BadInput(
                f"{command}: {option} has no codec of that name, got {name!r}. "
                f"Write one of {', '.join(f'{plain}+{known}' for known in CODECS)}."
            )


def check_schedule(name: str) -> None:
    """Refuse a name that is no schedule."""
    if name not in SCHEDULES:
        raise BadInput(
            f"race: --schedule must be one of {', '.join(SCHEDULES)}, got {name!r}."
            f"{nearest(name, list(SCHEDULES))}"
        )


def learning_rates(optimizers: tuple[str, ...], given: dict[str, float]) -> dict[str, float]:
    """Return the rate of each optimizer: the given one, else the recorded sweep's best."""
    rates = {name: RATES.get(name.partition("+")[0]) for name in optimizers} | given
    stray = [name for name in given if name not in optimizers]
    if stray:
        raise BadInput(
            f"race: --lr names an optimizer that does not race, got {stray[0]!r}. "
            f"The race has {', '.join(optimizers)}."
        )
    missing = [name for name in optimizers if rates[name] is None]
    if missing:
        raise BadInput(
            f"race: {missing[0]!r} has no recorded learning rate. Write --lr {missing[0]}=RATE."
        )
    return {name: rate for name in optimizers if (rate := rates[name]) is not None}


def recipe(name: str) -> Callable[..., optax.GradientTransformation]:
    """Return the function of that name, whose first argument is the learning rate."""
    plain, _, codec = name.partition("+")
    found = BASELINES.get(plain) or getattr(recipes, plain)
    return _in_few_bits(found, CODECS[codec]) if codec else found


def _in_few_bits(
    found: Callable[..., optax.GradientTransformation], codec: codecs.Codec
) -> Callable[..., optax.GradientTransformation]:
    """Return the recipe with its moments kept by a codec."""

    @functools.wraps(found)
    def make(*args: Any, **arguments: Any) -> optax.GradientTransformation:
        return quantize_state(found(*args, **arguments), codec)

    return make


def make(
    name: str, schedule: optax.Schedule, **arguments: Any
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation of that name, all but its rate and these arguments at default."""
    return optax.with_extra_args_support(recipe(name)(schedule, **arguments))


def build(name: str, config: Config) -> optax.GradientTransformationExtraArgs:
    """Return the transformation of that name with the race's rate and schedule."""
    peak = config.learning_rates[name]
    return make(name, SCHEDULES[config.schedule](peak, config.warmup_steps, config.steps))
