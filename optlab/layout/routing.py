"""`describe`: how every leaf is read, what optimizer state it has, and what that costs."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from optlab._text import aligned
from optlab.layout.policies import flax
from optlab.layout.view import MatrixView, Policy, path_str, role, view_of


@dataclasses.dataclass(frozen=True)
class LeafRow:
    """One leaf of `describe`."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    view: MatrixView | None
    methods: tuple[str, ...]  # labels of `optax.partition` under which it has state
    states: tuple[str, ...]
    state_bytes: int
    sharding: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def view_text(self) -> str:
        """The view as "batch(0) in(1) -> out(2)"; "-" where there is none."""
        if self.view is None:
            return "-"
        batch = self.view.batch(len(self.shape))
        sides = f"in{_axes(self.view.rows)} -> out{_axes(self.view.cols)}"
        return f"batch{_axes(batch)} {sides}" if batch else sides


@dataclasses.dataclass(frozen=True)
class Routing:
    """What `describe` returns: rows to work with, a table to print.

    Args:
        leaves: one row per leaf, in tree order.
        param_bytes: bytes of the parameters.
        shared_bytes: bytes of state that belongs to no leaf (counts, injected hyperparameters).
        has_state: whether a transform was given.
    """

    leaves: tuple[LeafRow, ...]
    param_bytes: int
    shared_bytes: int
    has_state: bool

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(row.size for row in self.leaves)

    @property
    def state_bytes(self) -> int:
        """Bytes of the whole optimizer state."""
        return self.shared_bytes + sum(row.state_bytes for row in self.leaves)

    def __str__(self) -> str:
        header = ["leaf", "shape", "dtype", "role", "view"]
        table = [[r.path, str(r.shape), r.dtype, r.role, r.view_text] for r in self.leaves]
        if self.has_state:
            header += ["method"] * any(row.methods for row in self.leaves)
            header += ["state", "state bytes"]
            for cells, row in zip(table, self.leaves, strict=True):
                cells += [", ".join(row.methods) or "-"] * ("method" in header)
                cells += [", ".join(row.states) or "-", f"{row.state_bytes:,}"]
        if any(row.sharding for row in self.leaves):
            header += ["sharding"]
            for cells, row in zip(table, self.leaves, strict=True):
                cells += [row.sharding or "-"]
        return "\n".join([*aligned([header, *table], {"state bytes"}), "", *self._totals()])

    __repr__ = __str__

    def _totals(self) -> Iterator[str]:
        count = "1 leaf" if len(self.leaves) == 1 else f"{len(self.leaves)} leaves"
        yield f"{count}, {self.size:,} parameters, {self.param_bytes:,} bytes"
        if self.has_state:
            each = self.state_bytes - self.shared_bytes
            yield (
                f"state: {self.state_bytes:,} bytes = {each:,} in leaves "
                f"({each / max(self.size, 1):.4g} per parameter) + {self.shared_bytes:,} shared"
            )


def describe(
    params: Any, tx: optax.GradientTransformation | None = None, *, layout: Policy = flax
) -> Routing:
    """Say how each leaf of `params` is read and, given `tx`, what state it gets.

    Nothing is computed or allocated: `params` may hold arrays, `jax.ShapeDtypeStruct`s or boxed
    leaves (NNX Param, Linen Partitioned), and `tx.init` is only traced.

    Args:
        params: any tree of parameters.
        tx: an optax transform that `optax.tree.map_params` can work with (all of optlab's, and
            optax's wrappers).
        layout: policy to show.

    Returns:
        A `Routing`; print it for a table of leaf, shape, dtype, role, view, the label under which
        `optax.partition` has state for the leaf ("fallback" for what a matrix method leaves to
        another one), the state classes that hold an array for it, their bytes (exact, whole arrays,
        not per device), and sharding.

    Raises:
        ValueError: an ambiguous leaf, as raised by the policy.

    Example:
        >>> import jax, optax
        >>> from optlab.layout import describe
        >>> params = {"kernel": jax.ShapeDtypeStruct((4, 3), "float32")}
        >>> print(describe(params, optax.sgd(0.1, momentum=0.9)))
        leaf    shape   dtype    role    view             state       state bytes
        kernel  (4, 3)  float32  matrix  in(0) -> out(1)  TraceState           48
        <BLANKLINE>
        1 leaf, 12 parameters, 48 bytes
        state: 48 bytes = 48 in leaves (4 per parameter) + 0 shared
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(params)
    held = _held(tx, params, treedef) if tx is not None else []
    rows = []
    for index, (key_path, leaf) in enumerate(keyed):
        path = path_str(key_path)
        mine = [item for item in held if item.index == index]
        rows.append(
            LeafRow(
                path=path,
                shape=np.shape(leaf),
                dtype=str(jax.typeof(leaf).dtype),
                role=role(path, leaf, layout),
                view=view_of(path, leaf, layout),
                methods=tuple(dict.fromkeys(item.method for item in mine if item.method)),
                states=tuple(dict.fromkeys(item.owner for item in mine)),
                state_bytes=sum(item.nbytes for item in mine),
                sharding=_sharding(leaf),
            )
        )
    shared = sum(item.nbytes for item in held if item.index is None)
    total = sum(_nbytes(leaf) for _, leaf in keyed)
    return Routing(tuple(rows), total, shared, tx is not None)


@dataclasses.dataclass(frozen=True)
class _Held:
    """An array of the state: its parameter (None: none), its bytes, its class, its partition."""

    index: int | None
    nbytes: int
    owner: str = ""
    method: str = ""


def _held(tx: Any, params: Any, treedef: Any) -> list[_Held]:
    def mine(leaf: Any, index: int) -> Any:
        return leaf if _is_masked(leaf) else _Held(index, _nbytes(leaf))

    tagged = optax.tree.map_params(
        tx,
        mine,
        jax.eval_shape(tx.init, params),
        jax.tree.unflatten(treedef, range(treedef.num_leaves)),
        transform_non_params=lambda part: jax.tree.map(lambda x: _Held(None, _nbytes(x)), part),
        is_leaf=_is_masked,
    )
    return list(_walk(tagged))


def _walk(node: Any, owner: str = "", method: str = "") -> Iterator[_Held]:
    """Yield the arrays of a tagged state with the innermost NamedTuple class around each."""
    if isinstance(node, _Held):
        yield dataclasses.replace(node, owner=owner, method=method)
        return
    if isinstance(node, optax.transforms.PartitionState):
        for label, inner in node.inner_states.items():
            yield from _walk(inner, owner, str(label))
        return
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        owner = type(node).__name__
    for child in jax.tree.leaves(node, is_leaf=lambda x: x is not node):
        if child is not node:
            yield from _walk(child, owner, method)


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _nbytes(leaf: Any) -> int:
    kind = jax.typeof(leaf)
    return kind.size * kind.dtype.itemsize


def _sharding(leaf: Any) -> str:
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return ""
    return f"P({', '.join(repr(axis) for axis in sharding.spec)})"


def _axes(axes: tuple[int, ...]) -> str:
    return f"({','.join(map(str, axes))})"
