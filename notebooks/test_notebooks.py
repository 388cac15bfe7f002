"""Every notebook of this folder, found by its number, runs and keeps the conventions.

`pytest notebooks` runs each in a fresh kernel, with OPTLAB_SMOKE=1. The conventions:

- NN_name.py in jupytext's percent format is the source. `python notebooks/pair.py` writes the
  .ipynb, without outputs; both are committed. ruff checks the .py.
- The file begins with `pair.HEADER` (kernel, Colab's accelerator). The first cell is text: the
  badge (`pair.py` fills in its line), a title, and the one question that the notebook answers. The
  second is `pair.INSTALL`, the third `pair.STYLE`, both to the letter: SMOKE, COLOURS, INK and
  FAINT come from there. XLA_FLAGS go into a cell of their own before JAX is imported.
- Then one cell of settings, `# @title Settings`: a `# @param` form for every number worth playing
  with, and below them `if SMOKE:` with small ones. Smoke runs take 15 seconds on 2 cores; none may
  take two minutes of processor time.
- Only the public face of optlab, and what `pip install "optlab[notebooks]"` brings. No network, no
  files that stay behind, no accelerator. A notebook is a plain script too: no magics but in the
  install cell, nothing that only a notebook displays: `print` it.
- Two to four pictures, each shown by `plt.show()`.
- Short sentences. A number in a text cell is asserted in the code cell before or after it; or it is
  printed from the number itself, and the text says where to look. Asserts hold for smoke sizes and
  for full ones. What holds only for full sizes goes under `if not SMOKE:`. Nothing is written to
  stderr: no warnings.
"""

import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

import pair

MOST_SECONDS = 120  # of processor time: a minute of both cores
SOURCES = pair.sources()
named = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)

# Of the kernel and the processes that it waited for.
CLOCK = "import os; print(sum(os.times()[:4]))"


def read(source: pathlib.Path) -> nbformat.NotebookNode:
    """Return the notebook of a source, as it is committed."""
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def executed(source: pathlib.Path, folder: pathlib.Path) -> nbformat.NotebookNode:
    """Return the notebook of a source, run in a folder; a failing cell raises."""
    notebook = read(source)
    notebook.cells.append(nbformat.v4.new_code_cell(CLOCK))
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=300, resources=resources).execute()


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return everything that the cells put out."""
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def code(source: pathlib.Path) -> list[str]:
    """Return the code cells of a source's notebook."""
    return [cell.source for cell in read(source).cells if cell.cell_type == "code"]


def test_the_folder_has_notebooks():
    assert SOURCES
    assert {s.stem for s in SOURCES} == {n.stem for n in pair.FOLDER.glob("*.ipynb")}


@named
def test_runs_clean(source, tmp_path, monkeypatch):
    monkeypatch.setenv("OPTLAB_SMOKE", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)
    done = executed(source, tmp_path)
    found = outputs(done)
    assert [out.text for out in found if out.get("name") == "stderr"] == []
    assert 2 <= sum("image/png" in out.get("data", {}) for out in found) <= 4
    assert float(done.cells[-1].outputs[0].text) < MOST_SECONDS


@named
def test_pair_is_in_sync(source):
    # If this fails: python notebooks/pair.py
    assert source.with_suffix(".ipynb").read_text() == pair.notebook_text(source)


@named
def test_begins_as_all_do(source):
    assert source.read_text().startswith(pair.HEADER)
    notebook = read(source)
    nbformat.validate(notebook)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert first.source.splitlines()[0] == pair.badge(source.stem)
    assert re.search(r"^# \w", first.source, re.MULTILINE)
    assert "?" in first.source
    assert notebook.metadata.accelerator == "TPU"
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(cell.get("outputs", []) == [] for cell in notebook.cells)


@named
def test_installs_styles_and_asks_alike(source):
    cells = code(source)
    assert cells[0].replace("    %pip", "    # %pip") == pair.INSTALL.strip()
    assert cells[1] == pair.STYLE.strip()
    (settings,) = (cell for cell in cells if cell.startswith("# @title Settings"))
    assert "# @param" in settings
    assert "if SMOKE:" in settings


@named
def test_is_a_script_of_public_names(source):
    text = source.read_text()
    compile(text, str(source), "exec")
    assert not re.search(r"optlab(\.\w+)*\._|optlab\.lab|optlab import (lab|_)", text)
    for cell in code(source)[1:]:
        assert not re.search(r"^\s*[%!]|get_ipython|display\(", cell, re.MULTILINE)
