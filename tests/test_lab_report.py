"""The page of a race or a study: whole, alone, honest; and the picture of thirty optimizers."""

import base64
import dataclasses
import html.parser
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from lab_studies import make

from optlab.lab import cli, figure, page, page_figures, page_race, page_study
from optlab.lab.config import Config

REACHES = {
    "gpt": {"adamw": [60, 62, 70], "lion": [40, 42, 44], "diffgrad": [90, 95, 400],
            "adamw at 0.5 of diffgrad's rate": [88, 90, 92]},
    "rows": {"adamw": [50, 55, 60], "lion": [400, 410, 420], "diffgrad": [56, 58, 60],
             "adamw at 0.5 of diffgrad's rate": [55, 57, 59]},
}  # fmt: skip
VOID = {"meta", "img"}


class Reader(html.parser.HTMLParser):
    """Keeps what a browser would show, and refuses tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.words, self.headings = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)
            if self.open[-1] == "h2":
                self.headings.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read(text, pictures):
    """Return the page as a reader sees it, after a look at what it must not have."""
    found = Reader(text)
    assert {"script", "link", "iframe"}.isdisjoint(found.tags)
    assert "http" not in found.text
    assert found.tags.count("img") == len(found.sources) == pictures
    for source in found.sources:
        kind, _, code = source.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert b"</svg>" in base64.b64decode(code)
    assert "@media print" in text
    return found


@pytest.fixture(scope="module")
def study_page():
    return page_study.write(make(REACHES))


def test_page_of_a_study_has_everything(study_page):
    found = read(study_page, pictures=5)
    assert found.headings == [
        "Who wins where", "Curves", "Performance profile", "In seconds", "Without tuning",
        "Controls", "What it costs", "How it was measured", "Every run",
    ]  # fmt: skip
    assert "gpt: lion is first with every seed." in found.text
    assert "rows: adamw is first; its seeds do not set it apart from diffgrad." in found.text
    assert "missed 3 of 3" in found.text  # lion on rows: losers are shown
    assert "95 (90 to 95, 1 missed)" in found.text
    assert "adamw at 0.5 of diffgrad's rate" in found.text
    assert "lie gpt 16%, rows 18% of its steps" in found.text
    assert found.text.count("tuned 1") == 8


def test_scores_on_the_page_are_those_of_the_medians(study_page):
    # AdamW: r = 62/42 on gpt and 1 on rows; Lion misses rows.
    adamw = ((4 - 62 / 42) + 3) / 6
    assert f"adamw {adamw:.3f}" in Reader(study_page).text
    assert "lion 0.500 (0.500 to 0.500)" in Reader(study_page).text
    headings, rows = page_study.standing(make(REACHES))
    assert [row[0] for row in rows] == ["adamw", "diffgrad", "lion"]
    assert headings[-2:] == ["gpt, steps", "rows, steps"]


def test_equal_numbers_make_an_equal_page(study_page):
    assert page_study.write(make(REACHES)) == study_page


def test_a_study_of_which_nothing_is_finished_says_so():
    begun = make({"gpt": {"adamw": [50, 50, 50]}})
    begun["runs"] = {key: run for key, run in begun["runs"].items() if "trial" in key}
    assert "No optimizer has finished" in read(page_study.write(begun), pictures=0).text


def results(count=4, diverged=()):
    """Return results.json of a race between `count` optimizers."""
    names = ["adamw", *(f"other_{i}" for i in range(1, count))]
    rates = dict.fromkeys(names, 1e-3)
    config = Config(
        "quick", tuple(names), rates, "wsd", None, "0" * 64, 100, 3, 2, 16, 2, 8, 4, 10, 8
    )
    x = np.arange(10, 101, 10)
    curves = {name: 2 - i / 100 + 3 * np.exp(-x / 20) for i, name in enumerate(names)}
    losses, timings = {}, {}
    for name in names:
        lost = name in diverged
        losses[name] = {
            "step": x.tolist(), "train": curves[name].tolist(), "held_out": curves[name].tolist(),
            "final": None if lost else curves[name][-1], "diverged_at": 7 if lost else None,
            "steps_to_adamw": None if lost else 90.0, "state_bytes_per_parameter": 8.0,
        }  # fmt: skip
        timings[name] = {
            "seconds": (x / 10).tolist(), "step_seconds": 0.1, "tokens_per_second": 10.0,
            "optimizer_share": 0.2, "compile_seconds": 1.0, "seconds_to_adamw": None,
        }  # fmt: skip
    return {
        "config": dataclasses.asdict(config), "seed": 3, "versions": {"jax": "1"},
        "device": "2 CPU cores", "text": "a <b> text", "text_bytes": 10, "parameters": 100,
        "losses": losses, "timings": timings,
    }  # fmt: skip


def test_page_of_a_race_has_everything():
    found = read(page_race.write(results(diverged=("other_2",))), pictures=3)
    assert found.headings == ["Who wins", "Curves", "What it costs", "Configuration"]
    assert "Learning to write a <b> text" in found.text
    assert "One seed (3)" in found.text
    assert "diverged at step 7" in found.text
    assert "adamw 0.001, other_1 0.001" in found.text


def test_the_page_is_written_from_a_folder(tmp_path, capsys):
    argv = ["race", "--report", f"--out={tmp_path}"]
    assert cli.main(argv) == 2
    assert "finds neither a finished race nor a study" in capsys.readouterr().err
    (tmp_path / "results.json").write_text(json.dumps(results()))
    assert cli.main(argv) == 0
    assert "Who wins" in (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize("count", [figure.MOST, 30])
def test_more_curves_than_colours_are_grey_and_said_to_be(count):
    plot = figure.draw(results(count))
    left = plot.axes[0]
    named = {text.get_text().split("  ")[0] for text in left.texts} - {"AdamW's final loss"}
    grey = [line for line in left.lines if line.get_color() == figure.PALE]
    says = " ".join(text.get_text() for text in plot.texts)
    figure.plt.close(plot)
    assert "adamw" in named
    if count <= figure.MOST:
        assert len(named) == count
        assert not grey
        assert "grey" not in says
    else:
        assert len(named) == figure.MOST - 1
        assert {f"other_{i}" for i in range(24, 30)} <= named
        assert len(grey) == count - len(named)
        assert f"In grey: the other {len(grey)}." in says


def test_words_are_no_markup():
    found = page.table(["<a>"], [[page.Cell("<b>&", "best")]], "<c>") + page.paragraph("<d>")
    assert "<b>" not in found
    assert "&lt;b&gt;&amp;" in found
    assert '<td class="best">' in found


def test_a_band_goes_from_the_least_to_the_largest():
    records = [{"step": [1, 2], "held_out": values} for values in ([3.0, 2.0], [5.0, 1.0], [4.0])]
    found = page_figures.line(records)
    assert (found.low[0], found.middle[0], found.high[0], len(found.x)) == (3, 4, 5, 1)
    assert page_figures.line([{"step": [], "held_out": []}]) is None


def test_names_stay_below_the_title_and_apart():
    axes = plt.figure().add_subplot()
    ends = {"far above": 9.0, "above": 3.0, "at the top": 1.0, "low": 0.1}
    page_figures._name(axes, ends, dict.fromkeys(ends, "black"))
    heights = {text.get_text(): text.xy[1] for text in axes.texts}
    heights = [heights[name] for name in ends]
    assert heights[0] < 1, "a name over the title"
    assert (np.diff(heights) < -0.05).all(), "names on each other"
    plt.close()
