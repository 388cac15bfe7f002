"""README and guide: their code runs, their numbers are the recorded ones, their links lead on."""

import ast
import json
import re

import guide
import jax
import numpy as np
import pytest
import test_docstrings

import optlab
from optlab.lab import catalog, findings

RESULTS = guide.ROOT / "benchmarks" / "results"
TEXT = {page: page.read_text() for page in guide.PAGES}
BLOCKS = {
    f"{page.parent.name if page == guide.GUIDE else 'readme'}: {heading} {number}": (page, code)
    for page in guide.PAGES
    for heading, number, code in guide.sections(page)
}


# Below these blocks stands what they print, on 8 devices.
PRINTED = ("readme: Compose it 0", "readme: Orthogonalize on a mesh 0")


# A CPU has no memory of its host's before jaxlib 0.10.2, as the guide says.
ON_THE_HOST = "notebooks: Keep the state on the host 0"


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs_alone(name, monkeypatch, capsys):
    if name == ON_THE_HOST and jax.__version_info__ < (0, 10, 2):
        with pytest.raises(jax.errors.JaxRuntimeError, match="device_placement for Host"):
            guide.run(*BLOCKS[name], monkeypatch)
        return
    guide.run(*BLOCKS[name], monkeypatch)
    printed = capsys.readouterr().out.strip()
    assert name not in PRINTED or f"```\n{printed}\n```" in TEXT[guide.README]


def test_every_block_is_run():
    assert {*PRINTED, ON_THE_HOST} < set(BLOCKS)
    assert len(BLOCKS) == sum(text.count("```python\n") for text in TEXT.values()) == 26


def test_every_example_of_a_docstring_is_run():
    sources = (guide.ROOT / "optlab").rglob("*.py")
    nodes = (node for path in sources for node in ast.walk(ast.parse(path.read_text())))
    documented = (ast.FunctionDef, ast.ClassDef, ast.Module)
    texts = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
    shown = [text for text in texts if re.search(r"^\s*Examples?:\s*$|>>> ", text, re.MULTILINE)]
    assert len(shown) == len(test_docstrings.TESTS)


def test_catalogue_is_the_codes():
    text = TEXT[guide.README]
    table = re.search(r"<!-- catalogue.*?-->\n(.*?)<!-- end of catalogue -->", text, re.DOTALL)
    assert table.group(1) == catalog.markdown()


