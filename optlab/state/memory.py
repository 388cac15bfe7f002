"""Bytes of optimizer state from shapes: `tx.init` is traced, nothing is computed or allocated."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optlab.linalg import codecs
from optlab.transforms.quantize import quantize_state


class StateField(NamedTuple):
    """What one field of one state class holds, summed over the tree."""

    owner: str  # innermost NamedTuple class around the arrays, as `describe` names it; may be ""
    field: str
    dtype: str
    size: int
    nbytes: int


def state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    """Count the bytes that the state of `tx` takes for `params`, exactly.

    Whole arrays, not per device. The same number as `describe(params, tx).state_bytes`, without a
    layout and for any transformation, also one that `optax.tree.map_params` cannot read.

    Args:
        tx: an optax transformation.
        params: any tree of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        The bytes, as an int.

    Example:
        >>> import jax, optax
        >>> from optlab.state.memory import state_bytes
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "bfloat16")}
        >>> state_bytes(optax.adam(1e-3), params)  # two moments in bfloat16, one int32 count
        67108868
    """
    return sum(_nbytes(leaf) for leaf in _leaves(tx, params))


def state_fields(tx: optax.GradientTransformation, params: Any) -> tuple[StateField, ...]:
    """Say which fields of which state classes the bytes are in.

    Args:
        tx: an optax transformation.
        params: any tree of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
        One `StateField` for each class, field and dtype, in the order of the state. Their `nbytes`
        add up to `state_bytes(tx, params)`.

    Example:
        >>> import jax, optax
        >>> from optlab.state.memory import state_fields
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "bfloat16")}
        >>> for part in state_fields(optax.adam(1e-3, mu_dtype="float32"), params):
        ...     print(part.owner, part.field, part.dtype, part.nbytes)
        ScaleByAdamState count int32 4
        ScaleByAdamState mu float32 67108864
        ScaleByAdamState nu bfloat16 33554432
    """
    totals: dict[tuple[str, str, str], tuple[int, int]] = {}
    for owner, field, leaf in _fields(jax.eval_shape(tx.init, params)):
        key = owner, field, str(leaf.dtype)
        size, nbytes = totals.get(key, (0, 0))
        totals[key] = size + leaf.size, nbytes + _nbytes(leaf)
    return tuple(StateField(*key, *total) for key, total in totals.items())


def compressed_bytes(
    tx: optax.GradientTransformation,
    params: Any,
    bits: int,
    block: int = 128,
    min_size: int = 4096,
) -> int:
    """Count the bytes of state if its large moments were kept in few bits per number, exactly.

    At 8 and 4 bits those of `quantize_state` with `codecs.int8` or `codecs.int4`: of its scales
    too, and of the fields it knows as moments, the others as they are. At 16 bits every float array
    of at least `min_size` entries is bfloat16, as papers count that train in it.

    Args:
        tx: an optax transformation.
        params: any tree of arrays or `jax.ShapeDtypeStruct`s.
        bits: 16, 8 or 4.
        block: entries that share a scale, at 8 and 4 bits.
        min_size: entries from which on an array is compressed.

    Returns:
        The bytes, as an int.

    Raises:
        ValueError: `bits` is none of 16, 8 and 4, or `block` is below 1.

    Example:
        >>> import jax, optax
        >>> from optlab.state.memory import compressed_bytes
        >>> params = {"kernel": jax.ShapeDtypeStruct((4096, 4096), "float32")}
        >>> compressed_bytes(optax.adam(1e-3), params, bits=8) / 4096**2  # 8 bytes uncompressed
        2.062500476837158
    """
    if bits not in (16, 8, 4):
        raise ValueError(f"compressed_bytes: bits must be 16, 8 or 4, got {bits!r}. Write bits=8.")
    if block < 1:
        raise ValueError(f"compressed_bytes: block must be >= 1, got {block}. Write block=128.")
    if bits == 16:
        return sum(_in_bfloat16(leaf, min_size) for leaf in _leaves(tx, params))
    codec = codecs.int8(block=block) if bits == 8 else codecs.int4(block=block)
    return state_bytes(quantize_state(tx, codec, min_size=min_size), params)


def _in_bfloat16(leaf: Any, min_size: int) -> int:
    if leaf.size < min_size or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return _nbytes(leaf)
    return min(2 * leaf.size, _nbytes(leaf))


def _leaves(tx: optax.GradientTransformation, params: Any) -> list[Any]:
    return jax.tree.leaves(jax.eval_shape(tx.init, params))


def _nbytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize


def _is_state(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _fields(node: Any, owner: str = "", field: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield each array with the innermost NamedTuple around it and the field it is in."""
    if not _is_state(node):
        for child in jax.tree.leaves(node, is_leaf=_is_state):
            if _is_state(child):
                yield from _fields(child)
            else:
                yield owner, field, child
        return
    for name, value in zip(node._fields, node, strict=True):
        yield from _fields(value, type(node).__name__, name)
