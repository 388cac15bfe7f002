"""Per-neuron normalization of orthogonalized updates (NorMuon)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.distributed import plan as _plan
from optlab.distributed import sums
from optlab.distributed.shardings import everywhere
from optlab.linalg import norms


class NormalizeNeuronsState(NamedTuple):
    """State of `normalize_neurons`."""

    nu: jax.Array  # float32 or wider, (neurons,): of all matrices, in the order of their leaves


@_checks.explain_calls
def normalize_neurons(
    b2: ArrayLike = 0.95,
    *,
    eps: ArrayLike = 1e-10,
    rms: ArrayLike | None = None,
    layout: _layout.Policy = _layout.flax,
    shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Divide every neuron's update by its running root mean square, and keep the matrix's size.

    Over the m inputs of neuron i:  r_i = mean_j u_ij^2,  nu <- b2 nu + (1 - b2) r from zero,
    u'_ij = u_ij/(sqrt(nu_i) + eps);  emits u' |u|/(|u'| + eps), or, with rms, u' rms/RMS(u').

    After orthogonalization rows still differ in size; this evens them out (NorMuon). A common
    factor of nu cancels, so it needs no bias correction. On a mesh the sums of all leaves travel
    in one all-reduce of one number per neuron.

    Args:
      b2: rate of the mean squares, in [0, 1).
      eps: guards the divisions, > 0.
      rms: root mean square of every emitted matrix, > 0; None keeps the norm that it came with.
      layout: which axes are inputs and which are neurons. (static)
      shardings: as in `orthogonalize`. (static)

    Returns:
      A transformation; output norm as its input's, or rms sqrt(m n). Leaves that are no matrix of
      role "matrix" pass untouched.

    State:
      nu: one vector with a float32 (or wider) number per neuron of the tree, whole on every device.

    Example:
      >>> import jax.numpy as jnp, optlab
      >>> tx = optlab.normalize_neurons(rms=1.0)
      >>> g = {"kernel": jnp.array([[3.0, 0.1], [3.0, 0.1]])}
      >>> u, state = tx.update(g, tx.init(g))
      >>> print(u["kernel"].round(4))
      [[1. 1.]
       [1. 1.]]
    """
    name = "normalize_neurons"
    _checks.check_decay(name, b2=b2)
    _checks.check_positive(name, eps=eps)
    if rms is not None:
        _checks.check_positive(name, rms=rms)
    _checks.check_callable(name, layout=layout)

    def matrices(tree):
        _leafwise.check_tree(name, tree)
        for index, (path, leaf) in enumerate(_plan.named_leaves(tree)):
            view = None if leaf is None else _layout.view_of(path, leaf, layout)
            if view is not None and view.role == "matrix" and leaf.size:
                yield index, path, leaf, view

    def init(params):
        return NormalizeNeuronsState(_zeros(_neurons(matrices(params)), params))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        # A missing gradient has no shape: the parameters, where they are given, know its place.
        seen = list(matrices(updates if params is None else params))
        _check_size(name, _neurons(seen), state.nu)
        out, nu = jax.tree.leaves(updates, is_leaf=_leafwise.is_none), state.nu
        here = [index for index, *_ in seen if out[index] is not None]

        numbers = {"b2": b2, "eps": eps, "rms": rms}
        # On an Explicit mesh a shard_map takes arrays, as injected numbers are, by argument only.
        arrays = {key: value for key, value in numbers.items() if isinstance(value, jax.Array)}

        def factors(squares, state):
            nu, arrays = state
            by_index = dict(zip(here, squares, strict=True))
            return _factors(by_index, nu, seen, **(numbers | arrays))

        if here:
            leaves = [(path, out[index]) for index, path, *_ in seen if index in here]
            rows = [view.rows for index, *_, view in seen if index in here]
            scaled, nu = sums.scale_by_sums(name, leaves, rows, factors, (nu, arrays), shardings)
            for index, u in zip(here, scaled, strict=True):
                out[index] = u
        treedef = jax.tree.structure(updates, is_leaf=_leafwise.is_none)
        return jax.tree.unflatten(treedef, out), NormalizeNeuronsState(nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _factors(squares, nu, seen, *, b2, eps, rms) -> tuple[list[jax.Array], jax.Array]:
    """Return the neurons' factors of every leaf with sums, and the new mean squares of all."""
    found, means, start = [], [], 0
    for index, _, leaf, view in seen:
        size = sums.size_of_sums(leaf.shape, view.rows)
        mean = nu[start : start + size]
        start += size
        if index in squares:
            # A sum that overflowed would stay in nu for ever.
            largest = jnp.finfo(nu.dtype).max / leaf.size
            square = jnp.minimum(squares[index].astype(nu.dtype), largest)
            m, n = view.dims(leaf.shape)
            mean = b2 * mean.reshape(square.shape) + (1 - b2) * square / m
            norm = None if rms is None else rms * (m * n) ** 0.5
            kept = [axis for axis in range(leaf.ndim) if axis not in view.rows]
            found.append(_factor(square, mean, tuple(map(kept.index, view.cols)), eps, norm))
        means.append(mean.ravel())
    return found, jnp.concatenate(means)


def _factor(square, mean, axes, eps, norm) -> jax.Array:
    """Return the factors of one leaf; the norms of its matrices need no pass of their own."""
    inverse = 1 / (jnp.sqrt(mean) + eps)
    after = jnp.sqrt(jnp.sum(square * inverse**2, axis=axes, keepdims=True))
    if norm is not None:
        return inverse * norms.safe_divide(norm, after)
    before = jnp.sqrt(jnp.sum(square, axis=axes, keepdims=True))
    return inverse * before / (after + eps)


def _neurons(found) -> int:
    return sum(sums.size_of_sums(leaf.shape, view.rows) for *_, leaf, view in found)


def _zeros(size: int, params: Any) -> jax.Array:
    """Return the vector of all neurons, in the type that update gives it."""
    zeros, leaves = jnp.zeros((size,), _leafwise.scalar_dtype(params)), jax.tree.leaves(params)
    return everywhere(zeros, jax.typeof(leaves[0]).sharding.mesh) if leaves else zeros


def _check_size(name: str, size: int, nu: jax.Array) -> None:
    if size != nu.size:
        raise ValueError(
            f"{name}: the updates have {size} neurons, init saw {nu.size}. "
            "Pass gradients of the very parameters that init was given."
        )
