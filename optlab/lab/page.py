"""The page of a race or a study: one HTML file, without scripts, that needs nothing else."""

import base64
import html
import io
from collections.abc import Sequence

from matplotlib.figure import Figure

from optlab.lab.figure import plt

_STYLE = """
body { font: 15px/1.5 system-ui, "Segoe UI", sans-serif; color: #333; background: #fff;
  max-width: 1120px; margin: 2.5em auto; padding: 0 1.5em; }
h1 { font-size: 1.9em; line-height: 1.2; margin: 0 0 .2em; }
h2 { font-size: 1.25em; margin: 2.2em 0 .4em; break-after: avoid; }
p, ul { max-width: 52em; }
.about, figcaption, caption { color: #6b6b6b; }
table { border-collapse: collapse; font-size: .9em; font-variant-numeric: tabular-nums;
  margin: .8em 0; break-inside: avoid; }
table.long { break-inside: auto; font-size: .78em; }
caption { text-align: left; padding-bottom: .4em; }
th, td { padding: .22em .9em .22em 0; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead { display: table-header-group; }
thead th { border-bottom: 1.5px solid #bbb; }
tbody td { border-bottom: 1px solid #e6e6e6; }
table.long td:nth-child(2), table.long th:nth-child(2), table.words td { text-align: left; }
tr { break-inside: avoid; }
td.best { font-weight: bold; }
td.missed { color: #a33; }
figure { margin: 1em 0; break-inside: avoid; }
figure img { width: 100%; height: auto; }
.wide { overflow-x: auto; break-inside: avoid; }
.wide.long { break-inside: auto; }
@media screen and (max-width: 760px) { figure { overflow-x: auto; } figure img { width: 760px; }
  table:not(.words) td { white-space: nowrap; } }
@page { size: A4; margin: 14mm; }
@media print { body { font-size: 10.5px; margin: 0; padding: 0; max-width: none; }
  .wide { overflow: visible; } }
"""


class Cell(str):
    """A cell of a table with a class of the style sheet: best or missed."""

    kind: str

    def __new__(cls, text: str, kind: str) -> "Cell":
        """Make a cell."""
        cell = super().__new__(cls, text)
        cell.kind = kind
        return cell


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph."""
    return f"<p{_class(kind)}>{html.escape(text)}</p>"


def points(items: Sequence[str]) -> str:
    """Return a list of sentences."""
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def section(title: str, *parts: str) -> str:
    """Return a section of these parts."""
    return "\n".join([f"<section><h2>{html.escape(title)}</h2>", *parts, "</section>"])


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", kind: str = ""
) -> str:
    """Return a table; its cells are text, or `Cell`s."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{_class(getattr(c, 'kind', ''))}>{html.escape(c)}</td>" for c in row)
        + "</tr>"
        for row in rows
    )
    above = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="wide {kind}"><table{_class(kind)}>{above}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def picture(figure: Figure, says: str) -> str:
    """Return a picture inside the page, with a sentence below it that also stands in for it."""
    data = io.BytesIO()
    # Without a date, and with names that do not change, equal numbers make an equal page.
    with plt.rc_context({"svg.hashsalt": "optlab"}):
        figure.savefig(data, format="svg", metadata={"Date": None})
    plt.close(figure)
    code, alt = base64.b64encode(data.getvalue()).decode(), html.escape(says, quote=True)
    return (
        f'<figure><img alt="{alt}" src="data:image/svg+xml;base64,{code}">'
        f"<figcaption>{html.escape(says)}</figcaption></figure>"
    )


def document(title: str, about: str, *parts: str) -> str:
    """Return the page."""
    return "\n".join([
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<header><h1>{html.escape(title)}</h1>{paragraph(about, 'about')}</header>",
        *parts,
        "</body></html>\n",
    ])  # fmt: skip


def count(number: int, noun: str) -> str:
    """Return 1 seed, 2 seeds."""
    return f"{number} {noun}{'s' * (number != 1)}"


def span(values: Sequence[float], form: str) -> str:
    """Return the middle of three or more values with their range, or one alone."""
    ordered = sorted(values)
    middle = format(ordered[len(ordered) // 2], form)
    ends = [format(value, form) for value in (ordered[0], ordered[-1])]
    return middle if ends[0] == ends[1] else f"{middle} ({ends[0]} to {ends[1]})"
