"""What becomes of a state in coordinates when their basis is another one."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optlab import _checks, _leafwise
from optlab.transforms import projection
from optlab.transforms.lens import Kept, Lens, along, on_coordinates
from optlab.transforms.projection import Low, Reading
from optlab.transforms.quantize import QuantizeState

Turn = Callable[[optax.OptState, Callable[..., Any]], optax.OptState]
"""`turn(state, into)` returns the state in the new basis; `into(tree)` turns a tree of coordinates,
`into(tree, squares=True)` one of their mean squares."""

_MOMENTS = frozenset({"mu", "nu", "trace"})


def turner(lens: Lens, before: Sequence[Kept]) -> Callable[..., Any]:
    """Return `into(tree, squares=False)`: C y, or (C * C) y, with C = B_new^T B_old."""
    changes = [_change(lens, index, old) for index, old in enumerate(before)]

    def into(tree: Any, squares: bool = False) -> Any:
        values = projection.projected(lens.reading, tree)
        pairs = zip(lens.reading.lows, values, strict=True)
        new = [_times(low, changes, y, squares) if _is_array(y) else y for low, y in pairs]
        return projection.with_projected(lens.reading, tree, new)

    return into


def _is_array(y: Any) -> bool:
    return hasattr(y, "shape")


def _change(lens: Lens, index: int, before: Kept) -> jax.Array:
    """Return C for all sides of a bucket: exactly I where the basis is the old one."""
    bucket, now = lens.reading.buckets[index], lens.kept[index]
    wide = _leafwise.widen(bucket.dtype)
    new, old = (
        lens.projector.basis(k.basis, bucket.size, bucket.rank).astype(wide) for k in (now, before)
    )
    same = (now.found == before.found)[..., None, None]
    return jnp.where(same, jnp.eye(bucket.rank), jnp.matmul(new.mT, old, precision="highest"))


def _times(low: Low, changes: Sequence[jax.Array], y: jax.Array, squares: bool) -> jax.Array:
    def turned(y, *matrices):
        for side, c in zip(low.sides, matrices, strict=True):
            c = (c * c if squares else c).astype(jnp.promote_types(y.dtype, jnp.float32))
            y = along(low, side, lambda x, c=c: jnp.matmul(c, x), y)
        return y

    mine = [changes[side.bucket][side.place] for side in low.sides]
    return on_coordinates(low, turned, y, *mine)


def rotate(state: optax.OptState, into: Callable[..., Any]) -> optax.OptState:
    """Turn first moments, and second ones by the variance about the first.

    mu <- C mu,  nu <- |(C * C)(nu - mu^2) + (C mu)^2|; a `trace` as mu; nu alone by C * C.
    """

    def one(node: Any) -> Any:
        if not _has_moments(node):
            return node
        linear = [field for field in ("mu", "trace") if hasattr(node, field)]
        new = {field: into(getattr(node, field)) for field in linear}
        if hasattr(node, "nu"):
            new["nu"] = _second(node, new.get("mu"), into)
        return node._replace(**new)

    return jax.tree.map(one, state, is_leaf=_has_moments)


def _second(node: Any, turned: Any, into: Callable[..., Any]) -> Any:
    if turned is None:
        return into(node.nu, squares=True)
    variance = into(jax.tree.map(lambda v, m: v - m * m, node.nu, node.mu), squares=True)
    again = lambda v, m, old: jnp.abs(v + m * m).astype(old.dtype)  # noqa: E731
    return jax.tree.map(again, variance, turned, node.nu)


def _has_codes(state: Any) -> bool:
    coded = lambda node: isinstance(node, QuantizeState)  # noqa: E731
    return any(map(coded, jax.tree.leaves(state, is_leaf=coded)))


def _has_moments(node: Any) -> bool:
    return isinstance(node, tuple) and bool(_MOMENTS & set(getattr(node, "_fields", ())))


TURNS: Mapping[str, Turn] = MappingProxyType({"rotate": rotate})


def check_choice(name: str, on_refresh: Any) -> None:
    """Refuse what is no way to turn a state."""
    if not callable(on_refresh):
        _checks.check_choice(name, "on_refresh", on_refresh, ("keep", "reset", *TURNS))


def check_turn(name: str, on_refresh: Any, state: Any, reading: Reading) -> None:
    """Refuse a state that "rotate" does not know."""
    if on_refresh != "rotate":
        return
    if _has_codes(state):
        raise ValueError(
            f'{name}: on_refresh="rotate" turns moments, and inner keeps codes of them. '
            "Put quantize_state around in_low_rank, not inside."
        )
    shapes = {low.low_shape for low in reading.lows}
    rest = jax.tree.map(lambda n: None if _has_moments(n) else n, state, is_leaf=_has_moments)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(rest):
        if jnp.shape(leaf) in shapes:
            raise ValueError(
                f'{name}: on_refresh="rotate" turns the fields mu, nu and trace, and inner keeps '
                f"coordinates in {jax.tree_util.keystr(key_path)}. Give a function (state, into)."
            )
