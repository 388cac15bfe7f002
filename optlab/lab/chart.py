"""A curve in characters: eight dots to a cell, each column from least to greatest value."""

import itertools

import numpy as np

# The dots of a Braille cell, row by row, as bits of its code point.
_BITS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
_BRAILLE, _PLAIN = 0x2800, "*"


def _ranges(x: np.ndarray, y: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest value of the polygon through (x, y) in each column."""
    edges = np.linspace(x[0], x[-1], columns + 1)
    grid = np.union1d(x, edges)
    values = np.interp(grid, x, y)
    inside = [
        (np.searchsorted(grid, a), np.searchsorted(grid, b, side="right"))
        for a, b in itertools.pairwise(edges)
    ]
    least = np.array([values[a:b].min() for a, b in inside])
    return least, np.array([values[a:b].max() for a, b in inside])


def _dots(x: np.ndarray, y: np.ndarray, top: float, rows: int, columns: int) -> np.ndarray:
    """Return which dots are set, the top row first."""
    least, greatest = (np.rint(v / top * (rows - 1)) for v in _ranges(x, y, columns))
    heights = np.arange(rows)[::-1, None]
    return (heights >= least) & (heights <= greatest)


def draw(x: np.ndarray, y: np.ndarray, *, width: int, height: int, plain: bool = False) -> str:
    """Return the curve through (x, y), from y = 0 to its greatest value, with both axes.

    Args:
        x: increasing whole numbers, two or more.
        y: values >= 0.
        width: characters of a line, the labels included.
        height: lines of the curve; two more are the axis below.
        plain: ASCII for a terminal without Braille.
    """
    top = float(np.max(y)) or 1.0
    labels = [f"{value:.3g}" for value in (top, top / 2, 0.0)]
    margin = max(map(len, labels))
    cells = width - margin - 2
    dots = _dots(x, y, top, 4 * height, 2 * cells)
    codes = (dots.reshape(height, 4, cells, 2) * _BITS[:, None]).sum((1, 3))
    at = {0: labels[0], height // 2: labels[1], height - 1: labels[2]}
    edge, corner, line = ("|", "+", "-") if plain else ("│", "└", "─")
    lines = []
    for row, cells_of_row in enumerate(codes):
        marks = [_PLAIN if c else " " for c in cells_of_row] if plain else None
        curve = "".join(marks or (chr(_BRAILLE + c) for c in cells_of_row))
        lines.append(f"{at.get(row, ''):>{margin}} {edge}{curve}")
    ends = f"{x[0]:,}", f"{(x[0] + x[-1]) // 2:,}", f"{x[-1]:,}"
    below = ends[0] + ends[1].center(cells - len(ends[0]) - len(ends[2])) + ends[2]
    lines += [" " * margin + f" {corner}{line * cells}", " " * (margin + 2) + below]
    return "\n".join(line.rstrip() for line in lines)
