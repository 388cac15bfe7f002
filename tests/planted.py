"""Planted defects: small transformations that are wrong in one way each, for test_teeth.

A `make` is built by `stateless`, `whole` or `with_state` from the one line that is wrong; defects
that need more than a line are functions below.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optlab
from optlab import _leafwise
from optlab.testing import random_like

ArrayLike = jax.typing.ArrayLike


def small():
    return random_like({"dense": {"bias": (16,), "kernel": (8, 16)}}, seed=0)


def stateless(leaf):
    """Return `make` of a transformation without state from `leaf(u, p)`."""

    def update(updates, state, params=None, **extra_args):
        del extra_args
        params = updates if params is None else params
        return jax.tree.map(leaf, updates, params), state

    return lambda: optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def whole(fn):
    """Return `make` of a transformation without state from `fn(updates, params)`."""

    def update(updates, state, params=None, **extra_args):
        del extra_args
        return fn(updates, params), state

    return lambda: optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def with_state(init, step=lambda u, s: (u, s)):
    """Return `make` of a transformation from `init(params)` and `step(updates, state)`."""

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        return step(updates, state)

    return lambda: optax.GradientTransformationExtraArgs(init, update)


def descends(direction):
    """Return the recipe form of a `make` of a direction."""

    def make(learning_rate: optax.ScalarOrSchedule = 0.1):
        return optax.chain(direction(), optax.scale_by_learning_rate(learning_rate))

    return make


def tree_map(fn):
    return partial(jax.tree.map, fn)


identity = optax.identity
momentum = optlab.interpolate_momentum
sgd = descends(identity)
zeros = tree_map(jnp.zeros_like)
scaled = lambda c: tree_map(lambda x: c * x)  # noqa: E731


def norm(x, *axes):
    return jnp.sqrt(jnp.sum(x**2, axis=axes or None, keepdims=True))


def drifting_count():
    """Return a count that is int32 at init and float32 afterwards."""
    return with_state(lambda p: jnp.zeros([], jnp.int32), lambda u, s: (u, s + 1.0))()


def grows_with_each_init():
    """Return a state with one leaf more after every init: no template for a checkpoint."""
    calls = itertools.count(1)
    init = lambda p: [jnp.zeros([]) for _ in range(next(calls))]  # noqa: E731
    return lambda: with_state(init, lambda u, s: (u, s))()


def hidden_counter():
    """Return updates scaled by a Python counter that survives between calls."""
    calls = itertools.count(1)
    return whole(lambda u, p: scaled(1.0 * next(calls))(u))()


def counts_its_builds():
    """Return a `make` whose every product is another transformation."""
    builds = itertools.count(1)

    def make():
        factor = 1.0 * next(builds)
        return stateless(lambda u, p: factor * u)()

    return make


def mixes_equal_shapes_up(params):
    """Return zeros that lie where the first leaf of their shape lies."""
    first = {}
    for p in jax.tree.leaves(params):
        first.setdefault(p.shape, p)
    return jax.tree.map(lambda p: _leafwise.zeros_like(first[p.shape]), params)


def scales_arrays_in_place(updates, params):
    for u in jax.tree.leaves(updates):
        if isinstance(u, np.ndarray):
            u *= 2
    return updates


def normalizes_over_the_batch():
    """Return an update whose vmap rule mixes the batch."""
    call = jax.custom_batching.custom_vmap(lambda u: 2 * u)

    @call.def_vmap
    def _(axis_size, in_batched, u):
        return 2 * jnp.broadcast_to(jnp.mean(u, axis=0, keepdims=True), u.shape), True

    return stateless(lambda u, p: call(u))()


def prefers_dicts(updates, params):
    return scaled(2.0 if isinstance(updates, dict) else 1.0)(updates)


def fills_holes(is_hole):
    is_leaf = lambda x: x is None or is_hole(x)  # noqa: E731
    fill = lambda u: jnp.zeros([]) if is_hole(u) else u  # noqa: E731
    return whole(lambda u, p: jax.tree.map(fill, u, is_leaf=is_leaf))


def counts_masked_leaves(updates, params):
    is_leaf = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return scaled(1.0 / len(jax.tree.leaves(updates, is_leaf=is_leaf)))(updates)


def branches_on_a_hyperparameter(rate: ArrayLike = 0.5):
    return stateless(lambda u, p: u * rate if rate > 0.1 else u)()


def ignores_a_hyperparameter(rate: ArrayLike = 0.5):
    factor = float(rate) if isinstance(rate, float) else 0.5
    return stateless(lambda u, p: u * factor)()


def reacts_to_unknown_arguments():
    def update(updates, state, params=None, **extra_args):
        return scaled(2.0 if extra_args else 1.0)(updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def refuses_unknown_arguments():
    def update(updates, state, params=None):
        return updates, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def hides_params(inner=None):
    inner = optax.with_extra_args_support(inner or identity())

    def update(updates, state, params=None, **extra_args):
        return inner.update(updates, state, None, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def drops_extra_args(inner=None):
    inner = optax.with_extra_args_support(inner or identity())
    return optax.GradientTransformationExtraArgs(
        inner.init, lambda u, s, p=None, **extra_args: inner.update(u, s, p)
    )


def forwards(inner=None):
    inner = optax.with_extra_args_support(inner or identity())
    return optax.GradientTransformationExtraArgs(inner.init, inner.update)


def forgets_the_sign_of_schedules(learning_rate: optax.ScalarOrSchedule = 0.1):
    if callable(learning_rate):
        return optax.scale_by_schedule(learning_rate)
    return optax.scale(-learning_rate)


def factored_state():
    """Return row sums kept inside the parameter tree, where Flax copies its metadata onto them."""
    init = tree_map(lambda p: jnp.zeros(p.shape[:1]))
    return with_state(init)()


def counts_devices():
    """Return updates that depend on how many devices the parameters were on at init."""
    count = lambda p: jnp.float32(len(p.sharding.device_set))  # noqa: E731
    step = lambda u, s: (jax.tree.map(jnp.multiply, u, s), s)  # noqa: E731
    return with_state(tree_map(count), step)()


def sums_over_an_axis():
    """Return updates summed over an axis that happens to have the expected name."""

    def leaf(u, p):
        try:
            return jax.lax.psum(u, "batch")
        except NameError:
            return u

    return stateless(leaf)()


def carries_a_constant():
    """Return a loop whose carry starts as a constant, the same on all devices, and ends varying."""
    add = lambda u: jax.lax.fori_loop(0, 3, lambda _, total: total + u, jnp.zeros(u.shape))  # noqa: E731
    return stateless(lambda u, p: add(u))()


def unit_norm_of_params(updates, params):
    return jax.tree.map(lambda u, p: u * norm(p) / norm(u), updates, params)


def global_norm(updates, params):
    return scaled(1 / optax.tree.norm(updates))(updates)


def svd_polar(u, p):
    if u.ndim != 2:
        return u
    left, _, right = jnp.linalg.svd(u, full_matrices=False)
    return left @ right


def rank_of(rank: int = 2):
    def leaf(u, p):
        if u.ndim != 2:
            return u
        left, values, right = jnp.linalg.svd(u, full_matrices=False)
        return (left[:, :rank] * values[None, :rank]) @ right[:rank]

    return stateless(leaf)()


def ramp(step):
    return jnp.minimum(step / 1000, 1.0)
