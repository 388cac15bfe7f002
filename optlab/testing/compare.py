"""Comparisons of trees whose failures name the leaf."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from optlab.testing.case import leaves_by_path

Call = tuple[Any, ...]


def as_numpy(x: Any) -> np.ndarray:
    """Return an array's values as NumPy; a PRNG key as its data."""
    if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def same_structure(got: Any, want: Any, what: str) -> None:
    """Assert that two trees have the same structure."""
    a, b = jax.tree.structure(got), jax.tree.structure(want)
    assert a == b, f"{what}: the tree is {a}, {b} is expected"


def close(got: Any, want: Any, what: str, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Assert that two trees agree to a tolerance, `atol` relative to a leaf's largest value.

    Both are float32's; between device arrays of float64 they are 1e-4 of that. A leaf that cancels
    to almost nothing is measured against a hundredth of the tree's largest.
    """
    same_structure(got, want, what)
    expected = {path: as_numpy(x).astype(np.float64) for path, x in leaves_by_path(want).items()}
    sizes = {path: float(np.max(np.abs(x), initial=0.0)) for path, x in expected.items()}
    floor = max(0.01 * max(sizes.values(), default=0.0), 1e-30)
    for path, x in leaves_by_path(got).items():
        a, b, scale = as_numpy(x).astype(np.float64), expected[path], max(sizes[path], floor)
        part = 1e-4 if isinstance(x, jax.Array) and x.dtype == np.float64 else 1.0
        good = np.allclose(a, b, rtol=part * rtol, atol=part * atol * scale)
        assert good, f"{what}: leaf '{path}' is off by {np.max(np.abs(a - b))} of {scale}"


def equal(got: Any, want: Any, what: str) -> None:
    """Assert that two trees agree bit for bit."""
    same_structure(got, want, what)
    expected = leaves_by_path(want)
    for path, x in leaves_by_path(got).items():
        a, b = as_numpy(x), as_numpy(expected[path])
        good = a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        assert good, f"{what}: leaf '{path}' differs: {a.ravel()[:3]}..., {b.ravel()[:3]}..."


def finite(tree: Any, what: str) -> None:
    """Assert that every leaf is finite."""
    for path, x in leaves_by_path(tree).items():
        value = as_numpy(x).astype(np.float64)
        assert np.all(np.isfinite(value)), f"{what}: leaf '{path}' holds {value.ravel()[:3]}..."


def type_of(x: Any) -> str:
    """Return shape, dtype, weak type and sharding of an array, traced or not, as text."""
    aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    weak = " weak" * getattr(aval, "weak_type", False)
    spec = getattr(aval.sharding, "spec", ()) if isinstance(aval, jax.core.ShapedArray) else ()
    return f"{aval.dtype}{list(aval.shape)}{weak}{f' {spec}' if any(spec) else ''}"


def same_types(got: Any, want: Any, what: str) -> None:
    """Assert that two trees agree in shape, dtype, weak type and sharding type."""
    same_structure(got, want, what)
    expected = leaves_by_path(want)
    for path, x in leaves_by_path(got).items():
        a, b = type_of(x), type_of(expected[path])
        assert a == b, f"{what}: leaf '{path}' is {a}, {b} is expected"


def program(fn: Callable[..., Any], *args: Any) -> str:
    """Return the program JAX traces for a call, as text that two equal programs share."""

    def flat(*args):
        return jax.tree.leaves(fn(*args))

    leaves, treedef = jax.tree.flatten(args)
    text = str(jax.make_jaxpr(lambda *x: flat(*treedef.unflatten(x)))(*leaves))
    return re.sub(r"0x[0-9a-f]+", "", text)  # addresses of functions


def same_results(got: Call, want: Call, what: str, wanted: str | None = None) -> None:
    """Assert that two calls `(fn, *args)` give the same leaves; one program is proof enough.

    `wanted` is the program of `want`, where it is known.
    """
    if program(*got) == (wanted or program(*want)):
        return
    ours, theirs = (jax.tree.leaves(jax.jit(fn)(*args)) for fn, *args in (got, want))
    close(ours, theirs, what)


def differs(a: Any, b: Any, rtol: float = 1e-4) -> bool:
    """Tell whether two arrays differ by more than rounding."""
    a, b = (as_numpy(x).astype(np.float64) for x in (a, b))
    return bool(np.max(np.abs(a - b), initial=0) > rtol * np.max(np.abs(b), initial=0))
