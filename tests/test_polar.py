"""Polar factors: references, laws, the two forms, FLOPs, arguments."""

import functools
import itertools
import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from polar_cases import (
    COLS,
    FORMS,
    ITERATIONS,
    ROWS,
    expected,
    in_float32,
    in_float64,
    log_spaced,
    matrix,
    rotation,
    using,
    values_of,
)
from reference import polar as reference

from optlab.linalg import polar
from optlab.linalg.polar import NewtonSchulz, by_name, eigh_polar, svd_polar

EXACT = {"svd": svd_polar, "eigh": eigh_polar}
METHODS = ITERATIONS | EXACT
each_method = pytest.mark.parametrize("name", METHODS)
each_iteration = pytest.mark.parametrize("name", ITERATIONS)
each_form = pytest.mark.parametrize("form", FORMS)


# --- against the reference ----------------------------------------------------------------------

# A rank-deficient one has values that rounding makes, not the input: it must not matter.
INPUTS = {
    "wide": log_spaced(10)[0],
    "tall": log_spaced(10, COLS, ROWS)[0],
    "square": log_spaced(10, ROWS, ROWS)[0],
    "large": 1e3 * log_spaced(10)[0],
    "small": 1e-3 * log_spaced(10)[0],
    "rank two": matrix([0.6, 0.3])[0],
    "row": matrix([0.7], 1, COLS)[0],
    "column": matrix([0.7], COLS, 1)[0],
}


@each_form
@each_iteration
def test_iteration_follows_its_reference(name, form):
    iteration = using(ITERATIONS[name], form=form)
    slope = np.prod([a for a, _, _ in iteration.table])
    for label, x in INPUTS.items():
        close = functools.partial(
            np.testing.assert_allclose,
            desired=expected(iteration, x), rtol=0, err_msg=label,
        )  # fmt: skip
        close(in_float64(iteration, x), atol=1e-10)
        # Rounding grows by the slope at zero: in a null space, and by CANS everywhere, which sends
        # 1 as far down as the smallest value.
        noisy = label == "rank two" or name == "cans"
        close(in_float32(iteration, x), atol=max(1e-5, slope * 2.0**-24) if noisy else 1e-5)


@pytest.mark.parametrize("name", EXACT)
def test_exact_form_is_the_partial_isometry(name):
    for label, x in INPUTS.items():
        want = reference.svd_polar(x, np.linalg.matrix_rank(x))
        found = in_float64(EXACT[name], x)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-12, err_msg=label)
        np.testing.assert_allclose(in_float64(EXACT[name], found), found, rtol=0, atol=1e-12)
        np.testing.assert_allclose(in_float32(EXACT[name], x), want, rtol=0, atol=1e-5)


def test_exact_forms_hold_the_accuracy_that_they_state():
    for dtype, run in (("float32", in_float32), ("float64", in_float64)):
        cutoff = np.sqrt(COLS * np.finfo(dtype).eps)
        for factor, error in ((1.5, 0.05), (30.0, 2e-3)):
            x, want = log_spaced(1 / (factor * cutoff))
            assert np.abs(run(eigh_polar, x) - want).max() < error
            assert np.abs(run(svd_polar, x) - want).max() < np.finfo(dtype).eps / cutoff * 20
        (below,) = values_of(run(eigh_polar, matrix([1.0, cutoff / 2])[0]))[1:2]
        assert below < 1e-6


# --- laws ---------------------------------------------------------------------------------------

spectra = st.lists(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0]), min_size=ROWS, max_size=ROWS)
seeds = st.integers(0, 2**20)


@each_method
@settings(max_examples=10)
@given(spectrum=spectra, seed=seeds)
def test_transposing_commutes(name, spectrum, seed):
    x, _ = matrix(spectrum, seed=seed)
    found = in_float64(METHODS[name], x.T)
    np.testing.assert_allclose(found, in_float64(METHODS[name], x).T, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("rows", "cols"), [(ROWS, COLS), (COLS, ROWS), (ROWS, ROWS)])
def test_aol_scales_the_short_side_and_of_a_square_matrix_the_rows(rows, cols):
    x = log_spaced(10, rows, cols)[0]
    wide = rows <= cols
    factors = 1 / np.sqrt(np.abs(x @ x.T if wide else x.T @ x).sum(axis=1))
    scaled = x * (factors[:, None] if wide else factors)
    identity = NewtonSchulz([(1.0, 0.0, 0.0)], normalization="aol", eps=0.0)
    np.testing.assert_allclose(in_float64(identity, x), scaled, rtol=0, atol=1e-12)
    assert values_of(scaled)[0] <= 1 + 1e-12
    transposed = np.abs(in_float64(polar.turbo(), x.T).T - in_float64(polar.turbo(), x)).max()
    assert transposed > 0.01 if rows == cols else transposed < 1e-12


