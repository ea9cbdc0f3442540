"""Reports for people and for programs: a table, Markdown, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from gradwatch_slo.problems import printable
from gradwatch_slo.report import ObjectiveReport, to_json
from gradwatch_slo.tables import print_table
from gradwatch_slo.verdict import Verdict

_STYLES: Final = {
    Verdict.MET: "green",
    Verdict.BREACHED: "bold red",
    Verdict.UNCERTAIN: "yellow",
    Verdict.INSUFFICIENT_DATA: "dim",
}
_BAR_WIDTH: Final = 10
_HEADINGS: Final = ("Objective", "Group", "Verdict", "SLI", "Target", "Budget left", "Summary")


def render_table(reports: Sequence[ObjectiveReport], console: Console) -> None:
    """Print a table: colours and bars on a terminal; in a pipe plain aligned lines, none cut or wrapped."""
    rows: list[list[Text]] = []
    for report in reports:
        name, group, verdict, sli, target, budget, summary = map(Text, _cells(report))
        verdict.stylize(_STYLES[report.verdict])
        if console.is_terminal:
            budget = Text.assemble(_bar(report), " ", budget)
        rows.append([name, group, verdict, sli, target, budget, summary])
    print_table(console, _HEADINGS, rows)


def render_markdown(reports: Sequence[ObjectiveReport]) -> str:
    """Return a GitHub-flavoured Markdown table."""
    rows = [_HEADINGS, ("---",) * len(_HEADINGS), *(_cells(report) for report in reports)]
    return "".join(f"| {' | '.join(_escaped(cell) for cell in row)} |\n" for row in rows)


def report_json(reports: Sequence[ObjectiveReport], warnings: Sequence[str] = ()) -> dict[str, Any]:
    """Return the shape that ``schemas/slo-report.schema.json`` describes."""
    return {"objectives": [to_json(report) for report in reports], "warnings": list(warnings)}


def render_json(reports: Sequence[ObjectiveReport], warnings: Sequence[str] = ()) -> str:
    """Return :func:`report_json` as text."""
    return json.dumps(report_json(reports, warnings), indent=2, allow_nan=False) + "\n"


def _cells(report: ObjectiveReport) -> tuple[str, ...]:
    return (
        report.name,
        ", ".join(f"{name}={printable(value or 'unknown')}" for name, value in report.group.items()) or "all",
        report.verdict.value,
        "-" if report.share is None else _percent(report.share),
        f"{(report.target * 100).normalize():f} %",
        f"{report.budget_remaining:.0%}".replace("%", " %"),
        report.summary,
    )


def _percent(share: Fraction) -> str:
    # Two decimals, cut and not rounded: 99.996 % must not read as 100 %.
    return f"{Decimal(int(share * 10_000)) / 100} %"


def _bar(report: ObjectiveReport) -> Text:
    full = round(max(0.0, min(1.0, report.budget_remaining)) * _BAR_WIDTH)
    bar = Text("█" * full, style="green" if report.budget_remaining > 0.25 else "yellow")
    return bar.append("░" * (_BAR_WIDTH - full), style="red" if report.budget_remaining < 0 else "dim")


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|")
