"""Objectives beside the window before, by other groups, and what a reader has to know of them."""

from __future__ import annotations

import csv
import io
import itertools
import json
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from rich.console import Console
from slo_reports import NOW, objective, report, reports

from gradwatch_slo.budget import budget_time
from gradwatch_slo.caveats import thin_budgets
from gradwatch_slo.counts import Counts, Group
from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import Selection
from gradwatch_slo.movement import budget, compared_json, movement
from gradwatch_slo.regrouping import grouped, narrowed
from gradwatch_slo.render import budget_left, render_json, render_markdown, render_table, sli
from gradwatch_slo.render_csv import render_csv
from gradwatch_slo.report import ObjectiveReport, reports_of
from gradwatch_slo.schemas import load_schema
from gradwatch_slo.slices import Slicing
from gradwatch_slo.wording import length, target_percent

BETTER = "uncertain before, met now"
PRODUCTION = Selection((("tier", ("production",)),))


def compared(now: tuple[int, int], before: tuple[int, int]) -> ObjectiveReport:
    """A 90 % objective with so many bad of so many events, now and before."""
    return replace(report(*now), previous=report(*before))


@pytest.mark.parametrize(
    ("now", "before", "words"),
    [
        ((1, 20), (3, 20), f"SLI up 10 points from 85 %; {BETTER}; budget left 50 % after -50 %"),
        (
            (8, 30),
            (6, 30),
            "SLI down 6.66 points from 80 %; uncertain before, breached now; budget left -167 % after -100 %",
        ),
        ((1, 20), (1, 20), "SLI unchanged; still met; budget left 50 %, as before"),
        ((1, 100), (2, 100), "SLI up 1 point from 98 %; still met; budget left 90 % after 80 %"),
        (
            (10_000, 100_000),
            (10_001, 100_000),
            f"SLI up less than 0.01 points from 89.99 %; {BETTER}; budget left 0 % after -0.01 %",
        ),
        (
            (201, 2000),
            (100, 1000),
            "SLI down 0.05 points from 90 %; met before, uncertain now; budget left -0.5 % after 0 %",
        ),
        ((0, 0), (3, 30), "90 % in the window before, met"),
        ((1, 20), (0, 0), "nothing was counted in the window before"),
    ],
)
def test_what_moved_is_told_in_words(now: tuple[int, int], before: tuple[int, int], words: str) -> None:
    assert movement(compared(now, before)) == words


def test_changes_are_exact_before_they_are_numbers() -> None:
    # 9/10 - 2/3 = 7/30; budgets 1 - 1/1 = 0 and 1 - 10/3 = -7/3.
    change = compared_json(compared((1, 10), (10, 30)))["change"]
    assert (change["sli"], change["budget_remaining"]) == (7 / 30, 7 / 3)


def test_slices_that_are_lost_in_part_move_by_as_much_as_they_are() -> None:
    each = objective(target=Decimal("0.9"), slicing=Slicing(Duration(1, "h")))

    def of(lost: Fraction) -> ObjectiveReport:
        (only,) = reports_of(each, each.window.at(NOW), {(): Counts(9, 3)}, {(): (lost, 6)})
        return only

    found = replace(of(Fraction(3, 2)), previous=of(Fraction(1, 4)))
    change = compared_json(found)["change"]
    # 1 - 1.5/6 less 1 - 0.25/6; budgets 1 - 1.5/0.6 and 1 - 0.25/0.6.
    assert change["sli"] == pytest.approx(-5 / 24)
    assert change["budget_remaining"] == pytest.approx(-25 / 12)
    assert movement(found).startswith("SLI down 20.83 points from 95.83 %")


counts = st.builds(Counts, st.integers(0, 2000), st.integers(0, 2000))


targets = st.decimals(0, "0.999999999999", places=12)


@given(counts, counts, targets)
@example(Counts(1799, 201), Counts(900, 100), Decimal("0.9"))
@example(Counts(999_999, 0), Counts(999_998, 0), Decimal("0.999999"))
def test_what_differs_reads_differently_and_the_same_way_round(
    now: Counts, before: Counts, target: Decimal
) -> None:
    # What is compared has counted something in both windows.
    was = report(before.bad, before.total + 1, target=target)
    found = replace(report(now.bad, now.total + 1, target=target), previous=was)
    assert found.share is not None
    assert was.share is not None
    words = movement(found)
    shares = [(found.share, sli(found)), (Fraction(target), target_percent(target))]
    if found.share != was.share:
        shares.append((was.share, words.partition(" from ")[2].partition(";")[0]))
    left, differs, left_before = words.rpartition("budget left ")[2].partition(" after ")
    assert bool(differs) == (budget(found) != budget(was))
    budgets = [(budget(found), left.removesuffix(", as before"))]
    if differs:
        budgets.append((budget(was), left_before))
    for told in (shares, budgets):
        ordered = sorted([*told, (Fraction(0), "0 %"), (Fraction(1), "100 %")])
        for (one, text), (other, other_text) in itertools.pairwise(ordered):
            assert (number(text) < number(other_text)) == (one < other)
            assert (text == other_text) == (one == other)
    assert budget_left(found).startswith(budgets[0][1])


def number(text: str) -> Fraction:
    return Fraction(text.removesuffix(" %"))


