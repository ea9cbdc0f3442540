"""What docs/slo.md says is what is computed: examples, fields, rates, and the simulated figures."""

from __future__ import annotations

import importlib
import re
import sys
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slo_reports import NOW, objective

from gradwatch_collector.runs.step_health import HEALTHY
from gradwatch_slo.budget import budget_allows, budget_remaining, burn_rate
from gradwatch_slo.burn_rules import BURN_RULES
from gradwatch_slo.counts import Counts, Group
from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import RUN_VALUES, UNIT_FAULTS
from gradwatch_slo.objective import objectives_of
from gradwatch_slo.objectives import default_objectives
from gradwatch_slo.reader import parse_documents
from gradwatch_slo.report import reports_of
from gradwatch_slo.slices import Slicing, judged
from gradwatch_slo.source import GradwatchSource, Where
from gradwatch_slo.statistics import binomial_upper_tail, wilson_interval
from gradwatch_slo.verdict import alerts, verdict
from gradwatch_slo.wording import amount

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "slo.md").read_text()


def table(heading: str) -> list[list[str]]:
    """The rows of the table that has the heading, without it."""
    lines = PAGE[PAGE.index(f"| {heading} ") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines]


def percent(text: str) -> Fraction:
    return Fraction(text.removesuffix(" %")) / 100


def decimal(share: Fraction) -> Decimal:
    return Decimal(share.numerator) / share.denominator


@pytest.mark.parametrize("row", table("n"), ids=lambda row: f"{row[1]}-of-{row[0]}-at-{row[2]}")
def test_an_example_is_as_it_was_worked_by_hand(row: list[str]) -> None:
    total, bad, target = int(row[0]), int(row[1]), decimal(percent(row[2]))
    p_value = binomial_upper_tail(bad, total, target)
    low, high = wilson_interval(total - bad, total)
    assert row[3:] == [
        f"{float(Fraction(total - bad, total) * 100):g} %",
        f"{p_value:.4f}",
        verdict(bad, total, target).value,
        "yes" if alerts(bad, p_value) else "no",
        str(budget_allows(total, target)),
        f"{float(budget_remaining(bad, total, target) * 100):g} %",
        f"{low:.3f} to {high:.3f}",
    ]


def by_slice(text: str) -> dict[tuple[int, Group], Counts]:
    """``0/4, 2 x 1/10``: one slice with four good events, two with one bad and nine good ones."""
    found: dict[tuple[int, Group], Counts] = {}
    for part in text.split(", "):
        times, _, counted = part.rpartition(" x ")
        bad, total = map(int, counted.split("/"))
        for _ in range(int(times or 1)):
            found[len(found), ()] = Counts(total - bad, bad)
    return found


@pytest.mark.parametrize(
    "row", table("bad of all, slice by slice"), ids=lambda row: f"{row[0]} {row[1]} at {row[2]}"
)
def test_an_example_of_slices_is_as_it_was_worked_by_hand(row: list[str]) -> None:
    method, _, good_enough = row[1].replace("`", "").partition(", ")
    assert method == ("Timeslices" if good_enough else "RatioTimeslices")
    slicing = Slicing(Duration(1, "d"), decimal(percent(good_enough)) if good_enough else None)
    each = objective(target=decimal(percent(row[2])), slicing=slicing)
    (found,) = reports_of(each, each.window.at(NOW), *judged(slicing, by_slice(row[0])))
    assert found.share is not None
    assert row[3:] == [
        str(found.total),
        amount(found.bad),
        f"{float(found.share * 100):g} %",
        f"{found.events.bad} of {found.events.total}",
        f"{found.p_value:.4f}",
        found.verdict.value,
        "yes" if found.alerting else "no",
        amount(found.allowed),
        f"{found.budget_remaining * 100:g} %",
        f"{found.interval[0]:.3f} to {found.interval[1]:.3f}",
    ]


def test_the_terms_of_the_worked_example_of_slices_are_those_of_the_binomial_distribution() -> None:
    none, one = 0.8**5, 5 * 0.2 * 0.8**4
    for term in (none, one, 1 - none - one):
        assert f"{term:.4f}" in PAGE
    assert 1 - none - one == pytest.approx(binomial_upper_tail(2, 5, Decimal("0.8")))


def test_the_terms_of_the_worked_example_are_those_of_the_binomial_distribution() -> None:
    none, one, two = 0.95**30, 30 * 0.05 * 0.95**29, 435 * 0.05**2 * 0.95**28
    for term in (none, one, two, none + one + two, 1 - none - one - two):
        assert f"{term:.4f}" in PAGE
    assert 1 - none - one - two == pytest.approx(binomial_upper_tail(3, 30, Decimal("0.95")))