def test_every_public_name_is_mentioned():
    text = "\n".join(TEXT.values())
    missing = [name for name in optlab.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == []


# --- numbers --------------------------------------------------------------------------------------


def recorded(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows(text):
    """Yield the cells of the rows of a Markdown table, without its head."""
    for line in text.strip().splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def evidence():
    """Yield name, state, milliseconds, nats and rate of every method of the decision table."""
    found = re.search(
        r"<!-- evidence.*?-->\n(.*?)<!-- end of evidence -->", TEXT[guide.README], re.DOTALL
    )
    for _, take, *numbers, _ in rows(found.group(1)):
        names = re.findall(r"`(\w+)`", take)
        columns = [cell.split(", ") for cell in numbers]
        columns = [column if column != ["-"] else ["-"] * len(names) for column in columns]
        yield from zip(names, *columns, strict=True)


def test_the_decision_table_has_every_recipe():
    named = [name for name, *_ in evidence()]
    listed = [cells[1].strip("`") for cells in rows(catalog.markdown())]
    assert sorted(named) == sorted({*listed, "adamw"} - NOT_IN_THE_TABLE)


# Lion-K is Lion by default; GradNormLoRP is GaLore on directions.
NOT_IN_THE_TABLE = {"lion_k", "grad_norm_lorp"}


def test_nats_and_rates_are_the_best_of_the_recorded_sweep():
    losses = recorded("lr_sweep")["losses"]
    for name, _, _, nats, rate in evidence():
        best = min(losses[name], key=losses[name].get)
        assert (nats, rate) == (f"{losses[name][best]:.2f}", best), name


def test_state_is_that_of_the_catalogue():
    state = {cells[1].strip("`"): cells[3] for cells in rows(catalog.markdown())}
    for name, bytes_per_parameter, *_ in evidence():
        assert bytes_per_parameter == {"adamw": "8", **state}[name], name


def test_milliseconds_are_the_recorded_ones():
    measured = milliseconds()
    for name, _, shown, *_ in evidence():
        assert shown == (f"{measured[name]:.0f}" if name in measured else "-"), name


def milliseconds():
    """Return the recorded time of a step by method, of both tables."""
    low = {row["optimizer"]: row["p50 ms"] for row in recorded("low_rank_step")["rows"]}
    steps = recorded("step_time")["rows"]
    elementwise = {row["method"]: row["ms"] for row in steps if row["form"] == "optlab"}
    return {**low, **elementwise, "adamw": low["optax.adamw"]}


def test_steps_and_shares_are_those_of_the_picture():
    race, text = recorded("race"), " ".join(TEXT[guide.README].split())
    saved = {
        name: 100 * (1 - losses["steps_to_adamw"] / race["config"]["steps"])
        for name, losses in race["losses"].items()
        if losses["steps_to_adamw"]
    }
    assert f"in {saved['normuon']:.0f} % fewer steps and Muon in {saved['muon']:.0f} %" in text
    share = {name: 100 * timing["optimizer_share"] for name, timing in race["timings"].items()}
    shown = f"it is {share['muon']:.0f} % of a training step, AdamW's {share['adamw']:.0f} %"
    assert shown in text


@pytest.mark.parametrize("method", ["lion", "adabelief", "lamb", "muon"])
def test_times_beside_optax_are_the_recorded_ones(method):
    rows = {row["form"]: row for row in recorded("step_time")["rows"] if row["method"] == method}
    ours, theirs = rows["optlab"], rows["optax"]
    line = re.search(rf"(?m)^\| `{method}`, (GPT of 196|the same).*$", TEXT[guide.README])[0]
    assert f"| 1, {ours['temp %']:.0f} %" in line
    assert f"| {theirs['ms'] / ours['ms']:.1f}, {theirs['temp %']:.0f} %" in line


def test_the_study_found_what_is_said_of_it():
    store, text = recorded("study_runs"), " ".join(TEXT[guide.README].split())
    names = [name for name in findings.complete(store) if not findings.is_control(name)]
    found = findings.find(store, names)
    gpt, digits, rows = (found.workloads.index(name) for name in ("gpt", "digits", "rows"))
    ours, adamw = names.index("normuon"), names.index("adamw")
    for workload in (gpt, digits):
        assert (found.steps[:, :, workload].argmin(1) == ours).all()
    medians = found.medians(found.steps)
    times = medians[adamw] / medians[ours]
    said = "NorMuon comes first with every seed, in {:.1f} and {:.1f} times fewer steps than AdamW"
    assert said.format(times[gpt], times[digits]) in text
    assert np.flatnonzero(np.isfinite(found.steps[:, :, rows]).any(0)).tolist() == [adamw]
    assert "the one on rows only AdamW comes to, which set it" in text
    assert store["about"]["targets"]["rows"]["set_by"]["optimizer"] == "adamw"


def test_one_run_beside_three_is_the_recorded_one():
    text = " ".join(TEXT[guide.README].split())
    ratios = [row["ratio"] for row in recorded("controllers")["rows"] if "WSD-S" in row["run"]]
    less = [f"{100 * (1 - ratio):.1f}" for ratio in ratios]
    said = "losses are {}, {} and {} % below those of three cosine runs of 4200 steps in all"
    assert said.format(*less) in text


@pytest.mark.parametrize("preset", ["quick", "small"])
def test_every_recipe_ends_below_what_is_said(preset):
    text = " ".join(TEXT[guide.README].split())
    bound = float(re.search(r"what counting pairs of bytes reaches \(([\d.]+) nats\)", text)[1])
    losses = [row["held-out loss"] for row in recorded(f"catalogue_{preset}")["rows"]]
    assert len(losses) >= len(list(evidence()))
    assert max(losses) < bound


# --- links ----------------------------------------------------------------------------------------


def anchor(heading):
    """Return a heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return {anchor(heading) for heading in re.findall(r"(?m)^#+ (.*)$", text)}


@pytest.mark.parametrize("page", guide.PAGES, ids=["readme", "guide"])
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if not target.startswith("http"):
            path, _, place = target.partition("#")
            found = page.parent / path if path else page
            assert found.exists(), target
            assert not place or place in anchors(found.resolve()), target


def test_the_guide_lists_every_notebook():
    notebooks = {path.name for path in guide.GUIDE.parent.glob("*.ipynb")}
    assert notebooks <= set(re.findall(r"\((\w+\.ipynb)\)", TEXT[guide.GUIDE]))
