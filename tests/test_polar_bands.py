"""Polar factors: where the singular values come out, as every docstring states it."""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from polar_cases import (
    FORMS,
    ITERATIONS,
    expected,
    in_float32,
    in_float64,
    log_spaced,
    matrix,
    using,
    values_of,
)

from optlab.linalg import coefficients, polar
from optlab.linalg.polar import NewtonSchulz

each_iteration = pytest.mark.parametrize("name", ITERATIONS)
each_form = pytest.mark.parametrize("form", FORMS)


class Band(NamedTuple):
    """Where the docstring of `maker` says that values in [lower, 1] come out."""

    maker: Callable[..., NewtonSchulz]
    steps: int
    lower: float
    low: float
    high: float

    def make(self, **options):
        steps = {} if self.maker is polar.polar_express_cushion else {"steps": self.steps}
        return self.maker(**steps, **options)


BANDS = [
    Band(polar.keller, 5, 0.01, 0.68, 1.14),
    Band(polar.keller, 5, 0.001, 0.47, 1.21),
    Band(polar.you, 5, 0.01, 0.97, 1.04),
    Band(polar.you, 5, 0.001, 0.47, 1.15),
    Band(polar.polar_express, 5, 0.001, 0.84, 1.13),
    Band(polar.polar_express, 6, 0.001, 0.993, 1.002),
    Band(polar.polar_express, 8, 0.001, 1 - 1e-5, 1 + 1e-5),
    Band(polar.polar_express_cushion, 5, 0.001, 0.84, 1.15),
    Band(polar.turbo, 4, 0.01, 0.94, 1.06),
    Band(polar.turbo, 4, 0.001, 0.14, 1.06),
    Band(polar.cans, 9, 0.001, 0.997, 1.003),
]
_band_name = lambda band: f"{band.maker.__name__}-{band.steps}-{band.lower}"  # noqa: E731
each_band = pytest.mark.parametrize("band", BANDS, ids=_band_name)


@pytest.mark.parametrize("maker", dict.fromkeys(band.maker for band in BANDS))
def test_docstring_states_these_bands_and_slopes(maker):
    stated = re.findall(r"\[([\d.]+), ([\d.]+)\]", maker.__doc__)
    # Polar Express says its eighth step in words.
    held = {(b.low, b.high) for b in BANDS if b.maker is maker and b.steps != 8}
    assert {(float(low), float(high)) for low, high in stated if high != "1"} == held
    for slope in re.findall(r"[Ss]lope (?:at zero )?(\d+)", maker.__doc__):
        assert round(np.prod([a for a, _, _ in maker().table])) == int(slope)


@each_band
def test_band_holds_on_a_grid_and_is_not_wider_than_it_must_be(band):
    iteration = band.make()
    grid = np.geomspace(band.lower, 1, 100_001)
    # Of X / (safety |X|) by the docstring; of X / |X| too.
    for values in (grid, grid / iteration.safety):
        found = coefficients.scalar_map(iteration.table, values)
        assert band.low <= found.min()
        assert found.max() <= band.high
        assert found.min() - band.low < 0.02
        assert band.high - found.max() < 0.01


def normalized_values(iteration, x):
    """Singular values of the matrix on which the iteration starts."""
    return values_of(expected(using(iteration, table=[(1.0, 0.0, 0.0)]), x))


@each_iteration
def test_iteration_maps_every_singular_value_by_the_polynomials(name):
    x, iteration = log_spaced(100)[0], ITERATIONS[name]
    mapped = coefficients.scalar_map(iteration.table, normalized_values(iteration, x))
    np.testing.assert_allclose(
        values_of(in_float64(iteration, x)), np.sort(mapped)[::-1], rtol=0, atol=1e-12
    )


# Between 1 and the smallest, and almost all of the norm in one value.
SPECTRA = {
    "log": lambda lower: np.geomspace(4 * lower, 1, 8),
    "spike": lambda lower: np.array([1.0] + 7 * [4 * lower]),
}


@each_form
@pytest.mark.parametrize("spectrum", SPECTRA)
@each_band
def test_band_holds_for_matrices(band, spectrum, form):
    iteration = band.make(form=form)
    x, _ = matrix(SPECTRA[spectrum](band.lower), 8, 32)
    assert normalized_values(iteration, x).min() >= band.lower
    found = values_of(in_float32(iteration, x))
    # Float32 at a condition of 1e3.
    assert found.min() >= band.low - 1e-5
    assert found.max() <= band.high + 1e-5


@each_form
@pytest.mark.parametrize("band", BANDS[:-1], ids=_band_name)
def test_bfloat16_leaves_the_band_by_a_tenth_at_most(band, form):
    iteration = band.make(form=form, dtype="bfloat16")
    for seed in range(3):
        found = iteration(jnp.asarray(np.random.default_rng(seed).normal(size=(8, 32)), "float32"))
        assert found.dtype == "bfloat16"
        values = values_of(found)
        assert values.min() >= band.low - 0.1
        assert values.max() <= band.high + 0.1


def test_cans_is_not_for_bfloat16():
    iteration = polar.cans(dtype="bfloat16")
    draws = [np.random.default_rng(seed).normal(size=(8, 32)) for seed in range(4)]
    assert min(values_of(iteration(jnp.asarray(x, "float32"))).min() for x in draws) < 0.5


@pytest.mark.parametrize(("lower", "steps"), [(1e-3, 9), (0.05, 5), (0.5, 3)])
def test_cans_tracks_the_interval_by_equioscillation(lower, steps):
    u, v = lower, 1.0
    for row in coefficients.cubic_minimax(lower, steps):
        grid = np.linspace(u, v, 100_001)
        found = coefficients.scalar_map([row], grid)
        # An odd cubic that is off by the same with three changes of sign is the nearest to 1.
        np.testing.assert_allclose(found[[0, -1]], found.min(), rtol=0, atol=1e-12)
        np.testing.assert_allclose(1 - found.min(), found.max() - 1, rtol=0, atol=1e-8)
        u, v = found.min(), 2 - found.min()
    assert v - u < 0.01 or lower == 0.05


def test_tables_are_cut_repeated_and_given_safety():
    table = coefficients.YOU
    assert coefficients.repeated(table, 3) == table[:3]
    assert coefficients.repeated(table, 7) == (*table, table[-1], table[-1])
    x = np.linspace(0, 1, 11)
    safe = coefficients.with_safety(table[:1], 1.05)
    np.testing.assert_allclose(
        coefficients.scalar_map(safe, x), coefficients.scalar_map(table[:1], x / 1.05), rtol=1e-14
    )
    # Polar Express gives it to the first seven rows.
    (*first, last) = polar.polar_express(8, safety=1.05).table
    assert first == list(coefficients.with_safety(coefficients.POLAR_EXPRESS[:7], 1.05))
    assert last == coefficients.POLAR_EXPRESS[7]
