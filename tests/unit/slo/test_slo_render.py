from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest
from rich.cells import cell_len
from rich.console import Console
from slo_reports import NOW, objective, of_production, report
from slo_reports import reports as reports_of

from gradwatch_slo.counts import Counts
from gradwatch_slo.durations import Duration
from gradwatch_slo.render import cells, headings, render_json, render_markdown, render_table, title
from gradwatch_slo.report import ObjectiveReport, to_json
from gradwatch_slo.tables import print_table
from gradwatch_slo.verdict import Verdict
from gradwatch_slo.windows import TimeWindow


@pytest.fixture
def reports() -> list[ObjectiveReport]:
    return of_production(3, 30)


def table(reports: list[ObjectiveReport], **console: object) -> str:
    out = io.StringIO()
    render_table(reports, Console(file=out, **console))  # type: ignore[arg-type]  # options of the terminal
    return out.getvalue()


def test_in_a_pipe_the_table_is_plain_aligned_lines(reports: list[ObjectiveReport]) -> None:
    assert table(reports, width=40) == (
        "Objective              Group            Verdict            SLI   Target  Budget left  Summary\n"
        "training-success-rate  tier=production  breached           90 %  99 %    -900 %       "
        "3 of 30 runs failed; the budget allows 0\n"
        "training-success-rate  tier=experiment  insufficient data  -     90 %    100 %        "
        "no runs counted; the budget is unspent\n"
        "time-to-convergence    tier=production  insufficient data  -     90 %    100 %        "
        "no runs counted; the budget is unspent\n"
        "time-to-convergence    tier=experiment  insufficient data  -     90 %    100 %        "
        "no runs counted; the budget is unspent\n"
    )


def test_on_a_terminal_the_table_has_colours_and_bars(reports: list[ObjectiveReport]) -> None:
    printed = table(reports, force_terminal=True, width=200, color_system="standard", no_color=False)
    assert "\x1b[1;31mbreached" in printed
    assert "░░░░░░░░░░\x1b[0m  -900 %" in printed
    assert "██████████\x1b[0m  100 %" in printed


@pytest.mark.parametrize(("bad", "bar"), [(0, "\x1b[32m██████████"), (14, "\x1b[32m███"), (15, "\x1b[33m██")])
def test_a_bar_is_green_while_more_than_a_quarter_of_the_budget_is_left(bad: int, bar: str) -> None:
    printed = table([report(bad, 200)], force_terminal=True, width=200, color_system="standard", no_color=False)
    assert f"{bar}\x1b[0m" in printed


def test_a_terminal_that_knows_no_blocks_has_bars_too() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    render_table([report(1, 20)], Console(file=out, force_terminal=True, width=200, color_system=None))
    out.seek(0)
    assert "#####-----  50 %" in out.read()


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_on_a_terminal_of_any_width_no_verdict_no_number_and_no_word_is_broken(width: int) -> None:
    found = [replace(each, previous=each) for each in [*of_production(3, 30), *of_production(1, 2000)]]
    printed = table(found, force_terminal=True, width=width, color_system=None)
    lines = printed.splitlines()
    assert max(map(cell_len, lines)) <= width
    for verdict in Verdict:
        rows = [line for line in lines if line.startswith("t") and f"  {verdict.value}" in line]
        assert len(rows) == sum(each.verdict is verdict for each in found)
    assert not re.search(r"[0-9]\n *%", printed)
    whole = {word for each in found for cell in (*headings(found), *cells(each)) for word in cell.split()}
    assert {word.rstrip(";") for word in re.sub("[─█░]", "", printed).split()} <= {
        word.rstrip(";") for word in whole
    }


def test_a_narrow_terminal_spares_target_and_sli_and_tells_groups_apart(reports: list[ObjectiveReport]) -> None:
    printed = table(reports, force_terminal=True, width=56, color_system=None)
    heading, _, first, second, *_ = printed.splitlines()
    assert heading.split() == ["Objective", "Verdict", "Budget", "left"]
    assert first.split() == ["training-success-rate", "breached", "-900", "%"]
    assert second.startswith("  tier=production; 3 of 30 runs failed; the budget")


