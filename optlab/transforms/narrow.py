"""Parameters in bfloat16 or float16 that take steps below half a spacing of theirs."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType

from optlab import _checks, _leafwise
from optlab import layout as _layout
from optlab.linalg import rounding


class CompensatedUpdatesState(NamedTuple):
    """State of `compensated_updates`."""

    # Beside bfloat16, integers cost a TPU a second kernel and a copy: 24 bytes accessed per
    # parameter (v5e, float32 updates), 12 for a bfloat16 rest. That one keeps 8 bits of what is
    # left, and with them no step below 2^-18 to 2^-17 of the parameter.
    rest: optax.Params  # int16, in the parameter's shape: float32 numbers between it and its sum
    inner: optax.OptState  # for float32 parameters


def random_bits(key: jax.Array, index: int, like: jax.Array) -> jax.Array:
    """Return uint32 random numbers for leaf `index`, where `like` lies; the same on every mesh."""
    sharding = jax.typeof(like).sharding
    placed = sharding if AxisType.Explicit in sharding.mesh.axis_types else None
    key = jax.random.fold_in(key, index)
    return jax.random.bits(key, like.shape, jnp.uint32, out_sharding=placed)


def check_key(name: str, key: Any) -> None:
    """Refuse what is not one key of `jax.random`."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    if not (typed or (dtype == jnp.uint32 and shape is not None and len(shape) == 1)):
        fix = " Write jax.random.key(0)."
        raise _checks.refusal(TypeError, name, "key", "one key of jax.random", key, fix)


@_checks.explain_calls
def apply_updates_stochastic(params: optax.Params, updates: optax.Updates, key: jax.Array) -> Any:
    """Add updates to parameters, and round narrow ones at random; for `optax.apply_updates`.

    p <- one of the two neighbours of p + u in p's dtype, the upper one with the probability of the
    fraction of the way there: on average every step counts in full, however small. T steps of d
    spacings of p each, d < 1, leave a standard deviation of sqrt(T d (1 - d)) spacings around the
    exact sum, any T steps at most sqrt(T)/2; a spacing of bfloat16 is 2^-8 to 2^-7 of |p|.

    Without state. `compensated_updates` takes 2 bytes per parameter and has no noise.

    Args:
      params: arrays of any floating dtype in any tree. Those of float32 and wider, and integers,
        are added to as by `optax.apply_updates`.
      updates: their updates, in any dtypes; None leaves a parameter as it is. The sum is taken in
        float32, so updates in float32 lose nothing on the way.
      key: a key of `jax.random`, a new one for every step. The numbers depend on it and on the
        number of the leaf among those with an update, not on the mesh. Inside `jax.shard_map` every
        device draws the same.

    Returns:
      The new parameters, in the dtypes of the old. What is finite stays finite, a number that needs
      no rounding is not moved.

    Raises:
      TypeError: key is no key.
      ValueError: the updates have another structure, or a leaf another shape, than the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optlab
      >>> p = jnp.ones(10_000, jnp.bfloat16)  # its upper neighbour is 1 + 2^-7
      >>> u = jnp.full(10_000, 2.0**-10)
      >>> p = optlab.apply_updates_stochastic(p, u, jax.random.key(0))
      >>> print(f"{jnp.mean(p > 1):.2f}")
      0.13

    References:
      Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv:1502.02551, 2015.
    """
    name = "apply_updates_stochastic"
    check_key(name, key)
    named, (column,), treedef = _leafwise.aligned(name, updates, ("params", params))
    number = itertools.count()

    def leaf(path, u, p):
        if p is None or u is None:
            return p
        p, u, index = jnp.asarray(p), jnp.asarray(u), next(number)
        _check_shape(name, path, p, u)
        if not rounding.is_narrow(p.dtype):
            return (p + u).astype(p.dtype)
        total = p.astype(jnp.float32) + u.astype(jnp.float32)
        return rounding.stochastic(total, random_bits(key, index, p), p.dtype)

    rows = zip(named, column, strict=True)
    return jax.tree.unflatten(treedef, [leaf(path, u, p) for (path, u), p in rows])


def _check_shape(name: str, path: str, p: Any, u: Any) -> None:
    if p.shape != u.shape:
        raise ValueError(
            f"{name}: leaf '{path}' has shape {u.shape} in the updates and {p.shape} in params. "
            "Pass updates of these very parameters."
        )


def _rests(name: str, params: Any) -> Any:
    """Return a rest of zero for every narrow parameter, refusing what has fewer than 16 bits."""
    _leafwise.check_tree(name, params)

    def rest(key_path, p):
        if not rounding.is_narrow(p.dtype):
            return optax.MaskedNode()
        if p.dtype not in (jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"{name}: leaf '{_layout.path_str(key_path)}' has dtype {p.dtype}, bfloat16, "
                "float16 or wider is needed. Take it out with optax.masked."
            )
        return _leafwise.zeros_like(p, jnp.int16)

    return jax.tree_util.tree_map_with_path(rest, params)


