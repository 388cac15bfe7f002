"""Counts in the text of a compiled program."""

import re
from collections import Counter

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
_COLLECTIVE = re.compile(r"^(all-|reduce-scatter|collective-|ragged-all).*(?<!-done)$")


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


def launched(text: str) -> Counter[str]:
    """Return the opcodes run from the entry and from the computations that it calls.

    The body of a loop counts once, the branches of a conditional all.
    """
    computations, entry = _computations(text)
    found: Counter[str] = Counter()

    def walk(name: str) -> None:
        for line in computations[name]:
            match = _OPCODE.search(line)
            if not match:
                raise ValueError(f"hlo: no opcode in {line.strip()[:200]!r}. Adapt _OPCODE.")
            opcode = match[1]
            found[opcode] += 1
            if opcode in _CONTROL:
                for single, several in _CALLED.findall(line):
                    for called in (single or several).split(","):
                        walk(called.strip().lstrip("%"))

    walk(entry)
    return found


def kernels(text: str) -> int:
    """Return the kernels launched: fusions, custom calls, copies, reductions."""
    return sum(n for opcode, n in launched(text).items() if opcode not in _FREE)


def collectives(text: str) -> int:
    """Return the collectives, each counted where it starts."""
    return sum(n for opcode, n in launched(text).items() if _COLLECTIVE.match(opcode))
