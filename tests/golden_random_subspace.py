"""Replays the golden cases of intrinsic dimension; their maps are given, not drawn."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden_cases import Hyper

import optlab
from optlab.linalg import fastfood
from optlab.transforms.random_subspace import Maps, in_coordinates

TOLERANCE = 2e-6  # absolute, float32


def _names(arrays: Any) -> list[str]:
    return [key.removeprefix("param.") for key in arrays if key.startswith("param.")]


def _leaves(arrays: Any, prefix: str) -> list[jax.Array]:
    # One z is shared by all leaves: a list keeps the recorded order.
    return [jnp.asarray(arrays[prefix + name], "float32") for name in _names(arrays)]


def _adam(rate: float, **arguments: float) -> optax.GradientTransformation:
    # optax.adam's own correction by 1 - 0.999^t loses 13 bits of float32.
    return optax.chain(optlab.scale_by_moments(**arguments), optax.scale_by_learning_rate(rate))


def _inner(text: str) -> optax.GradientTransformation:
    """Build what is written as `sgd(lr=0.1, momentum=0.9)`."""
    match = re.fullmatch(r"(\w+)\((.*)\)", text)
    known = {"sgd": optax.sgd, "adam": _adam}
    if not match or match[1] not in known:
        raise NotImplementedError(f"inner {text!r}: only {sorted(known)} exist")
    given = {k.strip(): float(x) for k, x in (pair.split("=") for pair in match[2].split(","))}
    return known[match[1]](given.pop("lr"), **given)


def _dense(arrays: Any) -> Maps:
    matrices = _leaves(arrays, "extra.P.")

    def project(leaves, dim):
        del dim
        return jnp.stack([P.T @ x for P, x in zip(matrices, leaves, strict=True)]), None

    return Maps(
        project, lambda _, rows, sizes: [P @ w for P, w in zip(matrices, rows, strict=True)]
    )


def _fastfood(arrays: Any) -> Maps:
    signs, normals = _leaves(arrays, "extra.B."), _leaves(arrays, "extra.G.")
    orders = [jnp.asarray(arrays[f"extra.perm.{name}"], "int32") for name in _names(arrays)]
    parts = [fastfood.Fastfood(*given) for given in zip(signs, orders, normals, strict=True)]

    def project(leaves, dim):
        both = zip(parts, leaves, strict=True)
        return jnp.stack(
            [fastfood.project(p, fastfood.fill(x, p.signs.size), dim) for p, x in both]
        ), None

    def expand(_, rows, sizes):
        each = zip(parts, rows, sizes, strict=True)
        return [fastfood.cut(fastfood.expand(p, w), size) for p, w, size in each]

    for name, p, matrix in zip(_names(arrays), parts, _leaves(arrays, "extra.P."), strict=True):
        size, dim = matrix.shape
        assert p.signs.size == fastfood.length(size, dim)
        columns = jax.vmap(lambda z, p=p, size=size: fastfood.cut(fastfood.expand(p, z), size))
        found = columns(jnp.eye(dim)).T
        np.testing.assert_allclose(found, matrix, rtol=0, atol=TOLERANCE, err_msg=name)
    return Maps(project, expand)


def intrinsic_dimension(case: Any, arrays: Any) -> None:
    """Check the parameters after every step, and Fastfood's maps in their dense form."""
    h = Hyper(case["hyperparameters"])
    kinds, kind = {"dense": _dense, "fastfood": _fastfood}, h.pop("projection")
    if kind not in kinds:
        raise NotImplementedError(f"projection {kind!r}: only {sorted(kinds)} exist")
    tx = in_coordinates(_inner(h.pop("inner")), h.pop("d"), kinds[kind](arrays), h.pop("said"))
    if h:
        raise NotImplementedError(f"unknown hyperparameters {sorted(h)}")
    params = start = _leaves(arrays, "param.")
    state, step = tx.init(params), jax.jit(tx.update)
    for t in range(case["steps"]):
        updates, state = step(_leaves(arrays, f"grad.{t}."), state, params)
        params = optax.apply_updates(params, updates)
        for name, p in zip(_names(arrays), params, strict=True):
            want, what = arrays[f"out.{t}.{name}"], f"step {t}, {name}"
            np.testing.assert_allclose(p, want, rtol=0, atol=TOLERANCE, err_msg=what)
    moved = max(np.abs(p - s).max() for p, s in zip(params, start, strict=True))
    assert moved > 100 * TOLERANCE, "the case does not move: it proves nothing"


CASES = {"intrinsic_dimension": intrinsic_dimension}
