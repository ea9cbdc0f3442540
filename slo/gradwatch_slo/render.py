"""Reports for people and for programs: a table, Markdown, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, tzinfo
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from gradwatch_slo import markdown
from gradwatch_slo.movement import budget, compared_json, movement, sli_change
from gradwatch_slo.report import ObjectiveReport, to_json
from gradwatch_slo.tables import print_table
from gradwatch_slo.verdict import Verdict
from gradwatch_slo.wording import budget_percent, group, length, minute, sli_percent, target_percent

_STYLES: Final = {
    Verdict.MET: "green",
    Verdict.BREACHED: "bold red",
    Verdict.UNCERTAIN: "yellow",
    Verdict.INSUFFICIENT_DATA: "dim",
}
_BAR_WIDTH: Final = 10
_HEADINGS: Final = ("Objective", "Group", "Verdict", "SLI", "Target", "Budget left", "Summary")
_COMPARED: Final = "Since the window before"
_BAR: Final = ""
# Where a terminal is narrow, sentences and the group go under their row.
_BELOW: Final = ("Group", "Summary", _COMPARED)
_SPARED: Final = (_COMPARED, "Summary", _BAR, "Group", "Target", "SLI", "Budget left")
_LEAST: Final = {"Objective": 24, "Group": 16, "Summary": 30, _COMPARED: 30}


def title(reports: Sequence[ObjectiveReport], as_of: datetime, zone: tzinfo) -> str:
    """Return what reports are of: the moment, and the windows."""
    windows = dict.fromkeys(report.window for report in reports)
    spans = (f"{each.duration} ({minute(each.start, zone)} to {minute(each.end, zone)})" for each in windows)
    return ", over ".join([f"Objectives as of {minute(as_of, zone)} {zone}", *filter(None, [", ".join(spans)])])


def render_table(reports: Sequence[ObjectiveReport], console: Console, title: str = "") -> None:
    """Print a table: colours and bars on a terminal; in a pipe plain aligned lines, none cut or wrapped."""
    names = list(headings(reports))
    rows = [list(map(Text, cells(report))) for report in reports]
    if console.is_terminal:
        place = names.index("Budget left")
        names.insert(place, _BAR)
        for report, row in zip(reports, rows, strict=True):
            row[names.index("Verdict")].stylize(_STYLES[report.verdict])
            change = sli_change(report)
            if change:
                row[-1].stylize("green" if change > 0 else "red")
            row.insert(place, _bar(report, *("#-" if console.options.ascii_only else "█░")))
    if title:
        console.print(Text(title), soft_wrap=not console.is_terminal)
    print_table(console, names, rows, spared=_SPARED, below=_BELOW, least=_LEAST)


def render_markdown(reports: Sequence[ObjectiveReport], title: str = "", warnings: Sequence[str] = ()) -> str:
    """Return a GitHub-flavoured Markdown table, under a heading and above a list of warnings."""
    lines = [f"# {markdown.escaped(title)}\n"] if title else []
    lines.append(markdown.table(headings(reports), map(cells, reports)))
    lines += ["", *(f"- {markdown.escaped(warning)}" for warning in warnings)] if warnings else []
    return "\n".join(lines) + "\n"


def report_json(reports: Sequence[ObjectiveReport], warnings: Sequence[str] = ()) -> dict[str, Any]:
    """Return the shape that ``schemas/slo-report.schema.json`` describes."""
    objectives = [{**to_json(report), **compared_json(report)} for report in reports]
    return {"objectives": objectives, "warnings": list(warnings)}


def render_json(reports: Sequence[ObjectiveReport], warnings: Sequence[str] = ()) -> str:
    """Return :func:`report_json` as text."""
    return json.dumps(report_json(reports, warnings), indent=2, allow_nan=False) + "\n"


def headings(reports: Sequence[ObjectiveReport]) -> tuple[str, ...]:
    """Return the headings of the columns of `cells`: one more where windows were compared."""
    return (*_HEADINGS, _COMPARED) if any(report.previous for report in reports) else _HEADINGS


def cells(report: ObjectiveReport) -> tuple[str, ...]:
    """Return a report as the cells of a row."""
    return (
        report.name,
        group(report.group),
        report.verdict.value,
        sli(report),
        target_percent(report.target),
        budget_left(report),
        report.summary,
        *(() if report.previous is None else (movement(report),)),
    )


def sli(report: ObjectiveReport) -> str:
    """Return the share of good events; a dash where nothing was counted.

    It reads as the target, or as that of the window before, only if it is.
    """
    if report.share is None:
        return "-"
    before = report.previous and report.previous.share
    return sli_percent(report.share, report.target, *(() if before is None else (before,)))


def budget_left(report: ObjectiveReport) -> str:
    """Return what is left of the budget, as time too where that means something."""
    left, before = report.budget_time_left, report.previous
    share = budget_percent(budget(report), *(() if before is None else (budget(before),)))
    return share + (f" ({length(left)})" if left else "")


def _bar(report: ObjectiveReport, left: str, spent: str) -> Text:
    full = round(max(0.0, min(1.0, report.budget_remaining)) * _BAR_WIDTH)
    bar = Text(left * full, style="green" if report.budget_remaining > 0.25 else "yellow")
    return bar.append(spent * (_BAR_WIDTH - full), style="red" if report.budget_remaining < 0 else "dim")
