"""Types, state and memory: what a transformation stores, and in which dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optlab.testing import compare
from optlab.testing.case import Case, leaves_by_path
from optlab.testing.select import applies

# Eight million terabytes: any attempt to allocate a leaf of this size fails at once.
_HUGE = (2**24, 2**24)


def _abstract(tree, dtype=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree)


def _abstract_steps(case: Case, params, grads):
    """Return the abstract init state and the update and state of two steps."""
    state = jax.eval_shape(case.tx.init, params)
    first = jax.eval_shape(case.tx.update, grads, state, params)
    second = jax.eval_shape(case.tx.update, grads, first[1], params)
    return state, first, second


@applies()
def check_state_type_fixed_point(case: Case) -> None:
    """Update leaves every type of the state as it was, and returns the types of its input."""
    params = _abstract(case.tree)
    state, *steps = _abstract_steps(case, params, params)
    for updates, new_state in steps:
        compare.same_types(new_state, state, "state after update")
        compare.same_types(updates, params, "updates")


@applies()
def check_dtype_preserved(case: Case) -> None:
    """Half precision stays half, double stays double, and mixed trees keep their state's types."""
    for dtype in (jnp.bfloat16, jnp.float16):
        _check_one_dtype(case, dtype)
    with jax.enable_x64(True):
        _check_one_dtype(case, jnp.float64)
    params, grads = _abstract(case.tree), _abstract(case.tree, jnp.bfloat16)
    state, *steps = _abstract_steps(case, params, grads)
    for updates, new_state in steps:
        compare.same_types(new_state, state, "state, bfloat16 gradients of float32 parameters")
        new_params = jax.eval_shape(optax.apply_updates, params, updates)
        compare.same_types(new_params, params, "parameters updated with bfloat16 gradients")


def _check_one_dtype(case: Case, dtype) -> None:
    tree = _abstract(case.tree, dtype)
    state, *steps = _abstract_steps(case, tree, tree)
    for updates, new_state in steps:
        compare.same_types(new_state, state, f"state of a {jnp.dtype(dtype)} tree")
        compare.same_types(updates, tree, f"updates of a {jnp.dtype(dtype)} tree")


@applies()
def check_state_is_arrays(case: Case) -> None:
    """State holds arrays only, and none that merely repeats a constant at every step."""
    before = state = case.tx.init(case.tree)
    elsewhere = leaves_by_path(case.tx.init(case.grads()))
    for index in range(3):
        for path, leaf in leaves_by_path(state).items():
            assert isinstance(leaf, jax.Array), f"state leaf '{path}' is a {type(leaf).__name__}"
        _, state = case.step(case.grads(index), state, case.tree)
    after = leaves_by_path(state)
    for path, leaf in leaves_by_path(before).items():
        value = compare.as_numpy(leaf)
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        # A constant is the same after three steps, and for other parameters; zero is no constant.
        others = compare.as_numpy(after[path]), compare.as_numpy(elsewhere[path])
        varies = any(not np.array_equal(value, other) for other in others)
        assert is_key or varies or not value.any(), f"state leaf '{path}' is a constant, {value}"


@applies()
def check_init_abstract(case: Case) -> None:
    """Init takes shapes for arrays, agrees with itself on arrays, and allocates nothing traced."""
    concrete = case.tx.init(case.tree)
    compare.same_types(case.tx.init(_abstract(case.tree)), concrete, "init of shapes")
    compare.same_types(jax.eval_shape(case.tx.init, case.tree), concrete, "init under eval_shape")
    jax.eval_shape(case.tx.init, {"dense": {"kernel": jax.ShapeDtypeStruct(_HUGE, jnp.float32)}})


def _buffers(tree) -> list[int]:
    return [x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) if x.size]


@applies()
def check_no_aliasing(case: Case) -> None:
    """No two leaves of the parameters and the fresh state share memory."""
    pointers = _buffers((case.tree, case.tx.init(case.tree)))
    assert len(set(pointers)) == len(pointers), "leaves of (params, state) share a buffer"


