"""A bar on the terminal for long work inside a compiled program; silent unless asked for."""

import contextlib
from collections.abc import Callable, Iterator

import jax

_RUNNING: list[Callable[[], None]] = []


def tick(after: object) -> None:
    """Move the bar that is shown by one, once `after` is known; for `jax.debug.callback`."""
    del after
    if _RUNNING:
        _RUNNING[-1]()


@contextlib.contextmanager
def bar(show: bool, name: str, total: int) -> Iterator[None]:
    """Show a bar of `total` ticks while the body runs."""
    if not show:
        yield
        return
    try:
        from rich import progress
    except ImportError:
        raise ImportError(f"{name}: progress needs rich. pip install rich") from None
    columns = (progress.TextColumn(name), progress.BarColumn(), progress.MofNCompleteColumn())
    with progress.Progress(*columns, progress.TimeRemainingColumn()) as shown:
        task = shown.add_task(name, total=total)
        _RUNNING.append(lambda: shown.advance(task))
        try:
            yield
            jax.effects_barrier()  # the last ticks may still be on their way
        finally:
            _RUNNING.pop()
