"""What each scheme costs one device, and which one is the cheapest for a number of matrices."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from optlab.distributed.buckets import Group
from optlab.linalg.polar import NewtonSchulz, PolarFn

SCHEMES = ("local", "split", "all_to_all", "gram", "hybrid")


class Collective(NamedTuple):
    """One kind of collective of a step: how many, and the bytes that arrive in all of them."""

    kind: str
    count: int
    nbytes: int


class Step(NamedTuple):
    """A run of matrices [start, stop) of a stack, and how they are processed."""

    scheme: str
    start: int
    stop: int
    parts: int  # devices that work on one matrix together
    replicas: int  # devices holding the same that share the work
    scatter: bool  # Gram matrices are spread over the devices of a matrix
    flops: int  # of products, on one device
    collectives: tuple[Collective, ...]
    busy: float  # share of the devices that have work

    @property
    def nbytes(self) -> int:
        """Bytes that arrive on one device."""
        return sum(c.nbytes for c in self.collectives)

    @property
    def calls(self) -> int:
        """Collectives issued."""
        return sum(c.count for c in self.collectives)


class Costs(NamedTuple):
    """What a machine gets done in the time of one byte from another device."""

    flops_per_byte: float = 1500.0  # v5e about 2000, an H200 with NVLink about 1000
    bytes_per_call: float = 100_000.0  # a microsecond of latency

    def of(self, step: Step) -> float:
        """Return the time of a step, in bytes."""
        return step.flops / self.flops_per_byte + step.nbytes + step.calls * self.bytes_per_call


class Work(NamedTuple):
    """What a group asks for: the size of its matrices, their place, and the price of each."""

    rows: int
    cols: int
    shards: int
    replicas: int
    long_shards: int  # of the shards, those along the long side
    itemsize: int  # of what travels
    gram_itemsize: int
    polar: PolarFn
    dtype: Any
    returns_matrices: bool = True

    @property
    def flops(self) -> int:
        """FLOPs of one whole matrix; of an unknown function, five direct steps."""
        if isinstance(self.polar, NewtonSchulz):
            return self.polar.flops(self.rows, self.cols, self.dtype)
        n, m = sorted((self.rows, self.cols))
        return 20 * m * n * n + 10 * n**3

    @property
    def size(self) -> int:
        """Bytes of one matrix that travels."""
        return self.rows * self.cols * self.itemsize


def work_of(group: Group, polar: PolarFn, itemsize: int, *, returns_matrices: bool = True) -> Work:
    """Return what a group asks for."""
    rows, cols, first, second = group.sides
    long_axes = first if rows > cols else second
    dtype = polar.compute_dtype(group.blocks[0].dtype) if isinstance(polar, NewtonSchulz) else None
    return Work(
        rows,
        cols,
        group.shards,
        group.replicas,
        group.placement.size(long_axes) if group.placement else 1,
        itemsize,
        max(dtype.itemsize, 4) if dtype is not None else 4,
        polar,
        dtype,
        returns_matrices,
    )


def choose(work: Work, count: int, scheme: str, costs: Costs) -> tuple[Step, ...]:
    """Return the cheapest steps for `count` matrices: one, or full rounds and a leftover.

    With a named scheme, the cheapest of its forms where it can run at all.
    """
    plans = [(step,) for step in candidates(work, 0, count)]
    full = count - count % work.shards
    if 0 < full < count:
        # The form with the replicas would need full rounds of its own.
        first = next(s for s in candidates(work, 0, full) if s.scheme == "all_to_all")
        plans += [(first, rest) for rest in candidates(work, full, count)]
    named = [p for p in plans if p[-1].scheme == scheme]
    return min(named or plans, key=lambda steps: sum(costs.of(s) for s in steps))


def candidates(work: Work, start: int, stop: int) -> Iterator[Step]:
    """Yield every form of every scheme that can process these matrices."""
    if work.shards == 1:
        yield _whole(work, "local", start, stop, replicas=1)
        if work.replicas > 1:
            yield _whole(work, "split", start, stop, replicas=work.replicas)
        return
    for replicas in {1, work.replicas}:
        yield _whole(work, "all_to_all", start, stop, replicas=replicas)
    if isinstance(work.polar, NewtonSchulz) and work.returns_matrices:
        yield from _in_parts(work, start, stop)


def _whole(work: Work, scheme: str, start: int, stop: int, *, replicas: int) -> Step:
    """Every device gets whole matrices: ceil(L / devices) of them, the last ones padded."""
    devices = work.shards * replicas
    each = math.ceil((stop - start) / devices)
    collectives, split, whole = [], work.shards > 1, work.returns_matrices
    if split:
        collectives.append(Collective("all-to-all", 1 + whole, (1 + whole) * each * work.size))
    if whole and replicas > 1:
        back = each * replicas * work.size
        collectives.append(Collective("all-gather", 1, back))
    if not whole and devices > 1:  # one number per matrix
        back = 4 * each * (work.shards * split + devices * (replicas > 1))
        collectives.append(Collective("all-gather", split + (replicas > 1), back))
    return Step(
        scheme,
        start,
        stop,
        1,
        replicas,
        False,
        each * work.flops,
        tuple(collectives),
        1.0 if scheme == "local" else (stop - start) / (each * devices),
    )


def _in_parts(work: Work, start: int, stop: int) -> Iterator[Step]:
    """Yield the schemes in which the long side of a matrix is spread over several devices."""
    n, m = sorted((work.rows, work.cols))
    for parts in _divisors(work.shards):
        stays = parts == work.shards and work.long_shards == work.shards
        if parts == 1 or (not stays and (m // work.long_shards) % parts):
            continue
        yield _parts(work, start, stop, n, parts, stays, scatter=False)
        if stop - start > 1:
            yield _parts(work, start, stop, n, parts, stays, scatter=True)


def _parts(
    work: Work, start: int, stop: int, n: int, parts: int, stays: bool, *, scatter: bool
) -> Step:
    teams = work.shards // parts
    each = math.ceil((stop - start) / teams)
    padded = math.ceil(each / parts) * parts if scatter else each
    phases = len(work.polar.phases(work.dtype))  # type: ignore[attr-defined]
    tall, cubic = work.polar.gram_flops(work.rows, work.cols, work.dtype)  # type: ignore[attr-defined]
    gram = n * n * work.gram_itemsize
    collectives = []
    if not stays:
        moved = 2 * padded * teams * work.size // work.shards
        collectives.append(Collective("all-to-all", 2, moved))
    if scatter:
        collectives.append(Collective("reduce-scatter", phases, phases * padded // parts * gram))
        collectives.append(Collective("all-gather", phases, phases * padded * gram))
    else:
        collectives.append(Collective("all-reduce", phases, phases * padded * gram))
    return Step(
        "gram" if teams == 1 else "hybrid",
        start,
        stop,
        parts,
        1,
        scatter,
        padded * tall // parts + padded * cubic // (parts if scatter else 1),
        tuple(collectives),
        (stop - start) / (each * teams),
    )


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]
