"""Counts in the text of a compiled program."""

import math
import re
from collections import Counter
from collections.abc import Iterator

# Types have brackets of all kinds and spaces only inside them, as after the commas of a tuple.
_OPCODE = re.compile(r"[)}\]] ([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"(?:to_apply|body|condition|calls|true_computation|false_computation)=%([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
# What starts nothing on the device, or was counted where it started.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "call", "conditional",
    "while", "after-all", "partition-id", "replica-id", "opt-barrier", "copy-done", "async-done",
    "async-update",
}  # fmt: skip
_CONTROL = {"call", "conditional", "while", "async-start"}
# A pair of -start and -done counts at its end, whose type is that of the result alone.
_COLLECTIVE = re.compile(
    r"^(all-gather|all-reduce|all-to-all|reduce-scatter|ragged-all-to-all|collective-[a-z]+)"
    r"(?:-done)?$"
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
# A TPU spreads a collective over several fusions, with one number for all of them.
_CHAIN = re.compile(r'chain_id="(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        if line.endswith("{") and line[:1] in ("%", "E"):
            words = line.split()
            current = words[words[0] == "ENTRY"].lstrip("%").split("(")[0]
            computations[current] = []
            entry = current if words[0] == "ENTRY" else entry
        elif current and " = " in line:
            computations[current].append(line)
    return computations, entry


def instructions(text: str) -> int:
    """Return the number of instructions, those inside fusions too."""
    return text.count(" = ")


def _walk(text: str, into: set[str]) -> Iterator[tuple[str, str, int]]:
    """Yield what runs in the entry and in what the opcodes `into` call: opcode, line, how often."""
    computations, entry = _computations(text)
    pending = [(entry, 1)]
    while pending:
        name, times = pending.pop()
        for line in computations[name]:
            match = _OPCODE.search(line)
            if not match:
                raise ValueError(f"hlo: no opcode in {line.strip()[:200]!r}. Adapt _OPCODE.")
            yield match[1], line, times
            if match[1] in into:
                trips = _TRIPS.search(line) if match[1] == "while" else None
                inside = times * int(trips[1]) if trips else times
                for single, several in _CALLED.findall(line):
                    called = (single or several).split(",")
                    pending += [(name.strip().lstrip("%"), inside) for name in called]


def launched(text: str) -> Counter[str]:
    """Return the opcodes run from the entry and from the computations that it calls.

    The body of a loop counts as often as the text says that it runs, which a GPU's does and a TPU's
    does not: then once. The branches of a conditional count all.
    """
    found: Counter[str] = Counter()
    for opcode, _, times in _walk(text, _CONTROL):
        found[opcode] += times
    return found


def kernels(text: str) -> int:
    """Return the kernels launched: fusions, custom calls, copies, reductions."""
    return sum(n for opcode, n in launched(text).items() if opcode not in _FREE)


def collectives(text: str) -> int:
    """Return the number of collectives, each counted once."""
    return collective_counts(text).total()


def collective_counts(text: str) -> Counter[str]:
    """Return the number of collectives of each kind."""
    found: Counter[str] = Counter()
    for kind, _, times in _collectives(text):
        found[kind] += times
    return found


def collective_bytes(text: str, itemsize: int | None = None) -> Counter[str]:
    """Return the bytes that collectives of each kind give to one device.

    With `itemsize` as many as they would be if every element had that size.
    """
    bits = itemsize and str(8 * itemsize)
    found: Counter[str] = Counter()
    for kind, result, times in _collectives(text):
        arrays = _ARRAY.findall(result)
        found[kind] += times * sum(_nbytes(bits or own, dims) for own, dims in arrays)
    return found


def collective_arrays(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """Return kind and shape of every array that a collective gives to one device."""
    return {
        (kind, tuple(int(n) for n in dims.split(",") if n))
        for kind, result, _ in _collectives(text)
        for _, dims in _ARRAY.findall(result)
    }


def named(counts: Counter[str]) -> str:
    """Return "2 all-to-all" for {"all-to-all": 2}."""
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "none"


def _collectives(text: str) -> Iterator[tuple[str, str, int]]:
    """Yield kind and type of the result of each collective, and how often it runs."""
    chains = set()
    for opcode, line, times in _walk(text, _CONTROL | {"fusion"}):
        kind, chain = _COLLECTIVE.match(opcode), _CHAIN.search(line)
        if kind and (chain is None or chain[1] not in chains):
            chains.add(chain and chain[1])
            result, _, _ = line.partition(" = ")[2].partition(f" {opcode}(")
            yield kind[1], result, times


def _nbytes(bits: str, dims: str) -> int:
    return math.prod(int(n) for n in dims.split(",") if n) * int(bits or 8) // 8
