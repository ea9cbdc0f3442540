"""Tables for people and for pipes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Final, TypeVar

from rich.cells import chop_cells
from rich.console import Console
from rich.text import Text

from gradwatch_slo.problems import printable

Column = TypeVar("Column")
Row = Sequence[Text]

_GAP: Final = 2
_INDENT: Final = "  "
# A number is not parted from its unit.
_BETWEEN_WORDS: Final = re.compile(r"\s+(?!(?<=[0-9]\s)(?:%|[a-z]\b))")
_BETWEEN_PARTS: Final = re.compile(r"(?<=[-_/.=,])")


def print_table(
    console: Console,
    headings: Sequence[str],
    rows: Sequence[Sequence[Text | str]],
    *,
    right: Collection[str] = (),
    spared: Sequence[str] = (),
    below: Collection[str] = (),
    least: Mapping[str, int] | None = None,
) -> None:
    """Print a table that fits on a terminal; in a pipe plain aligned lines, none cut, wrapped or coloured.

    Cells are never read as markup, and what a terminal would obey is shown escaped. The rest is about columns,
    by their headings. ``right``: aligned to the right. ``spared``: left out where there is no room, the first
    of them first; of those that are also ``below`` the cell is told under its row. ``least``: columns that may
    be wrapped, and how narrow they become before any is left out; without it, all.
    """
    title = [Text(printable(heading), style="bold") for heading in headings]
    cells = [[_text(cell) for cell in row] for row in rows]
    natural = {place: max(row[place].cell_len for row in (title, *cells)) for place in range(len(headings))}
    aligned = {place for place, heading in enumerate(headings) if heading in right}
    if not console.is_terminal:
        for row in (title, *cells):
            console.print(Text(_line(row, natural, aligned).plain), soft_wrap=True)
        return
    widths = widths_within(
        natural,
        console.width,
        spared=[headings.index(heading) for heading in spared if heading in headings],
        least={
            place: 1 if least is None else least[heading]
            for place, heading in enumerate(headings)
            if least is None or heading in least
        },
    )
    moved = [place for place, heading in enumerate(headings) if heading in below and place not in widths]
    _print(console, title, widths, aligned)
    console.print(("-" if console.options.ascii_only else "─") * _total(widths), soft_wrap=True)
    for row in cells:
        _print(console, row, widths, aligned)
        if moved:
            told = Text("; ").join(row[place] for place in moved if row[place].plain != "-")
            for line in _lines(told, console.width - len(_INDENT)):
                console.print(Text(_INDENT) + line, soft_wrap=True)


def widths_within(
    natural: Mapping[Column, int], width: int, *, spared: Sequence[Column], least: Mapping[Column, int]
) -> dict[Column, int]:
    """Return how wide the columns are that there is room for (`print_table`), with gaps of two between them."""
    widths = {column: min(wide, width) for column, wide in natural.items()}
    for column in spared:
        if _total({each: min(wide, least.get(each, wide)) for each, wide in widths.items()}) <= width:
            break
        widths.pop(column, None)
    narrowed = [column for column in widths if column in least]
    while _total(widths) > width and any(widths[column] > 1 for column in narrowed):
        widths[max(narrowed, key=lambda each: (widths[each] > least[each], widths[each]))] -= 1
    return widths


def _total(widths: Mapping[Column, int]) -> int:
    return sum(widths.values()) + _GAP * (len(widths) - 1)


def _print(console: Console, row: Row, widths: Mapping[int, int], aligned: Collection[int]) -> None:
    cells = {place: list(_lines(row[place], width)) for place, width in widths.items()}
    for lines in zip_longest(*cells.values(), fillvalue=Text()):
        console.print(_line(dict(zip(widths, lines, strict=True)), widths, aligned), soft_wrap=True)


def _line(row: Row | Mapping[int, Text], widths: Mapping[int, int], aligned: Collection[int]) -> Text:
    cells = []
    for place, width in widths.items():
        cell, blank = row[place], Text(" " * (width - row[place].cell_len))
        cells.append(blank + cell if place in aligned else cell + blank)
    line = Text(" " * _GAP).join(cells)
    line.rstrip()
    return line


def _lines(cell: Text, width: int) -> Iterator[Text]:
    """Yield a cell in lines: broken between words, in a longer word between its parts, else anywhere."""
    while cell.cell_len > max(1, width) and len(cell) > 1:
        room = max(1, len(chop_cells(cell.plain, max(1, width))[0]))
        line, cell = cell.divide(
            [_last(_BETWEEN_WORDS, cell, room) or _last(_BETWEEN_PARTS, cell, room) or room]
        )
        line.rstrip()
        yield line
        cell = cell[len(cell.plain) - len(cell.plain.lstrip()) :]
    yield cell


def _last(pattern: re.Pattern[str], cell: Text, room: int) -> int:
    """Return the last place at which a line of so many letters may end; 0 where there is none."""
    seen = pattern.finditer(cell.plain, 0, room + 4)
    return max((found.start() for found in seen if found.start() <= room), default=0)


def _text(cell: Text | str) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(cell))