def test_names_from_telemetry_are_text_that_steers_neither_markup_nor_terminal() -> None:
    found = reports_of(objective(group_by=("job",)), {("[red]a|b[/red]\n\x1b[2J",): Counts(1, 0)})
    for printed in (table(found), table(found, force_terminal=True, width=200)):
        assert "job=[red]a|b[/red]\\n\\x1b[2J" in printed
    assert r"job=\[red\]a\|b\[/red\]\\n\\x1b\[2J |" in render_markdown(found)


def test_markdown_is_a_table_of_the_same_cells(reports: list[ObjectiveReport]) -> None:
    assert render_markdown(reports).splitlines()[:3] == [
        "| Objective | Group | Verdict | SLI | Target | Budget left | Summary |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| training-success-rate | tier=production | breached | 90 % | 99 % | -900 % | {reports[0].summary} |",
    ]


def test_a_report_says_of_which_moment_and_windows_it_is() -> None:
    week = reports_of(objective(window=TimeWindow(Duration(1, "w"))), {})
    said = title([report(1, 20), report(1, 2), *week], NOW + timedelta(seconds=59), ZoneInfo("Europe/Berlin"))
    assert said == (
        "Objectives as of 2026-03-29 14:00 Europe/Berlin, over 28d (2026-03-01 13:00 to 2026-03-29 14:00), "
        "1w (2026-03-22 13:00 to 2026-03-29 14:00)"
    )
    assert title([], NOW, ZoneInfo("UTC")) == "Objectives as of 2026-03-29 12:00 UTC"


def test_markdown_has_a_heading_and_its_warnings_at_the_end(reports: list[ObjectiveReport]) -> None:
    first, *_, blank, one, other = render_markdown(reports, "Objectives", ["<b>", "a@b.c"]).split("\n")[:-1]
    assert (first, blank, one, other) == ("# Objectives", "", r"- \<b\>", "- a@<!-- -->b.c")


def test_names_wrap_between_their_parts_and_numbers_stay_with_their_unit() -> None:
    def printed(cell: str, width: int) -> list[str]:
        out = io.StringIO()
        print_table(Console(file=out, force_terminal=True, width=width, color_system=None), ("A",), [(cell,)])
        return out.getvalue().splitlines()[2:]

    assert printed("team=vision/model-of-mine", 14) == ["team=vision/", "model-of-mine"]
    assert printed("10 % of the budget in 72 h", 22) == ["10 % of the budget in", "72 h"]
    assert printed("10 % of the budget in 72 h", 2) == [
        *("10", "%", "of", "th", "e", "bu", "dg", "et", "in", "72", "h"),
    ]
    assert printed("層層層 層", 5) == ["層層", "層 層"]
    assert printed("層", 1) == ["層"]


def test_json_is_the_list_of_reports(reports: list[ObjectiveReport]) -> None:
    printed = json.loads(render_json(reports, ["mine cannot be evaluated"]))
    assert printed["objectives"] == [to_json(report) for report in reports]
    assert printed["warnings"] == ["mine cannot be evaluated"]


@pytest.mark.parametrize(
    ("bad", "total", "target", "cells"),
    [
        # Cut and not rounded: it must not read as all.
        (4, 100_000, "0.9", "| 99.99 % | 90 % | 99.96 % "),
        (1, 30_001, "0.9999", "| 99.996 % | 99.99 % | 67 % "),
        (300_001, 30_000_000, "0.99", "| 98.99 % | 99 % | -0.0003 % "),
        (299_999, 30_000_000, "0.99", "| 99.000003 % | 99 % | 0.0003 % "),
        (1000, 1000, "0.9", "| 0 % | 90 % | -900 % "),
        (99_999, 100_000, "0.9", "| 0.001 % | 90 % | -900 % "),
        (0, 1000, "0.9", "| 100 % | 90 % | 100 % "),
    ],
)
def test_a_number_reads_as_its_target_as_all_or_as_none_only_if_it_is(
    bad: int, total: int, target: str, cells: str
) -> None:
    assert cells in render_markdown([report(bad, total, target=Decimal(target))])
