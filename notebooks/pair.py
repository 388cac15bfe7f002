"""Write the .ipynb of every .py of this folder: `python notebooks/pair.py`, or `... 01 02`.

The .py files, in jupytext's percent format, are the source; what is edited in a notebook goes back
with `jupytext --to py:percent notebooks/NAME.ipynb`. A notebook has no outputs, and what is the
same in all of them is written here: the header, the badge, the cells for installing and for style.
"""

import pathlib
import re
import sys

import jupytext
import nbformat

FOLDER = pathlib.Path(__file__).parent

# OWNER/NAME of the public repository: set it and run this file; badges and install cells follow.
REPOSITORY = "$REPOSITORY"

HEADER = """\
# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     provenance: []
#     toc_visible: true
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab,kernelspec
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
"""

INSTALL = f"""\
import importlib.util

if importlib.util.find_spec("optlab") is None:
    # From the repository: on the package index the name is somebody else's.
    print("optlab is missing: %pip install of its repository")
    # %pip install -q "optlab[notebooks] @ git+https://github.com/{REPOSITORY}"
"""

STYLE = """\
import os

import matplotlib.pyplot as plt

SMOKE = os.environ.get("OPTLAB_SMOKE") == "1"  # small sizes, for tests
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#1A1A1A", "#8A8A8A"
plt.rcParams.update(
    {
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "grid.color": "#E6E6E6",
        "lines.linewidth": 2,
        "legend.frameon": False,
    }
)
"""


def sources() -> list[pathlib.Path]:
    """Return the sources of all notebooks, found by their numbers."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def badge(name: str) -> str:
    """Return the link that opens a notebook in Colab."""
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    link = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb"
    return f"[![Open in Colab]({image})]({link})"


def notebook_text(source: pathlib.Path) -> str:
    """Return the text of a source's notebook."""
    notebook = jupytext.read(source)
    for place, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{place:02}"  # random ones would change with every run
    return nbformat.writes(notebook, version=4) + "\n"


def write(source: pathlib.Path) -> None:
    """Put what all have in common into a source, and write its notebook."""
    cells = re.split(r"^(?=# %%)", source.read_text(), flags=re.MULTILINE)
    intro = re.sub(r".*Open in Colab.*", f"# {badge(source.stem)}", cells[1])
    cells[:4] = [HEADER + "\n", intro, _cell(INSTALL), _cell(STYLE)]
    source.write_text("".join(cells))
    source.with_suffix(".ipynb").write_text(notebook_text(source))


def _cell(code: str) -> str:
    return f"# %%\n{code}\n"


if __name__ == "__main__":
    for each in sources():
        if not sys.argv[1:] or each.stem[:2] in sys.argv[1:]:
            write(each)
            print(each.with_suffix(".ipynb").name)
