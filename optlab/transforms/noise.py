"""Rates that follow the noise of the gradients."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed import apply, schemes
from optlab.distributed.options import matrix_options
from optlab.distributed.shardings import everywhere
from optlab.linalg.norms import safe_divide
from optlab.linalg.polar import PolarFn
from optlab.transforms import lmo
from optlab.transforms.momentum import with_previous_updates
from optlab.transforms.shape_scale import ShapeMode, resolve_shape_mode

Groups = Any | Callable[[str, Any], str] | None
"""Labels as a tree or a prefix of one, a function (path, leaf) -> label, or None: by norm."""

NORMS: Mapping[str, str] = MappingProxyType(
    {"matrix": "spectral", "embedding": "sign", "head": "sign", "vector": "rms", "scalar": "rms"}
)
"""Norm of each role, as in LANTON's three groups."""


class NoiseAdaptiveState(NamedTuple):
    """State of `noise_adaptive`, inside that of `with_previous_updates`."""

    count: jax.Array  # int32, (): updates seen
    noise: jax.Array  # float32 or wider, (matrices,): average of squared dual norms
    inner: optax.OptState

    def metrics(self) -> dict[str, jax.Array]:
        """Return the noise of the quietest and of the loudest matrix, as dual norms."""
        lowest = jnp.min(self.noise) if self.noise.size else jnp.zeros([], self.noise.dtype)
        return {
            "noise_min": jnp.sqrt(lowest),
            "noise_max": jnp.sqrt(jnp.max(self.noise, initial=0)),
        }


def check_norms(name: str, norms: Any) -> None:
    """Refuse what does not map roles to norms."""
    if not isinstance(norms, Mapping):
        must, fix = "a mapping from roles to norms", ' Write {"matrix": "spectral"}.'
        raise _checks.refusal(TypeError, name, "norms", must, norms, fix)
    for role, norm in norms.items():
        bare = role in ("vector", "scalar")
        fix = ' "rms" is what "spectral" is for one input.' if bare and norm == "spectral" else ""
        known = (*lmo.NORMS, *(() if bare else ("spectral",)))
        if norm not in known:
            must = f"one of {', '.join(map(repr, known))} for role {role!r}"
            raise _checks.refusal(ValueError, name, "norms", must, norm, fix)