def test_the_objective_that_is_shown_is_one() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (objective,) = objectives_of(parse_documents(example.encode(), "slo.md")).objectives
    assert (objective.target, objective.team) == (Decimal("0.99"), "platform")


def test_every_field_of_the_metric_source_is_explained() -> None:
    fields = {info.alias or name for name, info in GradwatchSource.model_fields.items()}
    fields |= {f"where.{name}" for name in Where.model_fields}
    assert {name for row in table("field") for name in re.findall(r"`([\w.]+)`", row[0])} == fields


def test_the_rates_that_are_shown_are_those_of_the_rules() -> None:
    for row, rule in zip(table("of the budget"), BURN_RULES, strict=True):
        assert percent(row[0]) == rule.share
        for shown, days in zip(row[3:5], (28, 30), strict=True):
            assert f"{float(rule.rate(timedelta(days=days))):.4g}" == shown
        assert row[5] == rule.severity
    rate = burn_rate(60, 3600, Decimal("0.999"))
    assert rate is not None
    assert f"{float(rate):.2f}" in PAGE


def test_the_default_objectives_are_those_that_are_listed() -> None:
    listed = {
        (row[1].strip("`"), tier): percent(shown)
        for row in table("measure | SLO")
        for tier, shown in zip(("production", "experiment"), row[3:], strict=True)
    }
    made = {
        (each.name, tier): Fraction(each.target)
        for each in default_objectives().objectives
        for tier in dict(each.selection.fields)["tier"]
    }
    assert made == listed


def test_every_value_and_fault_is_explained() -> None:
    assert [row[0].strip("`") for row in table("value | what it is")] == list(RUN_VALUES)
    faults = [(unit, fault) for unit, faults in UNIT_FAULTS.items() for fault in faults]
    assert [(row[0].strip("`"), row[1].strip("`")) for row in table("unit | fault")] == faults
    for number in (HEALTHY.window, HEALTHY.fewest):
        assert f" {number} " in PAGE or f" {number}:" in PAGE
    assert (HEALTHY.lowest, HEALTHY.highest) == (1 / 1000, 10)
    assert "from a thousandth to ten times" in PAGE


# --- The simulation ---


@pytest.fixture(scope="module")
def verdicts() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("verdicts")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@given(seed=st.integers(0, 2**32 - 1))
def test_a_simulated_window_holds_the_runs_that_ended_within_it(verdicts: ModuleType, seed: int) -> None:
    ended = np.array([])

    def fails(moments: np.ndarray) -> np.ndarray:
        nonlocal ended
        ended = moments
        return np.floor(moments * 1000) % 3 == 0

    course = verdicts.course(np.random.default_rng(seed), 0.0, 90.0, fails)
    for time, total, bad in zip(course.times, course.total, course.bad, strict=True):
        within = (ended <= time) & (time < ended + verdicts.WINDOW)
        assert (total, bad) == (within.sum(), (within & fails(ended)).sum())


def test_the_figures_that_are_shown_are_those_that_are_simulated(verdicts: ModuleType) -> None:
    years = 300
    rows = table("target, true rate")
    assert len(rows) == len(verdicts.TARGETS) * len(verdicts.RULES)
    for row in rows:
        share = percent(row[0])
        target = decimal(share)
        (rule,) = (each for each in verdicts.RULES if each.name == row[1])
        rng, said = np.random.default_rng(1), rule.table(target)
        seen = verdicts.alarms(rng, float(share), said, years)
        late = verdicts.delays(rng, target, said, 400)
        # Another seed, and five standard deviations of what so few years can say.
        quiet = float(percent(row[3]))
        assert seen.quiet == pytest.approx(quiet, abs=0.01 + 5 * (quiet * (1 - quiet) / years) ** 0.5)
        assert seen.a_year == pytest.approx(float(row[2]), rel=0.25, abs=0.1)
        assert np.median(late) == pytest.approx(float(row[4].split()[0]), rel=0.2, abs=0.3)


def test_the_contract_s_bar_for_alerts_is_what_keeps_false_ones_rare() -> None:
    quiet = {(row[0], row[1]): float(percent(row[3])) for row in table("target, true rate")}
    # Told at 0.05, somebody would be told falsely in more than three years of four.
    assert quiet["90 %", "verdict `breached`: p < 0.05"] < 0.25
    assert quiet["90 %", "alert: p < 0.01"] > 0.6
