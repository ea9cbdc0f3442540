"""Tables for people and for pipes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradwatch_slo.problems import printable


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[Text | str]],
    *,
    right: Collection[str] = (),
) -> None:
    """Print a ruled table on a terminal; in a pipe plain aligned lines, none cut, wrapped or coloured.

    Cells are never read as markup, and what a terminal would obey is shown escaped. ``right``: headings of the
    columns that are aligned to the right.
    """
    if console.is_terminal:
        console.print(_ruled(headings, rows, right=right))
        return
    cells = [[_text(cell) for cell in row] for row in rows]
    lines = [list(headings), *([cell.plain for cell in row] for row in cells)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    for line in lines:
        aligned = [
            cell.rjust(width) if heading in right else cell.ljust(width)
            for heading, cell, width in zip(headings, line, widths, strict=True)
        ]
        console.print(Text("  ".join(aligned).rstrip()), soft_wrap=True)


def _ruled(
    headings: Sequence[str], rows: Sequence[Sequence[Text | str]], *, right: Collection[str] = ()
) -> Table:
    """Return the table that ``print_table`` prints on a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _text(cell: Text | str) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(cell))
