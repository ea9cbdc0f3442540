"""Runs side by side, as rows of text for any kind of table."""

from __future__ import annotations

import re
from typing import Final

from gradwatch_collector.reports import wording
from gradwatch_collector.runs.comparison import Compared, Comparison, Value

_CURRENCY: Final = re.compile("[A-Z]{3}")
_ABSENT: Final = "-"


def headings(found: Comparison) -> tuple[str, ...]:
    """Return the headings of the columns: section, what, and each run."""
    return ("", "What", *(row.run_id for row in found.runs))


def rows(found: Comparison, *, everything: bool = False) -> list[tuple[str, ...]]:
    """Return a row for each fact that does not read the same for all runs, or for all that is known.

    A section is named in its first row only.
    """
    listed = []
    section = ""
    for fact in found.facts:
        if not everything and len({shown(value, fact.unit) for value in fact.values}) == 1:
            continue
        listed.append(
            (
                "" if fact.section == section else fact.section,
                fact.name,
                *(_cell(fact, index) for index in range(len(found.runs))),
            )
        )
        section = fact.section
    return listed


def shown(value: Value, unit: str | None) -> str:
    """Return a value as people read it."""
    if value is None:
        return _ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if unit == "s":
        return wording.duration(value)
    if unit == "1":
        return wording.share(value)
    if unit == "h":
        return wording.hours(value)
    return wording.money(value, unit) if unit and _CURRENCY.fullmatch(unit) else wording.number(value)


def _cell(fact: Compared, index: int) -> str:
    change = fact.change(index)
    told = shown(fact.values[index], fact.unit)
    # Of a share in per cent another per cent would only confuse.
    return told if not change or fact.unit == "1" else f"{told} ({wording.change(change)})"
