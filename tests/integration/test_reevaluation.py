"""Objectives follow what the registry learns: late endings, corrections, targets, runs that are pruned."""

from __future__ import annotations

from decimal import Decimal

import pytest
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch_collector.objectives.counters import keep_counted
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.records import Batch
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.retention import DAY, FOREVER, Policy, prune
from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import Convergence, Measure, Selection, SuccessRate
from gradwatch_slo.objective import Objective
from gradwatch_slo.windows import TimeWindow
from tests.batches import at, batch, event, source
from tests.story import Story

HOUR = 3600


def objective(measure: Measure) -> Objective:
    return Objective(
        name="an-objective",
        indicator="an-indicator",
        target=Decimal("0.9"),
        measure=measure,
        window=TimeWindow(Duration(28, "d")),
        selection=Selection(),
    )


SUCCESS, CONVERGENCE = objective(SuccessRate()), objective(Convergence())


@pytest.fixture
def story(database: Engine) -> Story:
    return Story(database)


def keep(database: Engine, seconds: float) -> None:
    """Count all that is over."""
    indicators = [Indicator.of(each) for each in (SUCCESS, CONVERGENCE)]
    with transaction(database) as connection:
        assert keep_counted(connection, indicators, at(seconds))


def counted(database: Engine, each: Objective, seconds: float) -> tuple[int, int]:
    with database.connect() as connection:
        (report,) = evaluate_objectives(connection, [each], at(seconds))
    return report.good, report.bad


def started(run_id: str, seconds: float, **resource: object) -> Batch:
    return batch(source(run_id, **resource), event(c.RUN_STARTED, seconds))


def ended(run_id: str, seconds: float, status: str, sequence: int = 9, **resource: object) -> Batch:
    return batch(source(run_id, **resource), event(c.RUN_ENDED, seconds, sequence, STATUS=status))


def test_a_correction_of_hours_ago_is_seen_at_once_and_counted_anew(database: Engine, story: Story) -> None:
    story.receive(started("run", 0), 1)
    story.receive(ended("run", 60, "failed"), 61)
    keep(database, 5 * HOUR)
    assert counted(database, SUCCESS, 5 * HOUR) == (0, 1)
    story.receive(ended("run", 70, "succeeded", 10), 5 * HOUR)
    assert counted(database, SUCCESS, 5 * HOUR) == (1, 0)
    keep(database, 5 * HOUR)
    assert counted(database, SUCCESS, 5 * HOUR) == (1, 0)


def test_a_run_that_was_lost_and_lives_is_counted_where_it_ends(database: Engine, story: Story) -> None:
    story.receive(started("run", 0), 1)
    assert story.wait(100) == ["run"]
    keep(database, 5 * HOUR)
    assert counted(database, SUCCESS, 5 * HOUR) == (0, 1)
    story.receive(batch(source("run"), event(c.RUN_HEARTBEAT, 5 * HOUR, 2, STEP=7)), 5 * HOUR)
    assert counted(database, SUCCESS, 5 * HOUR) == (0, 0)
    story.receive(ended("run", 6 * HOUR, "succeeded"), 6 * HOUR)
    keep(database, 8 * HOUR)
    assert counted(database, SUCCESS, 8 * HOUR) == (1, 0)


def test_a_target_that_is_told_late_counts(database: Engine, story: Story) -> None:
    work = {"target": "val_loss<=0.5", "deadline": 100.0}
    story.receive(started("run", 0, **work), 1)
    story.receive(ended("run", 90, "succeeded", **work), 91)
    keep(database, 5 * HOUR)
    assert counted(database, CONVERGENCE, 5 * HOUR) == (0, 1)
    reached = event(c.TARGET_REACHED, 80, 3, TARGET="val_loss<=0.5", TARGET_VALUE=0.4)
    story.receive(batch(source("run", **work), reached), 5 * HOUR)
    assert counted(database, CONVERGENCE, 5 * HOUR) == (1, 0)


def test_the_baseline_is_what_was_known_when_the_run_started_and_stays(database: Engine, story: Story) -> None:
    work = {"target": "val_loss<=0.5", "model": "mlp", "dataset": "digits"}

    def good(name: str, seconds: float, took: float) -> None:
        reached = event(c.TARGET_REACHED, seconds + took, 3, TARGET="val_loss<=0.5", TARGET_VALUE=0.4)
        story.receive(batch(source(name, **work), event(c.RUN_STARTED, seconds)), seconds)
        story.receive(batch(source(name, **work), reached), seconds + took)
        story.receive(ended(name, seconds + took, "succeeded", **work), seconds + took)

    def baseline(name: str) -> int | None:
        (row,) = (each for each in story.rows(schema.run) if each["run_id"] == name)
        found: int | None = row["baseline"]
        return found

    for number in range(5):
        good(f"earlier-{number}", 1000 * number, 100)
        assert baseline(f"earlier-{number}") is None
    story.receive(started("judged", 6000, **work), 6000)
    assert baseline("judged") == 150 * 10**9
    for number in range(20):
        good(f"later-{number}", 7000 + 1000 * number, 500)
    story.receive(ended("judged", 6151, "succeeded", **work), 40_000)
    assert baseline("judged") == 150 * 10**9
    story.receive(started("next", 50_000, **work), 50_000)
    assert baseline("next") == 750 * 10**9


def test_a_run_that_is_pruned_counts_no_more(database: Engine, story: Story) -> None:
    story.receive(started("run", 0), 1)
    story.receive(ended("run", 60, "failed"), 61)
    now = 10 * 24 * HOUR
    keep(database, now)
    policy = Policy(raw=FOREVER, rollups=FOREVER, runs=5 * DAY)
    assert prune(lambda: transaction(database), policy, at(now)).runs == 1
    assert counted(database, SUCCESS, now) == (0, 0)
    keep(database, now)
    assert counted(database, SUCCESS, now) == (0, 0)