@given(counts, counts, targets)
def test_the_json_of_any_comparison_satisfies_its_schema(now: Counts, before: Counts, target: Decimal) -> None:
    each = replace(
        report(now.bad, now.total, target=target), previous=report(before.bad, before.total, target=target)
    )
    printed = json.loads(render_json([each]))
    Draft202012Validator(load_schema("slo-report")).validate(printed)
    assert printed["objectives"][0]["previous"]["bad"] == before.bad


def test_the_schema_knows_a_comparison_only_as_a_whole() -> None:
    (printed,) = json.loads(render_json([compared((1, 20), (3, 20))]))["objectives"]
    schema = Draft202012Validator(load_schema("objective"))
    assert schema.is_valid(printed)
    for name in ("previous", "change"):
        assert not schema.is_valid({key: value for key, value in printed.items() if key != name})


def test_tables_have_a_column_for_what_moved_and_colour_it_on_a_terminal() -> None:
    found = [compared((1, 20), (3, 20)), compared((3, 20), (1, 20))]
    out = io.StringIO()
    render_table(found, Console(file=out))
    heading, up, down = out.getvalue().splitlines()
    assert heading.endswith("Since the window before")
    assert ("SLI up 10 points from 85 %" in up, "SLI down 10 points from 95 %" in down) == (True, True)
    assert "| Since the window before |" in render_markdown(found)
    terminal = io.StringIO()
    render_table(found, Console(file=terminal, force_terminal=True, width=240, color_system="standard"))
    assert "\x1b[32mSLI up" in terminal.getvalue()
    assert "\x1b[31mSLI down" in terminal.getvalue()


def test_a_spreadsheet_has_a_column_for_each_number() -> None:
    (row,) = csv.DictReader(io.StringIO(render_csv([compared((1, 20), (3, 20))])))
    known = ("sli", "bad", "total", "budget_allows", "budget_remaining", "previous_bad", "previous_sli")
    assert [row[name] for name in known] == ["0.95", "1", "20", "2", "0.5", "3", "0.85"]
    # 28 days x 0.1, half of it left.
    assert (row["budget_seconds"], row["budget_seconds_left"]) == ("241920.0", "120960.0")
    assert row["change"].startswith("SLI up 10 points")
    assert (row["team"], row["sli_change"]) == ("", "0.1")
    assert "previous_sli" not in render_csv([report(1, 20)])
    assert render_csv([]) == render_csv([report(1, 20)]).splitlines(keepends=True)[0]


def test_telemetry_is_no_formula_of_a_spreadsheet() -> None:
    found = reports(objective(group_by=("job", "team")), {('=HYPERLINK("x")\r\n', "+1"): Counts(1, 0)})
    (row,) = csv.DictReader(io.StringIO(render_csv(found)))
    assert (row["job"], row["team"]) == ('\'=HYPERLINK("x")\\r\\n', "'+1")


def test_a_budget_is_a_time_where_it_allows_at_least_one() -> None:
    month = timedelta(days=28)
    assert budget_time(month, 100, Decimal("0.99")) == timedelta(hours=6, minutes=43, seconds=12)
    assert budget_time(month, 99, Decimal("0.99")) is None
    assert "| 50 % (33h36m) |" in render_markdown([report(1, 20)])
    assert "| -50 % |" in render_markdown([report(3, 20)])
    assert length(timedelta(seconds=187)) == "3m07s"


def test_a_window_in_which_one_failure_spends_the_budget_is_warned_of() -> None:
    assert list(thin_budgets([report(0, 9)])) == [
        (
            "an-objective (all): 9 events in the window, and one failure spends the budget; "
            "with a target of 90 % it takes 10 to allow one"
        )
    ]
    assert not list(thin_budgets([report(0, 10), report(0, 0)]))


def test_many_groups_of_an_objective_are_one_warning() -> None:
    found: dict[Group, Counts] = {(name,): Counts(events) for name, events in (("a", 3), ("b", 30), ("c", 4))}
    (only,) = thin_budgets(reports(objective(group_by=("team",)), found))
    assert only.startswith("an-objective (all): in 2 of 3 groups one failure spends the budget;")


def test_other_groups_keep_what_tells_tiers_apart() -> None:
    of_production = objective(selection=PRODUCTION, group_by=("tier",))
    assert grouped(of_production, ("team",)).group_by == ("tier", "team")
    assert grouped(of_production, ("team", "tier")).group_by == ("team", "tier")
    both = objective(selection=Selection((("tier", ("production", "experiment")),)), group_by=("tier", "job"))
    assert grouped(both, ("team",)).group_by == ("team",)


def test_one_group_is_reported_counted_or_not() -> None:
    of_vision = narrowed(objective(selection=PRODUCTION, group_by=("tier",)), {"team": "vision"})
    assert of_vision is not None
    (only,) = reports(of_vision, {})
    assert (dict(only.group), only.total) == ({"tier": "production", "team": "vision"}, 0)


def test_an_objective_is_not_about_what_it_does_not_select() -> None:
    assert narrowed(objective(selection=PRODUCTION), {"tier": "experiment"}) is None
    both = narrowed(
        objective(selection=Selection((("tier", ("production", "experiment")),)), group_by=("tier",)),
        {"tier": "experiment"},
    )
    assert both is not None
    assert both.selection == Selection((("tier", ("experiment",)),))
