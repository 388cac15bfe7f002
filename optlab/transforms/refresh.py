"""When the subspaces of `in_low_rank` are found anew, and the loop that finds the due ones."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from optlab import _checks, _leafwise
from optlab.distributed.shardings import partitioned
from optlab.linalg import subspace
from optlab.transforms.lens import (
    Kept,
    Lens,
    opened_for,
    oriented,
    placed_everywhere,
    turnable,
)
from optlab.transforms.projection import Bucket, Reading
from optlab.transforms.subspace import Projector

Measure = Callable[[jax.Array, jax.Array], jax.Array]


class LazyState(NamedTuple):
    """State of `lazy_refresh`."""

    longer: jax.Array  # int32, (sides,): how often the interval was made longer
    shares: jax.Array  # float32, (sides, queue): the last overlaps, newest first
    seen: jax.Array  # int32, (sides,): overlaps so far

    def metrics(self) -> dict[str, jax.Array]:
        """Return how often intervals grew, per side."""
        return {"interval_growths": jnp.sum(self.longer) / max(self.longer.size, 1)}


@dataclasses.dataclass(frozen=True)
class Refresh:
    """Every side at each multiple of `every`; the rule of a number given for `every`."""

    every: int
    measure: Measure = subspace.overlap

    def init(self, sides: int) -> Any:
        """Return the rule's state."""
        del sides
        return ()

    def due(self, state: Any, count: jax.Array, offsets: np.ndarray) -> jax.Array:
        """Return which sides are due at step `count`, from 0."""
        del state
        return (count + offsets) % self.every == 0

    def learn(self, state: Any, due: jax.Array, again: jax.Array, overlap: jax.Array) -> Any:
        """Return the state after a step; `again` are sides found now and before."""
        del due, again, overlap
        return state


@dataclasses.dataclass(frozen=True)
class _Lazy(Refresh):
    threshold: float = 0.4
    queue: int = 5
    growth: float = 2.0

    def init(self, sides):
        return LazyState(
            jnp.zeros((sides,), jnp.int32),
            jnp.zeros((sides, self.queue), jnp.float32),
            jnp.zeros((sides,), jnp.int32),
        )

    def due(self, state, count, offsets):
        interval = self.every * self.growth ** state.longer.astype(jnp.float32)
        return (count + offsets) % jnp.minimum(interval, 2.0**30).astype(jnp.int32) == 0

    def learn(self, state, due, again, overlap):
        pushed = jnp.concatenate([overlap[:, None], state.shares[:, :-1]], axis=1)
        shares = jnp.where(again[:, None], pushed, state.shares)
        seen = state.seen + again
        calm = again & (seen >= self.queue) & (jnp.mean(shares, axis=1) >= self.threshold)
        return LazyState(state.longer + calm, shares, seen)


def _first_vectors(new: jax.Array, old: jax.Array) -> jax.Array:
    """Return the cosine of the first basis vectors."""
    a, b = new[..., 0].astype(jnp.float32), old[..., 0].astype(jnp.float32)
    size = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, -1) / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)


@_checks.explain_calls
def lazy_refresh(
    every: int = 200,
    *,
    threshold: float = 0.4,
    queue: int = 5,
    growth: float = 2.0,
    official: bool = False,
) -> Refresh:
    """Refresh a side the more seldom, the less its subspace changes (Q-GaLore).

    At each refresh but the first, the overlap of the new subspace with the old one is remembered.
    While the mean of the last `queue` is at least `threshold`, every refresh makes the side's
    interval `growth` times as long.

    Args:
      every: steps between refreshes at first, >= 1.
      threshold: of the mean overlap, in [0, 1], or of the cosine, in [-1, 1]; above 1 never.
      queue: overlaps remembered, >= 1.
      growth: factor of the interval, >= 1.
      official: compare the first basis vectors only, by their cosine, as the released code does.

    Returns:
      A rule for `in_low_rank(every=...)`; it keeps 4 (queue + 2) bytes per projected side.

    Example:
      >>> import optax, optlab
      >>> tx = optlab.in_low_rank(optax.scale_by_adam(), every=optlab.lazy_refresh(200))

    References:
      Zhang et al., Q-GaLore, arXiv:2407.08296, 2024; code: VITA-Group/Q-GaLore at 5bd2f1c.
    """
    name = "lazy_refresh"
    _checks.check_steps(name, 1, every=every, queue=queue)
    accept = lambda x: -1 <= x <= 2  # noqa: E731
    _checks.check_range(name, "a number in [-1, 2]", accept, threshold=threshold)
    _checks.check_range(name, "a number >= 1", lambda x: 1 <= x < float("inf"), growth=growth)
    measure = _first_vectors if official else subspace.overlap
    return _Lazy(every, measure, float(threshold), queue, float(growth))


