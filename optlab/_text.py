"""Tables in plain text."""

from collections.abc import Collection, Iterator


def aligned(table: list[list[str]], numbers: Collection[str] = ()) -> Iterator[str]:
    """Lay out rows of cells in columns; those whose head is in `numbers` to the right."""
    right = {i for i, name in enumerate(table[0]) if name in numbers}
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = (
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        yield "  ".join(padded).rstrip()
