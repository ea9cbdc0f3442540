"""Rules about many runs at once, on every database: collective outages, and what a job's runs cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch_collector.findings import Observation, Severity, reconcile
from gradwatch_collector.findings.observation import Scene
from gradwatch_collector.findings.rules import collective_outage, sweep_cost
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_slo.runs import Status
from tests.batches import at
from tests.run_views import RUNNING
from tests.stored_runs import store_runs

HOUR = 3600
DAY = 24 * HOUR
NOW = 100 * DAY + 20  # the first second of a minute


def many(count: int, *, ranks: int = 8, tier: str = "production") -> list[RunRow]:
    return [
        replace(RUNNING, run_id=f"{tier}{ranks}-{index:03}", rank_count=ranks, tier=tier)
        for index in range(count)
    ]


def note(database: Engine, runs: Iterable[RunRow], rule: str = c.RULE_STALLED, seconds: float = 0) -> None:
    """Open findings of a rule, each a second after the one before."""
    observations = [
        Observation(
            run_id=run.run_id, attempt=1, rule=rule, severity=Severity.TICKET,
            first_seen=at(seconds + place), last_seen=at(NOW),
        )
        for place, run in enumerate(runs)
    ]  # fmt: skip
    with transaction(database) as connection:
        reconcile(connection, observations, at(seconds), clears_after={rule: 1e9})


def outages(database: Engine, runs: list[RunRow], *, is_off: bool = False) -> list[Observation]:
    parameters = None if is_off else collective_outage.Parameters()
    with database.connect() as connection:
        return list(collective_outage.detect(Scene(connection, at(NOW), runs), lambda _: parameters))


def test_many_runs_that_hang_at_once_are_one_page_told_of_one_of_them(database: Engine) -> None:
    runs = [*many(10, tier="experiment"), *many(10)]
    note(database, [*runs[5:10], runs[12]], c.RULE_SLOW_COLLECTIVE)
    (found,) = outages(database, runs)
    assert (found.run_id, found.severity, found.first_seen) == ("production8-002", Severity.PAGE, at(0))
    assert (found.evidence["count"], found.evidence["live"]) == (6, 20)
    assert found.evidence["runs"] == ["production8-002", *(f"experiment8-{place:03}" for place in range(5, 10))]


def test_it_stays_one_finding_when_the_run_that_it_is_told_of_comes_back(database: Engine) -> None:
    runs = many(8)
    note(database, runs[:7])
    (first,) = outages(database, runs)
    with transaction(database) as connection:
        reconcile(connection, [first], at(1), clears_after={c.RULE_STALLED: 1e9})
        connection.execute(
            schema.finding.update()
            .where(schema.finding.c.run_id == first.run_id, schema.finding.c.rule == c.RULE_STALLED)
            .values(state="resolved")
        )
    (second,) = outages(database, runs)
    assert (second.run_id, second.evidence["count"]) == (first.run_id, 6)


def test_an_outage_that_is_replayed_is_as_old_as_what_was_last_heard_of_its_runs(database: Engine) -> None:
    runs = [replace(run, last_seen_at=at(place)) for place, run in enumerate(many(6))]
    note(database, runs)
    (found,) = outages(database, runs)
    assert found.as_of == at(5)


def test_it_pages_as_soon_as_a_production_run_is_among_them(database: Engine) -> None:
    experiments, runs = many(6, tier="experiment"), many(2)
    note(database, experiments)
    (first,) = outages(database, experiments)
    assert (first.run_id, first.severity) == ("experiment8-000", Severity.TICKET)
    with transaction(database) as connection:
        reconcile(connection, [first], at(1), clears_after={c.RULE_STALLED: 1e9})
    note(database, runs, seconds=60)
    (second,) = outages(database, [*experiments, *runs])
    assert (second.run_id, second.severity) == ("production8-000", Severity.PAGE)
    assert second.evidence["count"] == 8


@pytest.mark.parametrize(
    ("live", "hanging", "apart"),
    [
        pytest.param(many(20), 4, 0, id="few"),
        pytest.param(many(40), 8, 0, id="a fifth"),
        pytest.param(many(20, ranks=1), 10, 0, id="single processes"),
        pytest.param(many(9), 9, 200, id="one after the other"),
        pytest.param([replace(run, status=Status.FAILED) for run in many(9)], 9, 0, id="over"),
    ],
)
def test_runs_that_hang_for_reasons_of_their_own_are_no_outage(
    database: Engine, live: list[RunRow], hanging: int, apart: float
) -> None:
    for place, run in enumerate(live[:hanging]):
        note(database, [run], seconds=place * apart)
    assert outages(database, live) == []


def test_an_outage_is_silent_where_its_rule_is_off(database: Engine) -> None:
    note(database, many(8))
    assert outages(database, many(8), is_off=True) == []


# --- Cost -----------------------------------------------------------------------------------------------------


def spend(
    database: Engine,
    days_ago: float,
    *,
    runs: int = 4,
    hours: float = 1.0,
    ratio: float | None = None,
    job: str = "j",
) -> list[RunRow]:
    """Runs of a job that began so long ago and took so many hours on two devices each."""
    began = NOW - days_ago * DAY
    rows = [
        {
            "run_id": f"{job}-{days_ago}-{index}", "job": job, "model": None, "dataset": None, "team": None,
            "tier": "experiment", "status": "succeeded", "attempt": 1, "rank_count": 2, "started_at": at(began),
            "ended_at": at(began + hours * HOUR), "last_seen_at": at(began), "last_loss_nonfinite": False,
        }
        for index in range(runs)
    ]  # fmt: skip
    with transaction(database) as connection:
        store_runs(connection, rows)
        if ratio is not None:
            known = [{"run_id": row["run_id"], "step_cost_ratio": ratio} for row in rows]
            connection.execute(schema.run_summary.insert(), known)
    return [
        replace(RUNNING, run_id=str(row["run_id"]), job=job, started_at=at(began), status=Status.SUCCEEDED)
        for row in rows
    ]


def costs(database: Engine, runs: list[RunRow], seconds: float = 0) -> list[Observation]:
    with database.connect() as connection:
        scene = Scene(connection, at(NOW + seconds), runs)
        return list(sweep_cost.detect(scene, lambda _: sweep_cost.Parameters()))


def test_a_job_that_took_several_times_its_usual_hours_in_a_day_is_told_once(database: Engine) -> None:
    for day in range(1, 6):
        spend(database, day + 0.5)
    spend(database, 0.5, job="other")
    (found,) = costs(database, spend(database, 0.5, runs=20))
    assert (found.run_id, found.severity) == ("j-0.5-0", Severity.TICKET)
    assert found.evidence == {
        "device_hours": 40.0, "usual_device_hours_a_day": 8.0, "runs": 20, "step_cost_ratio": None,
    }  # fmt: skip


def test_steps_that_cost_a_fifth_more_are_told_and_raise_no_alert_while_they_are_few(database: Engine) -> None:
    (found,) = costs(database, spend(database, 0.5, ratio=1.3, hours=0.5))
    assert (found.severity, found.evidence["step_cost_ratio"]) == (Severity.INFO, 1.3)
    (found,) = costs(database, spend(database, 0.4, ratio=1.3, hours=4, job="long"))
    assert (found.severity, found.evidence["device_hours"]) == (Severity.TICKET, 32.0)


def test_what_a_job_usually_costs_is_left_alone(database: Engine) -> None:
    for day in range(1, 6):
        spend(database, day + 0.5)
    assert costs(database, spend(database, 0.5, runs=8, ratio=1.1)) == []
    assert costs(database, spend(database, 0.5, runs=2, ratio=9.0, job="two of them")) == []
    assert costs(database, spend(database, 0.5, runs=50, job="new")) == []


def test_it_is_told_of_the_same_run_for_as_long_as_it_lasts(database: Engine) -> None:
    runs = spend(database, 0.5, ratio=1.3)
    (found,) = costs(database, runs)
    with transaction(database) as connection:
        reconcile(connection, [found], at(NOW))
    later = spend(database, 0.2, ratio=1.3)
    (again,) = costs(database, later, 60)
    assert again.run_id == found.run_id
