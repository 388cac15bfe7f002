"""Arrays of every dtype, and trees compared bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np

BITS = np.arange(256, dtype=np.uint8)


def raw(leaf):
    """The bytes of a leaf, typed keys among them."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(got, want):
    """Structure, dtypes, shapes and bits are equal."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.dtype, a.shape, raw(a)) == (b.dtype, b.shape, raw(b))
        assert isinstance(a, np.ndarray) == isinstance(b, np.ndarray)


def patterns(dtype):
    """An array of a dtype that goes through all its bit patterns of one byte, nans among them."""
    dtype = jnp.dtype(dtype)
    if dtype.itemsize > 1 or dtype.name.startswith("float8"):
        return jnp.asarray(BITS.view(dtype))
    if dtype.kind == "b":
        return jnp.asarray(BITS % 2 == 1)
    return jnp.asarray((BITS % 16).view(np.int8)).astype(dtype)
