"""The largest entries of several arrays together, found by counting: nothing is sorted or moved."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def _count(flags: Sequence[jax.Array]) -> jax.Array:
    """Return the number of True of each array, int32."""
    return jnp.stack([jnp.sum(f, dtype=jnp.int32) for f in flags])


def _places(shape: tuple[int, ...]) -> jax.Array:
    """Number the entries of an array in C order."""
    place = jnp.zeros(shape, jnp.int32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :])
        place += stride * jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return place


def _threshold(words: Sequence[jax.Array], k: int) -> jax.Array:
    """Return the k-th largest of all words, by bisection."""
    above = jnp.max(jnp.stack([jnp.max(w) for w in words])) + 1

    def halve(_, ends):
        low, high = ends  # at least k words reach low, fewer than k reach high
        middle = low + (high - low) // 2
        enough = jnp.sum(_count([w >= middle for w in words])) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # What starts from data varies over the devices of a shard_map as the loop's results do.
    ends = jax.lax.fori_loop(0, 8 * words[0].dtype.itemsize, halve, (above - above, above))
    return ends[0]


def _first(flags: Sequence[jax.Array], number: jax.Array) -> list[jax.Array]:
    """Keep the first `number` of all flags that are True, array by array in C order."""
    places, count = [_places(f.shape) for f in flags], _count(flags)
    wanted = jnp.clip(number - (jnp.cumsum(count) - count), 0, count)
    sizes = jnp.asarray([f.size for f in flags], jnp.int32)
    # Arrays that keep all or none, nearly always every one of them, need no search.
    high = jnp.where(wanted == 0, 0, sizes)
    low = jnp.where((wanted == 0) | (wanted == count), high, 0)

    def before(ends):
        return [f & (p < ends[i]) for i, (f, p) in enumerate(zip(flags, places, strict=True))]

    def halve(ends):
        low, high = ends  # fewer than wanted lie before low, as many lie before high
        middle = low + (high - low) // 2
        enough = _count(before(middle)) >= wanted
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    searching = lambda ends: jnp.any(ends[1] - ends[0] > 1)  # noqa: E731
    return before(jax.lax.while_loop(searching, halve, (low, high))[1])


def largest_entries(scores: Sequence[jax.Array], k: int) -> list[jax.Array]:
    """Return which entries are the k largest of all arrays: a bool array for each; ties: the first.

    Scores are >= 0; a NaN counts as larger than anything. 32 passes over the scores (64 in
    float64) that compare and sum, and up to 32 more where a tie is cut through: on a mesh one
    sum of scalars each. Fewer than 2^31 entries in all.
    """
    dtype = jnp.result_type(jnp.float32, *scores)
    word = jnp.uint64 if dtype == jnp.float64 else jnp.uint32
    # Floats that are not negative have the order of their bit patterns.
    words = [jax.lax.bitcast_convert_type(jnp.abs(s.astype(dtype)), word) for s in scores]
    words = [w for w in words if w.size]
    if k >= sum(w.size for w in words):
        chosen = [w >= 0 for w in words]
    else:
        low = _threshold(words, k)
        above = [w > low for w in words]
        ties = _first([w == low for w in words], k - jnp.sum(_count(above)))
        chosen = [a | t for a, t in zip(above, ties, strict=True)]
    found = iter(chosen)
    return [next(found) if s.size else jnp.zeros(s.shape, bool) for s in scores]