@pytest.mark.parametrize("name", [name for name in METHODS if name != "turbo"])
@settings(max_examples=10)
@given(spectrum=spectra, seed=seeds)
def test_rotations_commute(name, spectrum, seed):
    x, _ = matrix(spectrum, seed=seed)
    q, r = rotation(ROWS, ROWS, seed + 2), rotation(COLS, COLS, seed + 3)
    found = in_float64(METHODS[name], q @ x @ r)
    np.testing.assert_allclose(found, q @ in_float64(METHODS[name], x) @ r, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "user"])
@settings(max_examples=10)
@given(spectrum=spectra, seed=seeds, exponent=st.integers(-6, 20))
def test_scale_does_not_matter(name, spectrum, seed, exponent):
    x, _ = matrix(spectrum, seed=seed)
    method = METHODS[name] if name in EXACT else using(ITERATIONS[name], eps=0.0)
    found = in_float64(method, x * 2.0**exponent)
    np.testing.assert_allclose(found, in_float64(method, x), rtol=0, atol=1e-9)


@each_method
def test_batch_equals_one_by_one(name):
    x, other = log_spaced(10)[0], log_spaced(100, seed=7)[0]
    xs = [x, matrix([0.5])[0], 0 * x, other, 1e15 * x, 1e-30 * x]
    batch = in_float32(METHODS[name], np.reshape(xs, (2, 3, ROWS, COLS)))
    one_by_one = np.reshape([in_float32(METHODS[name], x) for x in xs], batch.shape)
    np.testing.assert_allclose(batch, one_by_one, rtol=0, atol=2e-5)


@each_method
def test_zero_gives_zero(name):
    zero = jnp.zeros((ROWS, COLS))
    variants = [METHODS[name]]
    if name in ITERATIONS:
        variants = [
            using(METHODS[name], form=form, guard=guard, eps=eps, dtype=dtype)
            for form, guard, eps in itertools.product(FORMS, ("add", "max"), (0.0, 1e-7))
            for dtype in (None, "bfloat16")
        ]
    for method in variants:
        assert not np.any(np.asarray(method(zero), np.float32))


@each_method
def test_huge_and_tiny_entries_stay_finite(name):
    x = log_spaced(100)[0]
    variants = [using(METHODS[name], form=form) for form in FORMS] if name in ITERATIONS else []
    for method, scale in itertools.product([METHODS[name], *variants], (1e30, 1e-30)):
        found = in_float32(method, x * scale)
        assert np.all(np.isfinite(found))
        if name in EXACT:
            np.testing.assert_allclose(found, log_spaced(100)[1], rtol=0, atol=2e-3)


@each_method
def test_nan_is_not_hidden(name):
    x = log_spaced(10)[0]
    x[1, 2] = np.nan
    assert np.isnan(in_float32(METHODS[name], x)).any()


# --- the Gram form ------------------------------------------------------------------------------


@each_iteration
def test_gram_form_equals_the_direct_form(name):
    direct, gram = (using(ITERATIONS[name], form=form) for form in FORMS)
    x, _ = log_spaced(1e4, 32, 256)
    np.testing.assert_allclose(in_float64(gram, x), in_float64(direct, x), rtol=0, atol=1e-10)
    np.testing.assert_allclose(in_float32(gram, x), in_float32(direct, x), rtol=0, atol=5e-5)


def test_restarts_keep_bfloat16_alive():
    """At a condition of 1e4: none breaks, one of six steps overshoots, every second holds."""
    x = jnp.asarray(log_spaced(1e4, 32, 256)[0], "float32")
    run = lambda **options: np.asarray(  # noqa: E731
        polar.polar_express(form="gram", dtype="bfloat16", **options)(x), np.float64
    )
    never = run(restarts=())
    assert not np.all(np.isfinite(never)) or values_of(never).max() > 1e3
    assert values_of(run(restarts=(2,))).max() > 2
    assert values_of(run()).max() < 1.1


def test_default_restarts():
    lengths = lambda steps, dtype: [len(p) for p in polar.keller(steps).phases(dtype)]  # noqa: E731
    assert lengths(5, "float32") == [2, 3]
    assert lengths(6, "float32") == [2, 4]
    assert lengths(8, "float32") == [2, 3, 3]
    assert lengths(5, "bfloat16") == [2, 2, 1]
    assert lengths(5, "float64") == [5]
    assert [lengths(2, dtype) for dtype in ("float32", "bfloat16")] == [[2], [2]]
    cut = polar.keller(restarts=(1, 4)).phases("bfloat16")
    assert [len(p) for p in cut] == [1, 3, 1]


