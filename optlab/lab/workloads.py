"""The workloads of the race in words and sizes; data.py has their data, model.py their networks."""

import dataclasses
from collections.abc import Mapping

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Something to learn, and what says how well it was learned."""

    does: str  # the title of its picture; {text} is what it reads
    network: str
    measure: str  # what is compared: always a loss on what is held out, with its unit
    token: str  # what a step is counted in
    presets: Mapping[str, Sizes]
    without: tuple[str, ...] = ()  # sizes that mean nothing here: they cannot be asked for
    own_text: bool = False


# quick: 22 ms a step of AdamW on two CPU cores; small: some five times that, on three times the
# weights. medium is for accelerators.
_GPT: dict[str, Sizes] = {
    "quick": {
        "steps": 1000,
        "layers": 3,
        "width": 128,
        "heads": 4,
        "context": 64,
        "batch_size": 16,
        "rounds": 20,
        "eval_windows": 256,
    },
    "small": {
        "steps": 2000,
        "layers": 4,
        "width": 192,
        "heads": 4,
        "context": 128,
        "batch_size": 8,
        "rounds": 20,
        "eval_windows": 512,
    },
    "medium": {
        "steps": 5000,
        "layers": 8,
        "width": 512,
        "heads": 8,
        "context": 256,
        "batch_size": 64,
        "rounds": 50,
        "eval_windows": 1024,
    },
}
# Some 4 ms a step on two CPU cores. All of the images held out, but for what fills no batch.
_DIGITS: Sizes = {
    "steps": 300,
    "layers": 2,
    "width": 32,
    "heads": 1,
    "context": 1,
    "batch_size": 64,
    "rounds": 20,
    "eval_windows": 576,
}

WORKLOADS: dict[str, Workload] = {
    "gpt": Workload(
        does="Learning to write {text}",
        network="Byte-level GPT",
        measure="held-out loss, nats per byte",
        token="bytes",
        presets=_GPT,
        own_text=True,
    ),
    "digits": Workload(
        does="Telling {text} apart",
        network="Convolutional net",
        # Of 576 images an error is too coarse: seeds of one optimizer had 6 to 14 of them wrong.
        measure="held-out loss, nats per image",
        token="images",
        presets={"quick": _DIGITS},
        without=("heads", "context"),
    ),
    "rows": Workload(
        does="Drawing {text} row by row",
        network="GRU",
        measure="held-out loss, nats per pixel",
        token="pixels",
        presets={"quick": {**_DIGITS, "steps": 600, "layers": 1, "width": 96, "context": 64}},
        without=("heads", "context"),
    ),
}
