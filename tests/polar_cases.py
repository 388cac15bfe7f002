"""Matrices of prescribed singular values, the iterations there are, and how tests run them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from reference import polar as reference
from stepping import FULL

from optlab.linalg import coefficients, polar
from optlab.linalg.polar import NewtonSchulz

ROWS, COLS = 5, 8
# Every table and normalization there is.
ITERATIONS = {
    "keller": polar.keller(),
    "you": polar.you(),
    "polar_express_5": polar.polar_express(5),
    "polar_express_6": polar.polar_express(),
    "polar_express_8": polar.polar_express(8),
    "cushion": polar.polar_express_cushion(),
    "turbo": polar.turbo(),
    "cans": polar.cans(),
    "schatten": polar.you(normalization="schatten", guard="max"),
    "user": NewtonSchulz(coefficients.repeated(coefficients.PADE, 3), safety=1.1, eps=0.01),
}
FORMS = ("direct", "gram")


def using(iteration, **changes):
    return dataclasses.replace(iteration, **changes)


def rotation(size, count, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0][:, :count]


def matrix(values, rows=ROWS, cols=COLS, seed=0):
    """Return a matrix of these singular values and its polar factor."""
    u, v = rotation(rows, len(values), seed), rotation(cols, len(values), seed + 1)
    return (u * values) @ v.T, u @ v.T


def log_spaced(condition, rows=ROWS, cols=COLS, seed=0):
    return matrix(np.geomspace(1 / condition, 1, min(rows, cols)), rows, cols, seed)


def expected(iteration, x):
    """The reference with the same table, normalization and guard."""
    fields = ("table", "normalization", "safety", "eps", "guard")
    given = {field: getattr(iteration, field) for field in fields}
    return reference.newton_schulz(np.asarray(x, np.float64), **given)


def values_of(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


def in_float64(f, *arrays):
    with jax.enable_x64(True):
        return np.asarray(f(*(jnp.asarray(x, "float64") for x in arrays)))


def in_float32(f, x):
    x = jnp.asarray(x, "float32")
    found = jax.jit(f, compiler_options=FULL)(x)
    assert found.dtype == "float32"
    return np.asarray(found, np.float64)
