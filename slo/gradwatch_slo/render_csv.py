"""Reports for spreadsheets: CSV (RFC 4180, but for plain line ends) with a column for each number."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Final, get_args

from gradwatch_slo.movement import budget_change, movement, sli_change
from gradwatch_slo.problems import printable
from gradwatch_slo.report import ObjectiveReport, number, rfc3339
from gradwatch_slo.source import GroupField

_Cell = str | int | float | None
_FIELDS: Final[tuple[str, ...]] = get_args(GroupField)
_COLUMNS: Final = (
    *("objective", "indicator", *_FIELDS, "verdict", "sli", "target", "good", "bad", "total"),
    *("interval_low", "interval_high", "budget_allows", "budget_remaining", "budget_seconds"),
    *("budget_seconds_left", "window", "from", "to", "summary"),
)
_COMPARED: Final = (
    *("previous_verdict", "previous_sli", "previous_good", "previous_bad", "previous_total"),
    *("previous_budget_remaining", "previous_from", "previous_to", "sli_change", "budget_change", "change"),
)
# What spreadsheets take for the beginning of a formula.
_FORMULA: Final = ("=", "+", "-", "@")


def render_csv(reports: Sequence[ObjectiveReport]) -> str:
    """Return a line for each report, under the names of its columns.

    What is not known is empty; where windows were compared there are columns for that.
    """
    is_compared = any(report.previous for report in reports)
    out = io.StringIO()
    columns = (*_COLUMNS, *(_COMPARED if is_compared else ()))
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for report in reports:
        row = {**_row(report), **(_compared(report) if is_compared else {})}
        writer.writerow({name: _text(cell) if isinstance(cell, str) else cell for name, cell in row.items()})
    return out.getvalue()


def _row(report: ObjectiveReport) -> dict[str, _Cell]:
    whole, left = report.budget_time, report.budget_time_left
    return {
        "objective": report.name,
        "indicator": report.indicator,
        **{name: report.group.get(name) for name in _FIELDS},
        "verdict": report.verdict.value,
        "sli": report.sli,
        "target": float(report.target),
        "good": number(report.good),
        "bad": number(report.bad),
        "total": report.total,
        "interval_low": report.interval[0],
        "interval_high": report.interval[1],
        "budget_allows": number(report.allowed),
        "budget_remaining": report.budget_remaining,
        "budget_seconds": None if whole is None else whole.total_seconds(),
        "budget_seconds_left": None if left is None else left.total_seconds(),
        "window": report.window.duration,
        "from": rfc3339(report.window.start),
        "to": rfc3339(report.window.end),
        "summary": report.summary,
    }


def _compared(report: ObjectiveReport) -> dict[str, _Cell]:
    before, sli, budget = report.previous, sli_change(report), budget_change(report)
    assert before is not None  # all are compared, or none
    return {
        "previous_verdict": before.verdict.value,
        "previous_sli": before.sli,
        "previous_good": number(before.good),
        "previous_bad": number(before.bad),
        "previous_total": before.total,
        "previous_budget_remaining": before.budget_remaining,
        "previous_from": rfc3339(before.window.start),
        "previous_to": rfc3339(before.window.end),
        "sli_change": None if sli is None else float(sli),
        "budget_change": None if budget is None else float(budget),
        "change": movement(report),
    }


def _text(cell: str) -> str:
    told = printable(cell)
    return f"'{told}" if told.startswith(_FORMULA) else told
