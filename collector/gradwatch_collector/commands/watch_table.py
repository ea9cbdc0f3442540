"""The table of ``gradwatch runs watch`` on a terminal: a line for each run, however narrow it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from gradwatch_slo.problems import printable
from gradwatch_slo.tables import widths_within

HEADINGS: Final = ("RUN", "JOB", "STATUS", "STEP", "LOSS", "SO FAR", "STEP TAKES", "HEARD", "OPEN FINDINGS")
RIGHT: Final = ("STEP", "LOSS", "STEP TAKES", "HEARD")
MOST_BARS: Final = 24
# Left out where there is no room, the first of them first.
_SPARED: Final = ("HEARD", "STEP TAKES", "JOB")
# Cut where there is no room; before they are shorter than that, what can be spared is left out.
_CUT: Final = {"RUN": 20, "JOB": 12, "OPEN FINDINGS": 18}
_EDGES: Final = 2

Row = Sequence[Text | str]


def bars_within(width: int) -> int:
    """Return how many bars the course of a loss has at most on a terminal of that width."""
    return max(6, min(MOST_BARS, width // 6))


def fitted(rows: Sequence[Row], width: int) -> Table:
    """Return a table of cells by `HEADINGS`, none of whose rows takes more than a line of ``width``.

    Numbers, statuses and courses are never cut. Names lose their middle, as those of a job begin alike.
    """
    cells = [dict(zip(HEADINGS, map(_text, row), strict=True)) for row in rows]
    natural = {
        heading: max([cell_len(heading), *(row[heading].cell_len for row in cells)]) for heading in HEADINGS
    }
    widths = widths_within(natural, width - _EDGES, spared=_SPARED, least=_CUT)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
    for heading, wide in widths.items():
        table.add_column(
            heading,
            justify="right" if heading in RIGHT else "left",
            width=wide,
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in cells:
        table.add_row(*(_cut(row[heading], heading, wide) for heading, wide in widths.items()))
    return table


def _text(cell: Text | str) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(cell))


def _cut(cell: Text, heading: str, width: int) -> Text:
    if heading not in ("RUN", "JOB") or cell.cell_len <= width:
        return cell
    tail = (width - 1) // 2
    name = cell.plain
    return Text(f"{set_cell_size(name, width - 1 - tail)}…{set_cell_size(name[::-1], tail)[::-1]}")