def nuclear_norm(x: jax.Array) -> jax.Array:
    """Return the sum of the singular values of (..., m, n), from the short side's Gram matrix.

    Values under sqrt(eps) of the largest come out up to that size; an SVD costs several times this.
    """
    g = jnp.matmul(*((x, x.mT) if x.shape[-2] <= x.shape[-1] else (x.mT, x)), precision="highest")
    return jnp.sum(jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(g), 0)), -1)


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A leaf whose noise is measured: its norm and its group, and how it holds its matrices."""

    path: str
    norm: str
    group: Any
    view: _layout.MatrixView | None
    shape: tuple[int, ...]

    @property
    def batch(self) -> tuple[int, ...]:
        """Axes with one matrix per index: none without a view."""
        return self.view.batch(len(self.shape)) if self.view else ()

    @property
    def dims(self) -> tuple[int, int]:
        """Inputs and outputs of one matrix."""
        return self.view.dims(self.shape) if self.view else (1, math.prod(self.shape))

    @property
    def count(self) -> int:
        """Number of matrices."""
        return math.prod(self.shape[axis] for axis in self.batch)

    def beside(self, values: jax.Array) -> jax.Array:
        """Return one number per matrix in a shape that broadcasts against the leaf."""
        kept = (n if axis in self.batch else 1 for axis, n in enumerate(self.shape))
        return values.reshape(tuple(kept))


def labels_of(name: str, groups: Groups, tree: Any) -> Any:
    """Return a tree of group labels, or None where they do not come from a tree."""
    if groups is None or callable(groups):
        return None
    try:
        return jax.tree.broadcast(groups, tree)
    except ValueError as error:
        ours, theirs = (jax.tree.leaves(_layout.paths(t))[:3] for t in (groups, tree))
        raise ValueError(
            f"{name}: groups is no prefix of the parameter tree: it has the leaves {ours}, the "
            f"parameters {theirs}. Give a label per leaf or subtree, or a function (path, leaf)."
        ) from error


def _measured(
    name: str, tree: Any, *, norms: Mapping[str, str], groups: Groups, layout: _layout.Policy
) -> Any:
    """Return a tree of `_Measured`, with None for a leaf without a norm or without elements."""
    labels = labels_of(name, groups, tree)

    def one(key_path: Any, leaf: Any, label: Any = None) -> _Measured | None:
        path = _layout.path_str(key_path)
        norm = norms.get(_layout.role(path, leaf, layout))
        if norm is None or not leaf.size:
            return None
        group = groups(path, leaf) if callable(groups) else norm if groups is None else label
        return _Measured(path, norm, group, _layout.view_of(path, leaf, layout), leaf.shape)

    return jax.tree_util.tree_map_with_path(one, tree, *(() if labels is None else (labels,)))


Leaves = list[tuple[_Measured, jax.Array | None]]
"""Leaves with noise, each with the change of its gradient; None for a gradient that is missing."""
Present = list[tuple[_Measured, jax.Array]]


def _differences(name: str, updates: Any, previous: Any, measured: Any) -> Leaves:
    change, _ = _leafwise.leafwise(
        name, lambda _, g, old, p: (g - old, old), updates, (previous,), keep_dtype=False
    )
    named, (column,), _ = _leafwise.aligned(name, change, ("the state", measured))
    return [(m, d) for (_, d), m in zip(named, column, strict=True) if m is not None]


def _squares(
    leaves: Leaves, dual_norms: Callable[[Present], Iterator[jax.Array]], noise: jax.Array
) -> tuple[jax.Array, np.ndarray]:
    """Return squared dual norms, one per matrix, and which matrices have a gradient."""
    counts = [m.count for m, _ in leaves]
    if sum(counts) != len(noise):
        raise ValueError(
            f"noise_adaptive: the updates hold {sum(counts)} matrices, init saw {len(noise)}. "
            "Pass gradients of the very parameters that init was given."
        )
    values = dual_norms([(m, d) for m, d in leaves if d is not None])
    column = [
        jnp.zeros(m.count) if d is None else everywhere(next(values)).ravel() for m, d in leaves
    ]
    found = jnp.concatenate([v.astype(noise.dtype) for v in column]) if column else noise
    # A square that overflows would make 0/0 of the factors of its group.
    found = jnp.minimum(found * found, jnp.finfo(noise.dtype).max / 2)
    return found, np.repeat([d is not None for _, d in leaves], counts).astype(bool)


def _scale(name: str, updates: Any, measured: Any, factors: jax.Array) -> Any:
    """Multiply every matrix by its entry of a vector."""
    start, leaves = 0, []
    measured, treedef = jax.tree.flatten(measured, is_leaf=_leafwise.is_none)
    for m in measured:
        leaves.append(m and m.beside(factors[start : start + m.count]))
        start += m.count if m else 0
    others = (jax.tree.unflatten(treedef, leaves),)
    times = lambda _, u, p, f: (u if f is None else f * u,)  # noqa: E731
    return _leafwise.leafwise(name, times, updates, others=others)[0]


def noise_multipliers(
    noise: jax.Array, groups: Sequence[Any], alpha: ArrayLike, present: ArrayLike = True
) -> jax.Array:
    """Return sqrt(a/max a), a = alpha/sqrt(alpha^2 + noise), the maximum over those of a group.

    Matrices that are not `present` count for no maximum.
    """
    order = {label: index for index, label in enumerate(dict.fromkeys(groups))}
    member = np.array([order[label] for label in groups], int)
    offset = alpha**2 + noise
    inside = present & np.equal.outer(np.arange(len(order)), member)
    least = jnp.min(jnp.where(inside, offset[None, :], jnp.inf), axis=1, initial=jnp.inf)
    # a/max a is the root of this quotient; sqrt(sqrt(x)) is cheaper than a power.
    return jnp.sqrt(jnp.sqrt(safe_divide(least[member], offset, 1.0)))


def _attained(polar: PolarFn) -> Callable[[jax.Array], jax.Array]:
    polar = schemes.in_cache(polar)
    return lambda x: jnp.sum(x.astype(_leafwise.widen(x.dtype)) * polar(x), (-2, -1))


def _unscaled(inputs: int, outputs: int) -> float:
    del inputs, outputs
    return 1.0


@_checks.explain_calls
def noise_adaptive(
    inner: optax.GradientTransformation,
    *,
    alpha: ArrayLike = 1.0,
    b2: ArrayLike = 0.9,
    norms: Mapping[str, str] = NORMS,
    groups: Groups = None,
    dual_scale: ShapeMode | None = "spectral",
    polar: PolarFn | str | None = "keller",
    layout: _layout.Policy = _layout.flax,
    shardings: Any = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Slow the matrices whose gradients are noisier than those of the quietest in their group.

    For each matrix, with D = g_t - g_{t-1} of the raw gradients and its norm's dual |D|_*,
      H <- b2 H + (1 - b2) |D|_*^2 from zero,   a = alpha/sqrt(alpha^2 + H),
      u <- sqrt(a / max a over the group) inner(g).

    The factor lies in (0, 1], and is 1 for the quietest matrix and at the first step, where there
    is no difference yet. Only where alpha^2 is small beside H does the noise matter. Dual norms
    carry constants of the shape: compare matrices of one norm, or set dual_scale to None.

    A frozen leaf has no noise and would be the quietest: take it out with `optax.masked`.

    Args:
      inner: momentum and geometry, such as a chain of `interpolate_momentum` and `orthogonalize`.
      alpha: what the noise is compared with, > 0.
      b2: rate of the average of the noise, in [0, 1).
      norms: "spectral" or a norm of `scale_by_lmo` for every role; leaves of other roles are left
        alone. (static)
      groups: labels as a tree, a prefix of one or a function (path, leaf) -> label; None: one group
        per norm. (static)
      dual_scale: factor of the spectral dual norm, see `scale_by_shape`: "spectral" for the norm
        from RMS to RMS, None for the nuclear norm itself. (static)
      polar: takes the nuclear norm as <D, polar(D)>, see `orthogonalize`: with "keller" within
        -30 % and +20 %. None: exact, from eigenvalues. (static)
      layout: which axes are inputs and outputs; stacked layers are matrices of their own. (static)
      shardings: of the parameters, for an Auto mesh. (static)
      mu_dtype: dtype of the gradient remembered; None for the parameter's. (static)

    Returns:
      A wrapper with an output of at most `inner`'s. Decay and rate come after it.

    State:
      That of `with_previous_updates`: previous, the parameter's shape, 4 bytes per float32
      parameter. In it noise: one float32 per matrix; count: int32; inner: `inner`'s.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.noise_adaptive(optax.identity(), b2=0.0)
      >>> state = tx.init({"a": jnp.zeros(4), "b": jnp.zeros(4)})
      >>> for a in (1.0, -1.0):
      ...     g = {"a": jnp.full(4, a), "b": jnp.ones(4)}
      ...     u, state = tx.update(g, state)
      >>> print(f"{u['a'][0]:.3f} {u['b'][0]:.3f}")
      -0.352 1.000
    """
    name = "noise_adaptive"
    _checks.check_transform(name, "inner", inner)
    _checks.check_positive(name, alpha=alpha)
    _checks.check_decay(name, b2=b2)
    check_norms(name, norms)
    factor = resolve_shape_mode(name, "dual_scale", dual_scale or _unscaled)
    options = matrix_options(name, "eigh" if polar is None else polar, lmo.as_matrices(layout))
    nuclear = nuclear_norm if polar is None else _attained(options.polar)
    inner = optax.with_extra_args_support(inner)
    read = partial(_measured, name, norms=norms, groups=groups, layout=layout)

    def dual_norms(leaves: Present) -> Iterator[jax.Array]:
        spectral = [(m.path, d) for m, d in leaves if m.norm == "spectral"]
        values = iter(apply.matrix_values(name, nuclear, spectral, shardings, options))
        for m, d in leaves:
            if m.norm == "spectral":
                yield factor(*m.dims) * next(values)
            else:
                yield lmo.dual_norm(m.norm, d, m.view)

    def init(params):
        matrices = sum(m.count for m in jax.tree.leaves(read(params)))
        noise = jnp.zeros((matrices,), _leafwise.scalar_dtype(params))
        return NoiseAdaptiveState(jnp.zeros([], jnp.int32), noise, inner.init(params))

    def update(updates, state, params=None, **extra_args):
        previous = extra_args.pop("previous_updates")
        measured = read(previous)
        leaves = _differences(name, updates, previous, measured)
        seen, present = _squares(leaves, dual_norms, state.noise)
        # There is no difference yet at the first step.
        noise = b2 * state.noise + (1 - b2) * seen
        noise = jnp.where(present & (state.count > 0), noise, state.noise)
        groups_of = [m.group for m, _ in leaves for _ in range(m.count)]
        factors = noise_multipliers(noise, groups_of, alpha, present)
        new, inner_state = inner.update(updates, state.inner, params, **extra_args)
        scaled = _scale(name, new, measured, factors)
        count = _leafwise.increment(state.count)
        return scaled, NoiseAdaptiveState(count, noise.astype(state.noise.dtype), inner_state)

    link = optax.GradientTransformationExtraArgs(init, update)
    return with_previous_updates(link, mu_dtype=mu_dtype)