def test_dtype_of_the_iteration():
    x, _ = log_spaced(10)
    for ours, asked, found in (
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ):
        assert polar.keller(dtype=asked)(jnp.asarray(x, ours)).dtype == found
        assert polar.keller(dtype=asked).compute_dtype(ours) == found
    with jax.enable_x64(True):
        assert polar.keller()(jnp.asarray(x)).dtype == "float64"


# --- FLOPs --------------------------------------------------------------------------------------

SIDE = 64


@functools.cache
def counted(iteration, rows, cols):
    """The compiler's own count, elementwise work included."""
    x = jax.ShapeDtypeStruct((rows, cols), "float32")
    return jax.jit(iteration).lower(x).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("aspect", [1, 4, 8])
def test_flops_are_those_of_the_compiler(aspect):
    for iteration in (polar.keller(), polar.cans(4), polar.keller(restarts=())):
        for form in FORMS:
            f = using(iteration, form=form)
            assert counted(f, SIDE, aspect * SIDE) == pytest.approx(
                f.flops(SIDE, aspect * SIDE, "float32"), rel=0.05
            )
    tall, wide = counted(f, aspect * SIDE, SIDE), counted(f, SIDE, aspect * SIDE)
    assert tall == pytest.approx(wide, rel=0.01)


@pytest.mark.parametrize(
    ("aspect", "restarts", "most"),
    [(1, None, 1.0), (4, None, 0.67), (8, None, 0.55), (4, (), 0.56), (8, (), 0.40)],
)
def test_flops_beside_the_standard_five_steps(aspect, restarts, most):
    standard = counted(polar.keller(form="direct"), SIDE, aspect * SIDE)
    assert counted(polar.keller(restarts=restarts), SIDE, aspect * SIDE) <= most * standard


@given(
    name=st.sampled_from(list(ITERATIONS)),
    shape=st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    dtype=st.sampled_from(["bfloat16", "float32", "float64"]),
)
def test_the_form_of_fewer_flops_runs(name, shape, dtype):
    auto = ITERATIONS[name]
    both = [using(auto, form=form).flops(*shape, dtype) for form in FORMS]
    assert auto.flops(*shape, dtype) == min(both)
    assert auto.uses_gram(*shape, dtype) == auto.uses_gram(*shape[::-1], dtype)


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"table": ()}, "table must be rows (a, b, c), at least one, got ()"),
        (
            {"table": [(1.5, -0.5)]},
            "table must be rows of three numbers (a, b, c), got (1.5, -0.5)",
        ),
        ({"normalization": "l2"}, "normalization must be one of ('frobenius', 'schatten', 'aol')"),
        ({"guard": "sum"}, "guard must be 'add' or 'max', got 'sum'"),
        ({"form": "fast"}, "form must be one of ('auto', 'direct', 'gram'), got 'fast'"),
        ({"safety": 0.9}, "safety must be >= 1, got 0.9"),
        ({"safety": float("nan")}, "safety must be >= 1, got nan"),
        ({"eps": -1e-7}, "eps must be >= 0, got -1e-07"),
        ({"restarts": (5,)}, "restarts must be increasing step numbers in [1, 4], got (5,)"),
        ({"restarts": (0,)}, "restarts must be increasing step numbers in [1, 4], got (0,)"),
        ({"restarts": (3, 2)}, "restarts must be increasing step numbers in [1, 4], got (3, 2)"),
        ({"restarts": (2, 2)}, "restarts must be increasing step numbers in [1, 4], got (2, 2)"),
        ({"dtype": "float16"}, "dtype must be None, float32, float64 or bfloat16, got 'float16'"),
        ({"dtype": "int32"}, "dtype must be None, float32, float64 or bfloat16, got 'int32'"),
    ],
)
def test_bad_argument_is_refused(arguments, said):
    with pytest.raises(ValueError, match=re.escape(f"NewtonSchulz: {said}")):
        NewtonSchulz(**({"table": polar.keller().table} | arguments))


def test_a_table_of_arrays_is_hashable():
    table = np.asarray(polar.keller().table)
    assert NewtonSchulz(table) == polar.keller()
    assert hash(NewtonSchulz(table)) == hash(polar.keller())


def test_every_name_is_a_function_of_a_matrix():
    assert set(by_name) == {"keller", "you", "polar_express", "turbo", "cans", "svd", "eigh"}
    for f in by_name.values():
        assert f(jnp.ones((3, 2))).shape == (3, 2)


def test_a_tpu_multiplies_float32_in_bfloat16_and_restarts_as_often(monkeypatch):
    cuts = lambda method: [len(rows) for rows in method.phases(jnp.float32)]  # noqa: E731
    assert cuts(polar.keller()) == [2, 3]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert cuts(polar.keller()) == [2, 2, 1]
    assert cuts(polar.keller(precision="highest")) == [2, 3]
    with jax.default_matmul_precision("float32"):
        assert cuts(polar.keller()) == [2, 3]
