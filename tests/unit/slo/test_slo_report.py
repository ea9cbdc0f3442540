from __future__ import annotations

import json
from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from slo_reports import NOW, SUCCESS, objective, of_production, report, reports

from gradwatch_slo.counts import Counts, Group
from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import (
    Convergence,
    CountRatio,
    Measure,
    Selection,
    Threshold,
    UnitRatio,
)
from gradwatch_slo.render import render_json
from gradwatch_slo.report import rfc3339, to_json
from gradwatch_slo.schemas import SCHEMAS, load_schema
from gradwatch_slo.windows import TimeWindow


def test_three_of_thirty_production_runs_failed() -> None:
    # P(X >= 3 | 30, 0.01) = 1 - 0.99^30 - 30 x 0.01 x 0.99^29 - 435 x 0.0001 x 0.99^28 = 0.00332
    first = of_production(3, 30)[0]
    assert first.p_value == pytest.approx(0.00332, abs=5e-6)
    assert first.alerting
    assert to_json(first) == {
        "name": "training-success-rate",
        "indicator": "training-success-rate",
        "group": {"tier": "production"},
        "target": 0.99,
        "sli": 0.9,
        "good": 27,
        "bad": 3,
        "total": 30,
        "verdict": "breached",
        # Wilson, z^2 = 3.8415: (0.9 + z^2 / 60 -+ z sqrt(0.09 / 30 + z^2 / 3600)) / (1 + z^2 / 30)
        "interval": [pytest.approx(0.74379, abs=1e-5), pytest.approx(0.96540, abs=1e-5)],
        # 1 - 3 / (30 x 0.01)
        "budget_remaining": -9.0,
        "window": {
            "duration": "28d",
            "rolling": True,
            "from": "2026-03-01T12:00:00Z",
            "to": "2026-03-29T12:00:00Z",
        },
        "summary": "3 of 30 runs failed; the budget allows 0",
    }


def test_where_nothing_was_counted_the_budget_is_unspent() -> None:
    nothing = report(0, 0)
    assert nothing.verdict == "insufficient data"
    assert (nothing.sli, nothing.budget_remaining, nothing.interval) == (None, 1.0, (0.0, 1.0))
    assert nothing.summary == "no runs counted; the budget is unspent"
    assert not nothing.alerting


@pytest.mark.parametrize(
    ("bad", "total", "summary"),
    [
        (0, 1, "0 of 1 run failed; the budget allows 0; too few to judge, 5 are needed"),
        (2, 4, "2 of 4 runs failed; the budget allows 0; too few to judge, 5 are needed"),
        (1, 20, "1 of 20 runs failed; the budget allows 2"),
    ],
)
def test_the_summary_is_one_sentence(bad: int, total: int, summary: str) -> None:
    assert report(bad, total).summary == summary


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (SUCCESS, "5 of 50 runs failed"),
        (Convergence(), "5 of 50 runs did not reach the target in time"),
        (CountRatio(Selection(), Selection()), "5 of 50 runs counted as bad"),
        (
            Threshold("memory_headroom", "gt", Decimal("0.10")),
            "5 of 50 runs had memory headroom <= 0.1",
        ),
        (UnitRatio("step", "nonfinite"), "5 of 50 steps were nonfinite"),
        (UnitRatio("checkpoint", "failed"), "5 of 50 checkpoints failed"),
    ],
)
def test_the_summary_has_words_for_every_measure(measure: Measure, words: str) -> None:
    assert report(5, 50, measure).summary == f"{words}; the budget allows 5"


def test_groups_that_exist_by_definition_are_reported_counted_or_not() -> None:
    tiers = objective(selection=Selection((("tier", ("production", "experiment")),)), group_by=("tier",))
    assert [(each.group["tier"], each.total) for each in reports(tiers, {("experiment",): Counts(3, 1)})] == [
        ("production", 0),
        ("experiment", 4),
    ]


def test_other_groups_are_reported_in_order_if_anything_was_counted_and_unknown_is_one() -> None:
    counts: dict[Group, Counts] = {("vision",): Counts(1, 0), (None,): Counts(0, 1), ("audio",): Counts(2, 0)}
    by_team = objective(group_by=("team",))
    assert [(each.group["team"], each.total) for each in reports(by_team, counts)] == [
        (None, 1),
        ("audio", 2),
        ("vision", 1),
    ]


def test_an_objective_without_any_group_is_still_reported() -> None:
    (only,) = reports(objective(group_by=("team",)), {})
    assert (dict(only.group), only.total) == ({}, 0)


def test_where_nothing_was_counted_it_is_still_told_which_tier_is_meant() -> None:
    of_a_tier = objective(
        selection=Selection((("tier", ("production",)), ("job", ("a", "b")))), group_by=("tier", "team", "job")
    )
    (only,) = reports(of_a_tier, {})
    assert dict(only.group) == {"tier": "production"}


def test_the_json_tells_a_calendar_window_from_a_rolling_one() -> None:
    monthly = TimeWindow(Duration(1, "M"), NOW.replace(month=1, day=1, hour=0))
    assert to_json(report(0, 9, window=monthly))["window"] == {
        "duration": "1M",
        "rolling": False,
        "from": "2026-03-01T00:00:00Z",
        "to": "2026-04-01T00:00:00Z",
    }


names = st.none() | st.text()


@given(
    st.dictionaries(st.tuples(names, names), st.builds(Counts, st.integers(0, 2000), st.integers(0, 2000))),
    st.decimals(0, "0.999999999999", places=12),
)
def test_the_json_of_any_report_satisfies_its_schema(counts: dict[Group, Counts], target: Decimal) -> None:
    grouped = reports(objective(target=target, group_by=("job", "team")), counts)
    printed = json.loads(render_json(grouped))
    Draft202012Validator(load_schema("slo-report")).validate(printed)
    objective_schema = Draft202012Validator(load_schema("objective"))
    for each in printed["objectives"]:
        objective_schema.validate(each)
        assert each["good"] + each["bad"] == each["total"]


def test_the_schemas_are_schemas_and_refuse_what_is_none() -> None:
    for name in SCHEMAS:
        Draft202012Validator.check_schema(load_schema(name))
    with pytest.raises(ValueError, match="expected one of objective, slo-report"):
        load_schema("nothing")
    printed = to_json(report(0, 1))
    schema = Draft202012Validator(load_schema("slo-report"))

    def is_valid(objective: object) -> bool:
        return schema.is_valid({"objectives": [objective], "warnings": []})

    assert is_valid(printed)
    for name in printed:
        assert not is_valid({key: value for key, value in printed.items() if key != name})
    assert not is_valid(printed | {"p_value": 1.0})
    assert not schema.is_valid([printed])


def test_moments_are_rfc_3339_in_utc() -> None:
    assert rfc3339(NOW) == "2026-03-29T12:00:00Z"
    assert rfc3339(NOW + timedelta(milliseconds=1)) == "2026-03-29T12:00:00.001000Z"