def _visit(
    bucket: Bucket,
    projector: Projector,
    measure: Measure,
    key: jax.Array,
    place: jax.Array,
    x: jax.Array,
    due: jax.Array,
    kept: Kept,
) -> Kept:
    """Find the subspaces of one side's matrices x, where they are due and x is good for it."""
    old, found = (jax.tree.map(lambda s: s[place], tree) for tree in (kept.basis, kept.found))
    size = jnp.max(jnp.abs(x), axis=(-2, -1), initial=0)
    first = found == 0
    todo = (due | first) & jnp.isfinite(size) & (size > 0)

    def find():
        # Squares of 1e30 and of 1e-30 leave float32.
        unit = jnp.where(_beside(todo, x), x / _beside(jnp.where(todo, size, 1), x), 0)
        new = projector.find(unit, old, bucket.rank, key, first)
        bases = (projector.basis(s, bucket.size, bucket.rank) for s in (new, old))
        choose = lambda n, o: jnp.where(_beside(todo, n), n, o).astype(o.dtype)  # noqa: E731
        chosen = jax.tree.map(choose, new, old)
        return chosen, measure(*bases).astype(jnp.float32)

    def keep():
        return old, kept.overlap[place]

    new, overlap = jax.lax.cond(jnp.any(todo), find, keep)
    put = lambda stack, value: jax.lax.dynamic_update_index_in_dim(stack, value, place, 0)  # noqa: E731
    again = jnp.where(todo & ~first, overlap, kept.overlap[place])
    return Kept(
        jax.tree.map(put, kept.basis, new),
        put(kept.found, found + todo),
        put(kept.overlap, again),
    )


def _beside(mask: jax.Array, like: jax.Array) -> jax.Array:
    return mask.reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))


def _varying_as(tree: Any, leaves: Sequence[Any]) -> Any:
    """Return the tree, to a surrounding `shard_map` as different on every device as the leaves."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    varying = frozenset().union(*(_varying(x) for x in leaves if x is not None))
    cast = lambda x: jax.lax.pcast(x, tuple(varying - _varying(x)), to="varying")  # noqa: E731
    return jax.tree.map(cast, tree)


def _varying(x: jax.Array) -> frozenset[str]:
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def refreshed(
    lens: Lens,
    leaves: Sequence[jax.Array | None],
    due: jax.Array,
    key: jax.Array,
    measure: Measure = subspace.overlap,
) -> Lens:
    """Return the lens after the due subspaces were found in `leaves`, the projected ones.

    A side whose matrix is zero or not finite keeps what it has, and is tried again at every step if
    it has nothing yet. Sides are visited one at a time: one matrix is copied, one computation
    compiled per bucket, and nothing done where none is due.
    """
    if not lens.reading.buckets:
        return lens
    out, start = [], 0
    for bucket, mine in zip(lens.reading.buckets, lens.kept, strict=True):
        stop = start + len(bucket.members)
        visit = _Loop(lens.reading, bucket, lens.projector, measure)
        here = [leaves[low] for low, _ in bucket.members]
        spec = jax.tree.map(lambda _: PartitionSpec(), mine)
        first = lens.reading.lows[bucket.members[0][0]]
        out.append(
            placed_everywhere(partitioned(visit, spec, mine, due[start:stop], key, *here), first)
            if any(x is not None for x in here)
            else mine
        )
        start = stop
    return dataclasses.replace(lens, kept=tuple(out))


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The loop over the sides of one bucket."""

    reading: Reading
    bucket: Bucket
    projector: Projector
    measure: Measure

    def __call__(self, kept: Kept, due: jax.Array, key: jax.Array, *leaves: Any) -> Kept:
        present = np.array([x is not None for x in leaves])
        wanted = due | jnp.any(kept.found == 0, axis=tuple(range(1, kept.found.ndim)))
        wanted = wanted & present
        order = jnp.argsort(~wanted)
        pairs = zip(self.bucket.members, leaves, strict=True)
        branches = [self._branch(*pair) for pair in pairs]
        # Of the leaf, not of the bucket: leaves that lie otherwise are in other buckets.
        names = np.array([2 * low + s for low, s in self.bucket.members])

        def body(i, kept):
            place = order[i]
            x = jax.lax.switch(place, branches)
            mine = jax.random.fold_in(key, jnp.asarray(names)[place])
            return _visit(
                self.bucket, self.projector, self.measure, mine, place, x, due[place], kept
            )

        return jax.lax.fori_loop(0, jnp.sum(wanted), body, _varying_as(kept, leaves))

    def _branch(self, member: tuple[int, int], leaf: jax.Array | None) -> Callable[[], jax.Array]:
        low = self.reading.lows[member[0]]
        side = low.sides[member[1]]

        def matrices() -> jax.Array:
            if leaf is None:
                return jnp.zeros(self._shape(low, side), _leafwise.widen(self.bucket.dtype))
            x = turnable(opened_for(low, leaf), low, side)
            return oriented(x.astype(_leafwise.widen(leaf.dtype)), side)

        return matrices

    def _shape(self, low: Any, side: Any) -> tuple[int, ...]:
        m, n = low.view.dims(low.shape)
        return (*self.bucket.batch, side.size, n if side.name == "rows" else m)
