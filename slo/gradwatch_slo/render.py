"""Reports for people and for programs: a table, Markdown, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from gradwatch_slo import markdown
from gradwatch_slo.movement import budget, compared_json, movement, sli_change
from gradwatch_slo.report import ObjectiveReport, to_json
from gradwatch_slo.tables import print_table
from gradwatch_slo.verdict import Verdict
from gradwatch_slo.wording import budget_percent, group, length, sli_percent, target_percent

_STYLES: Final = {
    Verdict.MET: "green",
    Verdict.BREACHED: "bold red",
    Verdict.UNCERTAIN: "yellow",
    Verdict.INSUFFICIENT_DATA: "dim",
}
_BAR_WIDTH: Final = 10
_HEADINGS: Final = ("Objective", "Group", "Verdict", "SLI", "Target", "Budget left", "Summary")
_COMPARED: Final = "Since the window before"


def render_table(reports: Sequence[ObjectiveReport], console: Console) -> None:
    """Print a table: colours and bars on a terminal; in a pipe plain aligned lines, none cut or wrapped."""
    rows: list[list[Text]] = []
    for report in reports:
        name, grouped, verdict, sli, target, budget, *words = map(Text, cells(report))
        verdict.stylize(_STYLES[report.verdict])
        if console.is_terminal:
            signs = "#-" if console.options.ascii_only else "█░"
            budget = Text.assemble(_bar(report, *signs), " ", budget)
            change = sli_change(report)
            if change:
                words[-1].stylize("green" if change > 0 else "red")
        rows.append([name, grouped, verdict, sli, target, budget, *words])
    print_table(console, headings(reports), rows)


def render_markdown(reports: Sequence[ObjectiveReport]) -> str:
    """Return a GitHub-flavoured Markdown table."""
    return markdown.table(headings(reports), map(cells, reports)) + "\n"


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
