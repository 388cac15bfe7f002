"""Which checks apply to what: a mark on each check, read by `checks_for`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

Check = TypeVar("Check", bound=Callable)


@dataclass(frozen=True)
class Applies:
    """The condition of a check: every tag of `needs`, none of `unless`.

    `two_programs` says that it holds one program of a step beside another, whose roundings differ.
    """

    needs: frozenset[str]
    unless: frozenset[str]
    two_programs: bool = False

    def to(self, tags: frozenset[str]) -> bool:
        """Tell whether the check applies to something with these tags."""
        return self.needs <= tags and not self.unless & tags


def applies(
    needs: Iterable[str] = (), unless: Iterable[str] = (), *, two_programs: bool = False
) -> Callable[[Check], Check]:
    """Mark a check with the tags it needs, those that exclude it, and what it holds together."""
    # A schedule is no transformation: only checks that ask for one are given one.
    needs = frozenset(needs)
    unless = frozenset(unless) | (frozenset() if "schedule" in needs else {"schedule"})

    def mark(check: Check) -> Check:
        check.applies = Applies(needs, unless, two_programs)  # type: ignore[attr-defined]
        return check

    return mark