def _widened(p: Any) -> Any:
    """Return an array, or the shape of one, in the dtype it is computed in."""
    if isinstance(p, jax.ShapeDtypeStruct):
        return p.update(dtype=_leafwise.widen(p.dtype))
    return p.astype(_leafwise.widen(p.dtype))


def _sum_of(p: jax.Array, rest: Any) -> jax.Array:
    """Return the float32 number that a parameter and its rest are."""
    return rounding.with_rest(_widened(p), rest) if rounding.is_narrow(p.dtype) else _widened(p)


def _landing(x: jax.Array, step: jax.Array, p: jax.Array, dtype: Any) -> tuple[jax.Array, Any]:
    """Return the update in `dtype` that brings p next to x + step, and the rest that is left."""
    wide, target = p.astype(jnp.float32), x + step.astype(jnp.float32)
    update = rounding.nearest_with_rest(target, p.dtype) - wide
    if rounding.is_narrow(dtype):
        update = rounding.nearest(update, dtype)
    # Where apply_updates lands: at the nearest number, but for updates too long for their dtype.
    landed = rounding.nearest(wide + update, p.dtype)
    return update.astype(dtype), rounding.rest(target, landed)


@_checks.explain_calls
def compensated_updates(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on float32 parameters of which the narrow ones are the upper half.

    x = (p, r): p is the parameter that the model sees, in bfloat16 or float16, and the rest r
    counts the float32 numbers from p to x. Then
      x <- x + inner(g, x) in float32,   p <- x rounded to nearest,   r <- x - p,
    and the update is the p that `optax.apply_updates` shall arrive at less the old one. bfloat16
    and 16 bits are all of float32, so x is bit for bit what float32 parameters would be, given the
    same gradients, and p is within half a spacing of it, 2^-8 |x|. A plain sum does not move at
    all below that.

    Two exceptions. Updates in bfloat16, as from bfloat16 gradients, that are longer than their
    parameter are rounded, to 2^-9 of themselves; let the gradients be float32 for none at all. Of
    float16, x keeps 2^-24 of itself, and below 6.1e-5, where float16's numbers thin out, what
    float16 does.

    Must come last, around the whole chain with its learning rate: what scales its updates breaks
    the sum. If something else sets the parameters, the rest is off by half a spacing at most.

    Args:
      inner: an optax transformation. It is given float32 gradients and parameters, and keeps state
        for such: a dtype of moments is its own affair. float32 and wider leaves pass to it and from
        it as they are.

    Returns:
      A wrapper with updates in the dtypes of the gradients. Needs params.

    State:
      rest: 2 bytes per bfloat16 or float16 parameter, none for others. inner: `inner`'s, for
      float32 parameters.

    Raises:
      ValueError: by init, for parameters of fewer than 16 bits.

    Example:
      >>> import jax.numpy as jnp, optax, optlab
      >>> tx = optlab.compensated_updates(optax.sgd(2.0**-10))
      >>> p = jnp.ones(1, jnp.bfloat16)  # its neighbours are 1 - 2^-8 and 1 + 2^-7
      >>> state = tx.init(p)
      >>> for _ in range(3):
      ...     u, state = tx.update(jnp.ones(1), state, p)
      ...     p = optax.apply_updates(p, u)
      >>> print(p, state.rest)
      [0.996094] [16384]

    References:
      Kahan, "Further remarks on reducing truncation errors", 1965. Kalamkar et al., "A Study of
      BFLOAT16 for Deep Learning Training", arXiv:1905.12322, 2019 (the lower half as an integer).
    """
    name = "compensated_updates"
    _checks.check_transform(name, "inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        return CompensatedUpdatesState(
            _rests(name, params), inner.init(jax.tree.map(_widened, params))
        )

    def update(updates, state, params=None, **extra_args):
        _leafwise.require_params(name, params)
        _leafwise.check_tree(name, updates)
        named, (rests, old), treedef = _leafwise.aligned(
            name, updates, ("the state", state.rest), ("params", params)
        )
        for (path, g), p in zip(named, old, strict=True):
            if g is not None:
                _check_shape(name, path, p, g)
        sums = [None if p is None else _sum_of(p, r) for p, r in zip(old, rests, strict=True)]
        grads, wide = jax.tree.map(_widened, updates), treedef.unflatten(sums)
        steps, inner_state = inner.update(grads, state.inner, wide, **extra_args)

        def leaf(g, step, x, p, r):
            if g is None:
                return None, r
            if not rounding.is_narrow(p.dtype):
                return step.astype(g.dtype), r
            return _landing(x, step, p, g.dtype)

        columns = [g for _, g in named], treedef.flatten_up_to(steps), sums, old, rests
        pairs = [leaf(*row) for row in zip(*columns, strict=True)]
        new, rests = (treedef.unflatten([pair[i] for pair in pairs]) for i in (0, 1))
        return new, CompensatedUpdatesState(rests, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
