"""Pictures of the diagnostics show what they were given."""

import contextlib

import matplotlib
import numpy as np
import pytest

from optlab.diagnostics import critical_batch, page, picture
from optlab.diagnostics.noise_scale import Gsnr
from optlab.diagnostics.sharpness import Trace
from optlab.linalg import lanczos


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw into a file, which must be a picture; return the axes."""
    kept, whole = [], page.page

    @contextlib.contextmanager
    def spied(*args):
        with whole(*args) as axes:
            kept.extend(np.ravel(axes))
            yield axes

    monkeypatch.setattr(page, "page", spied)

    def draw(fn, *args):
        path = tmp_path / "new" / "picture.png"
        fn(*args, path)
        assert path.read_bytes()[:4] == b"\x89PNG"
        return kept

    return draw


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_picture_of_sharpness_shows_the_histories_and_their_limits(drawn):
    run = {"step": [0, 10, 20], "sharpness": [1.0, 4.0, np.nan], "loss": [1.0, 0.1, 0.01]}
    axes = drawn(picture.draw_sharpness, {"a": run | {"limit": 5.0}, "b": run})
    below = axes[1]
    np.testing.assert_array_equal(below.lines[0].get_ydata(), run["sharpness"])
    np.testing.assert_array_equal(below.lines[1].get_ydata(), [5.0] * 3)
    assert texts(below) == ["a", "b"]
    assert axes[0].get_yscale() == "log"


def test_picture_of_a_spectrum_names_the_sharpness(drawn):
    found = lanczos.Ritz(np.array([-1.0, 2.0, 9.0]), np.array([0.5, 0.5, 0.0]), np.zeros(3))
    (ax,) = drawn(picture.draw_spectrum, found)
    # A value of no weight is a filler, not an eigenvalue.
    assert texts(ax) == ["sharpness 2"]
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [-1, 2])


def test_picture_of_a_trace_ends_at_its_value(drawn):
    found = Trace(np.float32(3), np.float32(1), np.array([1.0, 2.0, 6.0]))
    (ax,) = drawn(picture.draw_trace, found)
    np.testing.assert_allclose(ax.lines[1].get_ydata()[-1], found.value, rtol=1e-6)
    assert "±" in ax.texts[0].get_text()


def test_picture_of_the_noise_scale_labels_the_last_finite_value(drawn):
    run = {"step": [0, 1, 2], "noise_scale": [np.nan, 20.0, 50.0], "batch_size": 8}
    lost = run | {"noise_scale": [np.nan] * 3}
    (ax,) = drawn(picture.draw_noise_scale, {"adamw": run, "none": lost})
    assert texts(ax) == ["adamw"]
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [8] * 3)


def ratios(tree):
    return Gsnr(tree, np.float32(1), np.float32(1))


def test_picture_of_the_gsnr_has_a_row_per_leaf_with_its_median(drawn):
    tree = {"bias": np.array([1.0, 2.0, 4.0]), "kernel": np.array([[0.0], [0.2], [np.inf]])}
    (ax,) = drawn(picture.draw_gsnr, ratios(tree))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["kernel", "bias"]
    medians = [float(line.get_xdata()[0]) for line in ax.lines if len(line.get_xdata()) == 1]
    np.testing.assert_allclose(medians, [0.2, 2])


def test_picture_of_many_leaves_keeps_the_largest(drawn):
    tree = {f"layer{i:02}": np.ones(i + 1) for i in range(30)}
    (ax,) = drawn(picture.draw_gsnr, ratios(tree))
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == [f"layer{i:02}" for i in range(29, 5, -1)]


def test_picture_of_the_critical_batch_marks_it_on_the_curve(drawn):
    sizes, steps = [10, 100, 1000, 1], [1100.0, 200.0, 110.0, None]
    found = critical_batch(sizes, steps)
    (ax,) = drawn(picture.draw_critical_batch, sizes, steps, found)
    assert texts(ax) == ["10", "100", "1000", "critical batch 100"]
    diamond = [line for line in ax.lines if line.get_marker() == "D"]
    np.testing.assert_allclose(diamond[0].get_xydata(), [[200, 20000]], rtol=1e-6)


def test_picture_of_the_learning_rates_draws_what_diverged_at_the_start(drawn):
    runs = {"muon": ([0.01, 0.1], [2.0, 1.0]), "adamw": ([0.01, 0.1], [1.5, None])}
    (ax,) = drawn(picture.draw_lr_sensitivity, runs, 4.0)
    assert texts(ax) == ["muon  0.500", "adamw  1.250"]
    crosses = [line for line in ax.lines if line.get_marker() == "x"]
    np.testing.assert_array_equal(crosses[1].get_xydata(), [[0.1, 4.0]])


def test_picture_of_logit_sharpness_draws_the_median(drawn):
    run = {"step": [0, 5], "logit_sharpness": [[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]]}
    (ax,) = drawn(picture.draw_logit_sharpness, {"a": run, "b": run | {"logit_sharpness": [1, 2]}})
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2, 4])
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), [1, 2])


def test_pages_keep_their_margins_where_the_user_constrains_layouts(drawn):
    found = lanczos.Ritz(np.array([-1.0, 2.0]), np.array([0.5, 0.5]), np.zeros(2))
    with matplotlib.rc_context({"figure.constrained_layout.use": True}):
        (ax,) = drawn(picture.draw_spectrum, found)
    edges = (page.LEFT, page.BOTTOM, page.RIGHT, page.TOP)
    np.testing.assert_allclose(ax.get_position().extents, edges)
