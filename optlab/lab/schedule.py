"""`optlab schedule`: a schedule of optlab or optax, drawn in the terminal and as a picture."""

import ast
import difflib
import inspect
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax

from optlab import schedules
from optlab.lab import chart
from optlab.lab.config import BadInput

_SAMPLES = 100_001
_ENDLESS = 10_000  # steps to draw of what names none
_LAST = 2**31 - 2


def known() -> dict[str, Callable[..., optax.Schedule]]:
    """Return every schedule by name, ours before optax's."""
    theirs = {
        name: make
        for name, make in vars(optax.schedules).items()
        if inspect.isfunction(make) and inspect.signature(make).return_annotation == optax.Schedule
    }
    return theirs | {name: getattr(schedules, name) for name in schedules.__all__}


def _evaluate(node: ast.AST) -> Any:
    """Return a literal, a word, or the schedule that a call names; nothing else is run."""
    match node:
        case ast.Name(id=word):
            return word
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_evaluate(element) for element in elements]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            named = {str(word.arg): _evaluate(word.value) for word in keywords}
            return _make(name, *map(_evaluate, args), **named)
    return ast.literal_eval(node)  # type: ignore[arg-type]


def _value(text: str) -> Any:
    if text.startswith("@"):
        return _read(text[1:])
    try:
        return _evaluate(ast.parse(text, mode="eval").body)
    except BadInput:
        raise
    except (SyntaxError, ValueError):
        return text  # a word; who takes it says whether it is a good one


def _read(path: str) -> np.ndarray:
    try:
        return np.load(path) if path.endswith(".npy") else np.loadtxt(path, ndmin=1)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"schedule: @{path} cannot be read ({error}). Save the numbers with numpy.save, or "
            "one on a line."
        ) from None


def _make(name: str, *args: Any, **given: Any) -> optax.Schedule:
    """Call the schedule of that name; a refusal of its arguments is a mistake of the command."""
    table = known()
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise BadInput(
            f"schedule: there is none of that name, got {name!r}.{hint} `optlab schedule` prints "
            "them all."
        )
    try:
        return table[name](*args, **given)
    except (TypeError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())
        raise BadInput(text if text.startswith(name) else f"{name}: {text}") from None


def parse(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Read key=value words: numbers, lists, words, calls of other schedules, @files of numbers."""
    given: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not (equals and key.isidentifier() and text) or key in given:
            twice = " twice" if key in given else ""
            raise BadInput(
                f"schedule: arguments are written key=value, each once, got {argument!r}{twice}. "
                "Write for example peak_value=1e-3 warmup_steps=100."
            )
        given[key] = _value(text)
    return given


def _whole_steps(given: dict[str, Any]) -> int:
    """Return an upper bound of where the arguments say that something happens."""
    steps = [
        value
        for key, value in given.items()
        if isinstance(value, int) and key.endswith(("step", "steps"))
    ]
    lists = [max(given["cycle_ends"])] if "cycle_ends" in given else []
    tables = [len(given["values"])] if "values" in given and "total_steps" not in given else []
    return sum(steps + lists + tables) or _ENDLESS


def sample(schedule: optax.Schedule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return steps from 0 to the last one, all of them where they are few, and the values there."""
    x = np.unique(np.linspace(0, steps, min(_SAMPLES, steps + 1)).astype(np.int32))
    return x, np.broadcast_to(np.asarray(schedule(x), float), x.shape)


def horizon(schedule: optax.Schedule, given: dict[str, Any]) -> int:
    """Return how many steps to draw: until it stays where it is and a tenth more, or for a while.

    A value within a thousandth of the peak counts as the last one.
    """
    bound = min(_whole_steps(given), _LAST // 4)
    x, values = sample(schedule, 2 * bound)
    moving = np.flatnonzero(np.abs(values - values[-1]) > 1e-3 * np.max(np.abs(values)))
    settled = int(x[moving[-1] + 1]) if moving.size else bound
    return 4 * bound if settled > 1.9 * bound else settled + max(1, settled // 10)


def show(name: str, arguments: tuple[str, ...], *, steps: int | None, out: str | None) -> None:
    """Draw a schedule in the terminal, save the picture, and say where it is."""
    if steps is not None and not 1 <= steps <= _LAST:
        raise BadInput(f"schedule: --steps must lie between 1 and 2**31 - 2, got {steps}.")
    given = parse(arguments)
    schedule = _make(name, **given)
    x, values = sample(schedule, steps or horizon(schedule, given))
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if wrong.size:
        raise BadInput(
            f"schedule: values must be finite and >= 0, got {values[wrong[0]]:.3g} at step "
            f"{x[wrong[0]]}. Give {name} other arguments, or fewer --steps."
        )
    path = Path(out or f"runs/schedule-{name}.png")
    write(f"{name}({', '.join(arguments)})", x, values, path)
    size, plain = shutil.get_terminal_size((100, 24)), _speaks_only_ascii()
    print(f"{name} {' '.join(arguments)}".rstrip() + "\n")
    print(chart.draw(x, values, width=min(max(size.columns, 40), 110), height=12, plain=plain))
    top, where = int(np.argmax(values)), "at" if len(x) > x[-1] else "near"
    print(
        f"\n{values[0]:.3g} at step 0, greatest {values[top]:.3g} {where} step {x[top]:,}, "
        f"{values[-1]:.3g} at step {x[-1]:,}. Picture: {path}"
    )


def _speaks_only_ascii() -> bool:
    try:
        "⠿│└─".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return True
    return False


def show_names() -> None:
    """Print every schedule and what it does."""
    for name, make in sorted(known().items(), key=lambda row: row[0] not in schedules.__all__):
        package = "optlab" if name in schedules.__all__ else "optax"
        print(f"{package:7} {name:34} {(make.__doc__ or '').strip().partition(chr(10))[0]}")
    print(
        "\nDraw one, with its arguments, for example:\n"
        "  optlab schedule wsd peak_value=1e-3 warmup_steps=100 stable_steps=700 decay_steps=200"
    )


def write(title: str, x: np.ndarray, values: np.ndarray, path: Path) -> None:
    """Save the picture; what lay there before is replaced when it is whole."""
    from optlab.lab import figure  # matplotlib is slow to import

    plot, axes = figure.plt.subplots(figsize=(10, 5))
    top = float(values.max()) or 1.0
    axes.plot(x, values, color=figure.COLOURS[0], linewidth=2.2, solid_joinstyle="round")
    figure.style(axes, "training steps", (0, 1.06 * top))
    axes.set_xlim(0, x[-1])
    axes.set_ylabel("learning rate", color=figure.INK, fontsize=12)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    lines = textwrap.fill(title, 80, break_on_hyphens=False, max_lines=3, placeholder=" ...")
    axes.set_title(lines, loc="left", color=figure.INK, fontsize=12, fontweight="bold", pad=14)
    beside = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plot.savefig(beside, dpi=160, bbox_inches="tight")
        beside.replace(path)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"schedule: --out cannot be written ({error}). Write a path that ends in .png."
        ) from None
    finally:
        figure.plt.close(plot)
