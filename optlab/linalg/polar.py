"""Polar factors of matrices: the nearest (semi-)orthogonal matrix, or nearly that.

Every function maps (..., m, n) to (..., m, n), each matrix by itself, from either side:
f(X^T) = f(X)^T, and nothing is transposed in memory. A zero matrix gives zero.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from optlab.linalg import coefficients
from optlab.linalg.coefficients import Row, Table

PolarFn: TypeAlias = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """An odd polynomial iteration that pushes all singular values towards 1.

    X_0 = X / (safety |X| + eps),   X_{k+1} = a X_k + (b G_k + c G_k^2) X_k,   G_k = X_k X_k^T

    with G on the short side, n <= m. The Gram form gives the same in exact arithmetic without
    touching X at every step: Z_k = a I + b R_k + c R_k^2, Q <- Q Z_k, R <- Z_k R_k Z_k from
    R_0 = G_0, Q = I, and X <- Q X at the end. It costs 8 m n^2 + 28 n^3 with one restart in five
    steps, the direct form 20 m n^2 + 10 n^3: two thirds at m = 4 n.

    Without a restart - X <- Q X and a new R - rounding errors grow with the condition number: at
    1e4 the float32 error is 4e-4 instead of 7e-6 (Polar Express), in bfloat16 there is no result at
    all: a phase of two steps leaves the band by 0.1, of three by 0.5, of four by a factor of ten.

    Args:
        table: a row (a, b, c) per step. A cubic has c = 0 and saves a product.
        normalization: "frobenius"; "schatten", |G|_F^(1/2), a tighter bound of the largest value;
            "aol", which scales every row (column, if m > n) i by (sum_j |G_ij|)^(-1/2). AOL brings
            the values closer to 1 than a norm can, and changes the polar factor unless the rows
            are orthogonal. Of a square matrix it scales the rows, so there f(X^T) is not f(X)^T.
        safety: room above the norm for rounding, >= 1.
        eps: guards the division, >= 0; a matrix of a norm near it comes out smaller.
        guard: how: "add", or "max", which divides by max(norm, eps).
        form: "direct", "gram", or "auto" for the one of fewer FLOPs.
        restarts: steps before which the Gram form starts again; None: before the third, and every
            third after it; where products are taken in bfloat16 every second (0.78 of the direct
            form's FLOPs at m = 4 n); in float64 none. () never: 0.56, for well-conditioned matrices
            in float32.
        dtype: dtype of the iteration; None for float32, or the input's if wider. Norms are taken
            in float32 at least.
        precision: of every product, as in `jax.lax.dot`; None for the backend's own, with which a
            TPU multiplies float32 in bfloat16.

    Raises:
        ValueError: at construction, an argument out of range.
    """

    table: Table
    normalization: Literal["frobenius", "schatten", "aol"] = "frobenius"
    safety: float = 1.0
    eps: float = 1e-7
    guard: Literal["add", "max"] = "add"
    form: Literal["auto", "direct", "gram"] = "auto"
    restarts: tuple[int, ...] | None = None
    dtype: DTypeLike | None = None
    precision: jax.lax.PrecisionLike = None

    def __post_init__(self):
        object.__setattr__(self, "table", tuple(tuple(map(float, row)) for row in self.table))
        _check(bool(self.table), "table", "rows (a, b, c), at least one", self.table)
        for row in self.table:
            _check(len(row) == 3, "table", "rows of three numbers (a, b, c)", row)
        _check(
            self.normalization in _NORMS, "normalization", f"one of {_NORMS}", self.normalization
        )
        _check(self.guard in ("add", "max"), "guard", "'add' or 'max'", self.guard)
        _check(self.form in _FORMS, "form", f"one of {_FORMS}", self.form)
        _check(self.safety >= 1, "safety", ">= 1", self.safety)
        _check(self.eps >= 0, "eps", ">= 0", self.eps)
        inside = all(0 < k < len(self.table) for k in self.restarts or ())
        increasing = list(self.restarts or ()) == sorted(set(self.restarts or ()))
        must = f"increasing step numbers in [1, {len(self.table) - 1}]"
        _check(inside and increasing, "restarts", must, self.restarts)
        if self.dtype is not None:
            wide = jnp.issubdtype(self.dtype, jnp.floating)
            wide = wide and float(jnp.finfo(self.dtype).max) > 1e30
            # The Gram matrix of an unscaled gradient overflows float16.
            _check(bool(wide), "dtype", "None, float32, float64 or bfloat16", self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the polar factors of (..., m, n), in the dtype of the iteration."""
        dtype = self.compute_dtype(x.dtype)
        rows, cols = x.shape[-2:]
        form = self._gram_form if self.uses_gram(rows, cols, dtype) else self._direct_form
        return form(x.astype(dtype), wide=rows <= cols)

    def compute_dtype(self, dtype: DTypeLike) -> jnp.dtype:
        """Return the dtype of the iteration for an input of `dtype`."""
        return jnp.dtype(self.dtype or jnp.promote_types(dtype, jnp.float32))

    def phases(self, dtype: DTypeLike) -> list[Table]:
        """Return the table cut at the restarts of the Gram form."""
        steps, cuts = len(self.table), self.restarts
        if cuts is None:
            by_bits = {64: (), 32: range(2, steps - 1, 3), 16: range(2, steps, 2)}
            cuts = by_bits[_bits_of_products(dtype, self.precision)]
        edges = [0, *cuts, steps]
        return [self.table[i:j] for i, j in itertools.pairwise(edges)]

    def uses_gram(self, rows: int, cols: int, dtype: DTypeLike) -> bool:
        """Tell whether the Gram form runs for matrices of this shape."""
        if self.form != "auto":
            return self.form == "gram"
        return sum(self.gram_flops(rows, cols, dtype)) < self.direct_flops(rows, cols)

    def direct_flops(self, rows: int, cols: int) -> int:
        """Return the FLOPs of the direct form for one matrix, its products only."""
        n, m = sorted((rows, cols))
        return sum(4 * m * n * n + 2 * n**3 * (c != 0) for _, _, c in self.table)

    def gram_flops(self, rows: int, cols: int, dtype: DTypeLike) -> tuple[int, int]:
        """Return the FLOPs of the Gram form: of products with X, and of n x n products."""
        n, m = sorted((rows, cols))
        phases = self.phases(dtype)
        squares = sum(c != 0 for _, _, c in self.table)
        cubic = squares + 3 * sum(len(rows) - 1 for rows in phases)
        return 4 * m * n * n * len(phases), 2 * n**3 * cubic

    def flops(self, rows: int, cols: int, dtype: DTypeLike) -> int:
        """Return the FLOPs of the form that runs for one matrix, its products only."""
        if self.uses_gram(rows, cols, dtype):
            return sum(self.gram_flops(rows, cols, dtype))
        return self.direct_flops(rows, cols)

    def gram(self, x: jax.Array, *, wide: bool) -> jax.Array:
        """Return X X^T if X is wide, else X^T X: the Gram matrix of the short side."""
        return self._product(x, x.mT) if wide else self._product(x.mT, x)

    def apply(self, q: jax.Array, x: jax.Array, *, wide: bool) -> jax.Array:
        """Return Q X if X is wide, else X Q^T: a factor times a matrix, on the short side."""
        return self._product(q, x) if wide else self._product(x, q.mT)

    def factor(self, r: jax.Array, rows: Table, *, first: bool) -> jax.Array:
        """Return Q of one phase from its Gram matrix; the first one normalizes as well."""
        scale = None
        if first:
            r, scale = self._normalized(r)
        eye = _eye(r)
        q = z = self._polynomial(r, rows[0]) + rows[0][0] * eye
        for row in rows[1:]:
            r = self._product(self._product(z, r), z)
            z = self._polynomial(r, row) + row[0] * eye
            q = self._product(q, z)
        return q if scale is None else q * scale[..., None, :]

    def _gram_form(self, x: jax.Array, *, wide: bool) -> jax.Array:
        for index, rows in enumerate(self.phases(x.dtype)):
            q = self.factor(self.gram(x, wide=wide), rows, first=index == 0)
            x = self.apply(q, x, wide=wide)
        return x

    def _direct_form(self, x: jax.Array, *, wide: bool) -> jax.Array:
        g, scale = self._normalized(self.gram(x, wide=wide))
        x = x * (scale[..., :, None] if wide else scale[..., None, :])
        for index, row in enumerate(self.table):
            g = self.gram(x, wide=wide) if index else g
            step = self.apply(self._polynomial(g, row), x, wide=wide)
            x = _added(row[0], x, 1.0, step)
        return x

    def _polynomial(self, r: jax.Array, row: Row) -> jax.Array:
        _, b, c = row
        return _added(b, r, c, self._product(r, r)) if c else b * r

    def _product(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return _rounded(jnp.matmul(x, y, precision=self.precision, preferred_element_type=x.dtype))

    def _normalized(self, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the Gram matrix of the normalized X, and the factors of X's short side."""
        exact = r.astype(jnp.promote_types(r.dtype, jnp.float32))
        # A norm that overflowed makes the matrix zero, as dividing by infinity would.
        scale = 1 / self._guarded(_size(exact, self.normalization))
        exact = jnp.where(scale[..., None] == 0, 0, exact * scale[..., :, None])
        return (exact * scale[..., None, :]).astype(r.dtype), scale.astype(r.dtype)

    def _guarded(self, size: jax.Array) -> jax.Array:
        size = self.safety * size
        size = size + self.eps if self.guard == "add" else jnp.maximum(size, self.eps)
        # Smaller norms have lost their squares. A zero matrix stays zero for eps = 0 too.
        return jnp.maximum(size, float(jnp.finfo(size.dtype).tiny) ** 0.5)


def _eye(r: jax.Array) -> jax.Array:
    """Return the identity that goes with square matrices (..., n, n)."""
    return jnp.expand_dims(jnp.eye(r.shape[-1], dtype=r.dtype), range(r.ndim - 2))


def _added(a: float, x: jax.Array, b: float, y: jax.Array) -> jax.Array:
    """Return a x + b y, rounded once.

    With each term rounded, Keller's five steps in bfloat16 are off by 6 % (root mean square, normal
    matrices of 10 to 256 columns, direct form); so by 2 to 3 %.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return _rounded((a * x.astype(wide) + b * y.astype(wide)).astype(x.dtype))


def _rounded(x: jax.Array) -> jax.Array:
    """Return x; in bfloat16 really rounded, and stored so.

    XLA would carry sums and products on in float32, in twice the memory: on the GPU 0.47 instead of
    0.32 of the parameters' bytes for a GPT of 170 leaves.
    """
    return jax.lax.optimization_barrier(x) if jnp.finfo(x.dtype).bits < 32 else x


def _bits_of_products(dtype: DTypeLike, precision: jax.lax.PrecisionLike) -> int:
    """Return the bits that factors keep: those of the dtype, or a TPU's 16."""
    context: Any = jax.config  # its settings are attributes made at run time
    asked = precision if precision is not None else context.jax_default_matmul_precision
    narrow = asked in (None, "default", "bfloat16", jax.lax.Precision.DEFAULT)
    bits = jnp.finfo(dtype).bits
    return 16 if bits == 32 and narrow and jax.default_backend() == "tpu" else bits


_NORMS = ("frobenius", "schatten", "aol")
_FORMS = ("auto", "direct", "gram")


def _check(good: bool, argument: str, must: str, value: object) -> None:
    if not good:
        raise ValueError(f"NewtonSchulz: {argument} must be {must}, got {value!r}.")


def _size(r: jax.Array, normalization: str) -> jax.Array:
    """Return what X is divided by, from its Gram matrix: (..., 1), or (..., n) for AOL."""
    trace = jnp.trace(r, axis1=-2, axis2=-1)[..., None]
    if normalization == "frobenius":
        return jnp.sqrt(trace)
    if normalization == "aol":
        size = jnp.sqrt(jnp.sum(jnp.abs(r), axis=-1))
    else:
        size = jnp.sqrt(jnp.sqrt(jnp.sum(r * r, axis=(-2, -1))))[..., None]
    # Of what overflowed the diagonal is infinite, and sums beside it infinity minus infinity.
    return jnp.where(jnp.isinf(trace), jnp.inf, size)


def keller(steps: int = 5, **options: Any) -> NewtonSchulz:
    """Keller Jordan's quintic, the same row at every step: Muon's own.

    Values in [0.01, 1] of the normalized matrix come out in [0.68, 1.14], those from 0.001 in
    [0.47, 1.21]: it never settles at 1. Slope at zero 485.
    """
    return NewtonSchulz(coefficients.repeated(coefficients.KELLER, steps), **options)


def you(steps: int = 5, **options: Any) -> NewtonSchulz:
    """Jiacheng You's table: [0.01, 1] to [0.97, 1.04], [0.001, 1] to [0.47, 1.15]; slope 493."""
    return NewtonSchulz(coefficients.repeated(coefficients.YOU, steps), **options)


def polar_express(steps: int = 6, *, safety: float = 1.01, **options: Any) -> NewtonSchulz:
    """Polar Express: in every step the best quintic for values from 0.001.

    [0.001, 1] comes out in [0.84, 1.13] after 5 steps, [0.993, 1.002] after 6, 1 to 1e-5 after 8.
    All rows but the eighth and what follows it leave room for rounding by `safety`.
    """
    table = coefficients.repeated(coefficients.POLAR_EXPRESS, steps)
    table = coefficients.with_safety(table[:7], safety) + table[7:]
    return NewtonSchulz(table, safety=safety, **options)


def polar_express_cushion(**options: Any) -> NewtonSchulz:
    """Polar Express tuned for five steps, as nanochat and Dion ship it: [0.001, 1] to [0.84, 1.15].

    The table has its safety inside; the norm gets 2 %.
    """
    options.setdefault("safety", 1.02)
    return NewtonSchulz(coefficients.POLAR_EXPRESS_CUSHION, **options)


def turbo(steps: int = 4, **options: Any) -> NewtonSchulz:
    """Four steps after AOL's scaling, which brings the values nearer to 1 than a norm does.

    Values in [0.01, 1] of the scaled matrix come out in [0.94, 1.06], those from 0.001 in
    [0.14, 1.06]. The polar factor is that of the scaled matrix.
    """
    options = {"normalization": "aol", "guard": "max", **options}
    return NewtonSchulz(coefficients.repeated(coefficients.TURBO, steps), **options)


def cans(steps: int = 9, *, lower: float = 1e-3, **options: Any) -> NewtonSchulz:
    """Chebyshev-accelerated cubics: in every step the best a x + b x^3 for what is left.

    [lower, 1] comes out in [0.997, 1.003] after 9 steps for lower = 0.001. A step has no n x n
    product, which pays for nearly square matrices on hardware that is slow on small ones. The first
    ones send the largest values down to the smallest, so rounding grows by up to 1 / lower: not for
    bfloat16.
    """
    options.setdefault("normalization", "schatten")
    return NewtonSchulz(coefficients.cubic_minimax(lower, steps), **options)


def svd_polar(x: jax.Array) -> jax.Array:
    """Return U V^T of (..., m, n): the exact polar factor, 1 on each nonzero singular value.

    Values under max(m, n) * eps * (the largest) count as zero and give nothing, so a zero matrix
    returns zero. The SVD of one (1024, 4096) leaf takes the TPU compiler minutes.
    """
    u, s, vh = jnp.linalg.svd(x, full_matrices=False)
    cutoff = max(x.shape[-2:]) * jnp.finfo(x.dtype).eps * s[..., :1]
    return jnp.matmul(u * (s > cutoff)[..., None, :], vh, precision="highest")


def eigh_polar(x: jax.Array) -> jax.Array:
    """Return G^(-1/2) X, G the Gram matrix of the short side: exact, cheaper than an SVD.

    Squaring halves the digits: singular values under sqrt(m eps) of the largest (3e-3 in float32
    at m = 64, 1e-7 in float64) count as zero, those near it are off by a few percent.
    """
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)  # or the squares of 1e30 and 1e-30 are lost
    wide = x.shape[-2] <= x.shape[-1]
    high = {"precision": "highest"}
    g = jnp.matmul(x, x.mT, **high) if wide else jnp.matmul(x.mT, x, **high)
    values, vectors = jnp.linalg.eigh(g)
    cutoff = max(x.shape[-2:]) * jnp.finfo(x.dtype).eps * values[..., -1:]
    roots = jnp.where(values > cutoff, jax.lax.rsqrt(jnp.maximum(values, cutoff)), 0)
    inverse = jnp.matmul(vectors * roots[..., None, :], vectors.mT, **high)
    return jnp.matmul(inverse, x, **high) if wide else jnp.matmul(x, inverse, **high)


by_name: dict[str, PolarFn] = {
    "keller": keller(),
    "you": you(),
    "polar_express": polar_express(),
    "turbo": turbo(),
    "cans": cans(),
    "svd": svd_polar,
    "eigh": eigh_polar,
}