@applies()
def check_donate(case: Case) -> None:
    """A train step that donates parameters and state runs twice with the same numbers."""

    def step(params, state, grads):
        updates, state = case.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    plain = donated = (case.tree, case.tx.init(case.tree))
    donated = jax.tree.map(jnp.copy, plain[0]), donated[1]
    donating = jax.jit(step, donate_argnums=(0, 1))
    plain_state = case.tx.init(case.tree)
    params = case.tree
    for index in range(2):
        updates, plain_state = case.step(case.grads(index), plain_state, params)
        params = optax.apply_updates(params, updates)
        donated = donating(*donated, case.grads(index))
    # Two programs, fused differently: a few roundings of the larger of p and u.
    compare.close(donated[0], params, "parameters after two donating steps", 1e-5, 1e-5)


def _through_bytes(state, template):
    leaves = [(compare.as_numpy(x).tobytes(), x) for x in jax.tree.leaves(state)]

    def read(raw, like):
        if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(like)
            words = jnp.asarray(np.frombuffer(raw, data.dtype).reshape(data.shape))
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(like))
        return jnp.asarray(np.frombuffer(raw, like.dtype).reshape(like.shape))

    flat, treedef = jax.tree.flatten(template)
    assert len(flat) == len(leaves), "a fresh init has another number of leaves than the state"
    return treedef.unflatten([read(raw, like) for (raw, _), like in zip(leaves, flat, strict=True)])


@applies()
def check_checkpoint_round_trip(case: Case) -> None:
    """State written as bytes and read into a fresh init continues bit for bit."""
    state = case.tx.init(case.tree)
    for index in range(2):
        _, state = case.step(case.grads(index), state, case.tree)
    restored = _through_bytes(state, case.make().init(case.tree))
    want = case.step(case.grads(2), state, case.tree)
    compare.equal(case.step(case.grads(2), restored, case.tree), want, "a step after restoring")


@applies()
def check_map_params(case: Case) -> None:
    """`optax.tree.map_params` walks the state, and doing nothing to it changes nothing."""
    state = case.tx.init(case.tree)
    mapped = optax.tree.map_params(case.tx, lambda x: x, state)
    compare.equal(mapped, state, "state after a map_params that does nothing")


@applies(needs=["state_bytes"])
def check_state_bytes(case: Case) -> None:
    """A large float32 matrix costs the stated bytes of state per parameter."""
    kernel = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    state = jax.eval_shape(case.tx.init, {"dense": {"kernel": kernel}})
    measured = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / kernel.size
    stated = case.fact("state_bytes")
    # Step counters and row statistics are allowed their 1 % of a byte.
    assert abs(measured - stated) < 0.01, f"{measured:.3f} bytes per parameter, {stated} stated"


@applies(needs=["stateless"])
def check_stateless(case: Case) -> None:
    """A method that calls itself stateless holds no array."""
    leaves = jax.tree.leaves(case.tx.init(case.tree))
    assert not leaves, f"the state holds {len(leaves)} arrays"


@applies(needs=["hits"])
def check_path_hit(case: Case) -> None:
    """The leaves the method claims differ from what its fallback makes of them."""
    plain = case.fallback()
    state, plain_state = case.tx.init(case.tree), plain.init(case.tree)
    for index in range(2):
        updates, state = case.step(case.grads(index), state, case.tree)
        others, plain_state = plain.update(case.grads(index), plain_state, case.tree)
    claimed, theirs = case.hit_leaves(updates), leaves_by_path(others)
    assert claimed, f"no leaf is claimed; the tree has {list(theirs)}"
    for path, leaf in claimed.items():
        assert compare.differs(leaf, theirs[path]), f"leaf '{path}' gets the fallback's update"


@applies()
def check_bfloat16_follows_float32(case: Case) -> None:
    """A bfloat16 leaf, the largest of the tree, gets the float32 update to bfloat16's rounding."""
    largest = max(x.size for x in jax.tree.leaves(case.tree))
    only = lambda x: x.astype(jnp.bfloat16) if x.size == largest else None  # noqa: E731
    half = jax.tree.map(only, (case.tree, case.grads()))
    full = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    got, want = (case.step(g, case.tx.init(p), p)[0] for p, g in (half, full))
    for path, leaf in leaves_by_path(got).items():
        a, b = (compare.as_numpy(x).astype(np.float64) for x in (leaf, leaves_by_path(want)[path]))
        scale = np.max(np.abs(b), initial=1e-30)
        # 8 bits of mantissa: 2^-8 per rounding, a few of them in a chain.
        assert np.median(np.abs(a - b)) <= 0.05 * scale, f"leaf '{path}' is off in bfloat16"


__all__ = [name for name in dir() if name.startswith("check_")]
