from __future__ import annotations

import dataclasses
import json
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from slo_facts import HOUR, MINUTE, NOW, objective, run

from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import Convergence, CountRatio, Selection, SuccessRate
from gradwatch_slo.objectives import default_objectives
from gradwatch_slo.render import render_json
from gradwatch_slo.report import ObjectiveReport, evaluate, rfc3339, to_json
from gradwatch_slo.runs import RunFacts, Status
from gradwatch_slo.schemas import SCHEMAS, load_schema
from gradwatch_slo.windows import TimeWindow

DAY = timedelta(days=1)
DEFAULTS = default_objectives().objectives


def report_of(runs: list[RunFacts], measure: Any = SuccessRate(), **changes: Any) -> ObjectiveReport:  # noqa: B008 - frozen
    (report,) = evaluate([objective(measure, **changes)], runs, NOW)
    return report


def failures(bad: int, total: int, **facts: Any) -> list[RunFacts]:
    return [run(Status.FAILED if i < bad else Status.SUCCEEDED, **facts) for i in range(total)]


def test_three_of_thirty_production_runs_failed() -> None:
    # P(X >= 3 | 30, 0.01) = 1 - 0.99^30 - 30 x 0.01 x 0.99^29 - 435 x 0.0001 x 0.99^28 = 0.00332
    report = evaluate(DEFAULTS, failures(3, 30), NOW)[0]
    assert report.p_value == pytest.approx(0.00332, abs=5e-6)
    assert report.alerting
    assert to_json(report) == {
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


def test_without_runs_every_default_objective_is_there_with_its_budget_unspent() -> None:
    reports = evaluate(DEFAULTS, [], NOW)
    assert [(report.name, dict(report.group)) for report in reports] == [
        ("training-success-rate", {"tier": "production"}),
        ("training-success-rate", {"tier": "experiment"}),
        ("time-to-convergence", {"tier": "production"}),
        ("time-to-convergence", {"tier": "experiment"}),
    ]
    for report in reports:
        assert report.verdict == "insufficient data"
        assert (report.sli, report.budget_remaining, report.interval) == (None, 1.0, (0.0, 1.0))
        assert report.summary == "no runs counted; the budget is unspent"
        assert not report.alerting


@pytest.mark.parametrize(
    ("bad", "total", "summary"),
    [
        (0, 1, "0 of 1 run failed; the budget allows 0; too few to judge, 5 are needed"),
        (2, 4, "2 of 4 runs failed; the budget allows 0; too few to judge, 5 are needed"),
        (1, 20, "1 of 20 runs failed; the budget allows 2"),
    ],
)
def test_the_summary_is_one_sentence(bad: int, total: int, summary: str) -> None:
    assert report_of(failures(bad, total)).summary == summary


def test_the_summary_has_words_for_every_measure() -> None:
    slow = [run(reached=HOUR, deadline=MINUTE) for _ in range(5)]
    assert report_of(slow, Convergence()).summary == (
        "5 of 5 runs did not reach the target in time; the budget allows 0"
    )
    lost = CountRatio(Selection(), Selection((("status", ("lost",)),)), inverted=True)
    assert report_of([run(Status.LOST), *failures(0, 9)], lost).summary == (
        "1 of 10 runs counted as bad; the budget allows 1"
    )


def test_the_tiers_of_the_success_rate_differ_in_target_and_in_short_runs() -> None:
    short = timedelta(seconds=59)
    runs = [run(lasted=short), run(lasted=short, tier="experiment")]
    production, experiment = evaluate(DEFAULTS, runs, NOW)[:2]
    assert (production.target, production.total) == (Decimal("0.99"), 0)
    assert (experiment.target, experiment.total) == (Decimal("0.9"), 1)


def test_groups_are_reported_apart_and_unknown_is_a_group() -> None:
    runs = [
        run(team="vision"),
        run(Status.FAILED, team=None),
        run(team="audio"),
        run(Status.RUNNING, team="text"),
    ]
    reports = evaluate([objective(group_by=("team", "tier"))], runs, NOW)
    assert [(dict(report.group), report.good, report.bad) for report in reports] == [
        ({"team": None, "tier": "production"}, 0, 1),
        ({"team": "audio", "tier": "production"}, 1, 0),
        ({"team": "text", "tier": "production"}, 0, 0),
        ({"team": "vision", "tier": "production"}, 1, 0),
    ]


def test_an_objective_without_any_group_is_still_reported() -> None:
    (report,) = evaluate([objective(group_by=("team",))], [], NOW)
    assert (dict(report.group), report.total) == ({}, 0)


def test_only_selected_runs_count() -> None:
    selection = Selection((("job", ("digits", "gpt")), ("tier", ("production",))))
    runs = [run(), run(job="gpt"), run(job="other"), run(tier="experiment")]
    assert report_of(runs, selection=selection).total == 2


@pytest.mark.parametrize(
    ("ended", "counted"),
    [(NOW, 1), (NOW - 28 * DAY, 1), (NOW - 28 * DAY - MINUTE, 0), (NOW - 14 * DAY, 1)],
)
def test_runs_are_selected_by_when_they_ended(ended: Any, counted: int) -> None:
    assert report_of([run(started=ended - 3 * DAY, lasted=3 * DAY)]).total == counted


def test_a_run_belongs_to_the_calendar_month_it_ended_in() -> None:
    monthly = TimeWindow(Duration(1, "M"), NOW.replace(month=1, day=1, hour=0))
    first = NOW.replace(day=1, hour=0)
    runs = [
        run(started=first - HOUR, lasted=HOUR),
        run(Status.FAILED, started=first - HOUR, lasted=HOUR - MINUTE),
    ]
    march = report_of(runs, window=monthly)
    assert (march.good, march.bad) == (1, 0)
    assert to_json(march)["window"] == {
        "duration": "1M",
        "rolling": False,
        "from": "2026-03-01T00:00:00Z",
        "to": "2026-04-01T00:00:00Z",
    }
    (february,) = evaluate([objective(window=monthly)], runs, NOW, as_of=first - MINUTE)
    assert (february.good, february.bad) == (0, 1)


def test_a_wrong_clock_moves_no_run_out_of_what_was_received() -> None:
    received = NOW - HOUR
    ahead = run(started=NOW - 2 * HOUR, lasted=900 * DAY, received_at=received)
    assert report_of([ahead]).total == 1
    before_it_began = run(started=NOW - 2 * HOUR, lasted=-900 * DAY, received_at=received)
    assert report_of([before_it_began]).total == 1
    started_in_the_future = run(started=NOW + 9 * DAY, received_at=received)
    assert report_of([started_in_the_future]).total == 1
    without_receipt = run(started=NOW - 2 * HOUR, lasted=900 * DAY)
    assert report_of([without_receipt]).total == 1


runs_around_now = st.builds(
    run,
    st.sampled_from(Status),
    started=st.integers(-60 * 24, 0).map(lambda hours: NOW + hours * HOUR),
    lasted=st.integers(0, 200).map(lambda hours: hours * HOUR),
    reached=st.none() | st.integers(0, 200).map(lambda hours: hours * HOUR),
    deadline=st.none() | st.just(24 * HOUR),
    tier=st.sampled_from(["production", "experiment"]),
)


@given(st.lists(runs_around_now, max_size=30), st.integers(0, 40 * 24))
def test_a_report_made_later_as_of_a_moment_is_the_report_of_that_moment(
    runs: list[RunFacts], hours_ago: int
) -> None:
    moment = NOW - hours_ago * HOUR

    def known_then(each: RunFacts) -> RunFacts:
        reached, ended = each.target_reached_at, each.ended_at
        then = dataclasses.replace(
            each, target_reached_at=reached if reached is not None and reached <= moment else None
        )
        if ended is None or ended > moment:
            then = dataclasses.replace(then, status=Status.RUNNING, ended_at=None)
        return then

    # What is received is received at its own moment here: nothing of the future is clamped to the present.
    runs = [dataclasses.replace(each, received_at=NOW + 300 * DAY) for each in runs]
    before = [known_then(each) for each in runs if each.started_at <= moment]
    assert evaluate(DEFAULTS, runs, NOW, as_of=moment) == evaluate(DEFAULTS, before, moment)


@given(st.lists(runs_around_now, max_size=30))
def test_reports_do_not_depend_on_the_order_of_runs(runs: list[RunFacts]) -> None:
    assert evaluate(DEFAULTS, runs, NOW) == evaluate(DEFAULTS, runs[::-1], NOW)


@given(st.lists(runs_around_now, max_size=30), st.decimals(0, "0.999999999999", places=12))
def test_the_json_of_any_report_satisfies_its_schema(runs: list[RunFacts], target: Decimal) -> None:
    grouped = objective(target=target, group_by=("job", "model", "dataset", "team", "tier"))
    reports = evaluate([*DEFAULTS, grouped], runs, NOW)
    printed = json.loads(render_json(reports))
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
    report = to_json(report_of([run()]))
    schema = Draft202012Validator(load_schema("slo-report"))

    def is_valid(objective: object) -> bool:
        return schema.is_valid({"objectives": [objective], "warnings": []})

    assert is_valid(report)
    for name in report:
        assert not is_valid({key: value for key, value in report.items() if key != name})
    assert not is_valid(report | {"p_value": 1.0})
    assert not schema.is_valid([report])


def test_moments_are_rfc_3339_in_utc() -> None:
    assert rfc3339(NOW) == "2026-03-29T12:00:00Z"
    assert rfc3339(NOW + timedelta(milliseconds=1)) == "2026-03-29T12:00:00.001000Z"
