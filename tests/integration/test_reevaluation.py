"""Objectives follow what the registry learns: late endings, corrections, targets, runs that are pruned."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

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


WORK = {"target": "val_loss<=0.5", "model": "mlp", "dataset": "digits"}
SUCCESS, CONVERGENCE = objective(SuccessRate()), objective(Convergence())


@pytest.fixture
def story(database: Engine) -> Story:
    return Story(database)


def keep(database: Engine, seconds: float, *more: Objective) -> None:
    """Count all that is over."""
    indicators = [Indicator.of(each) for each in (SUCCESS, CONVERGENCE, *more)]
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
    def good(name: str, seconds: float, took: float) -> None:
        reached = event(c.TARGET_REACHED, seconds + took, 3, TARGET="val_loss<=0.5", TARGET_VALUE=0.4)
        story.receive(batch(source(name, **WORK), event(c.RUN_STARTED, seconds)), seconds)
        story.receive(batch(source(name, **WORK), reached), seconds + took)
        story.receive(ended(name, seconds + took, "succeeded", **WORK), seconds + took)

    def baseline(name: str) -> int | None:
        (row,) = (each for each in story.rows(schema.run) if each["run_id"] == name)
        found: int | None = row["baseline"]
        return found

    for number in range(5):
        good(f"earlier-{number}", 1000 * number, 100)
        assert baseline(f"earlier-{number}") is None
    story.receive(started("judged", 6000, **WORK), 6000)
    assert baseline("judged") == 150 * 10**9
    for number in range(20):
        good(f"later-{number}", 7000 + 1000 * number, 500)
    story.receive(ended("judged", 6151, "succeeded", **WORK), 40_000)
    assert baseline("judged") == 150 * 10**9
    story.receive(started("next", 50_000, **WORK), 50_000)
    assert baseline("next") == 750 * 10**9


def good_with_clock(story: Story, name: str, seconds: float, clock: float, took: float = 7) -> None:
    """A run of a minute that reached its target in time, by a clock that is ``clock`` seconds ahead."""
    sender, told = source(name, **WORK), seconds + clock
    story.receive(batch(sender, event(c.RUN_STARTED, told)), seconds)
    for later in range(5, 60, 5):
        if later - 5 <= took < later:
            story.receive(batch(sender, event(c.TARGET_REACHED, told + took, 900)), seconds + took)
        story.receive(batch(sender, event(c.RUN_HEARTBEAT, told + later, later)), seconds + later)
    story.receive(ended(name, told + 60, "succeeded", 999), seconds + 60)


@pytest.mark.parametrize("clock", [-3600, 3600], ids=["behind", "ahead"])
def test_runs_with_a_wrong_clock_are_a_baseline_as_those_with_a_right_one_are(
    database: Engine, story: Story, clock: float
) -> None:
    for number in range(5):
        good_with_clock(story, f"wrong-{number}", 1000 * number, clock)
    good_with_clock(story, "right", 6000, 0)
    runs = {row["run_id"]: row for row in story.rows(schema.run)}
    took = [row["target_reached_at"] - row["started_at"] for row in runs.values()]
    assert took == [7 * 10**9] * 6
    assert runs["right"]["baseline"] == 10.5 * 10**9
    assert counted(database, CONVERGENCE, 7000) == (1, 0)


def test_the_baseline_of_a_run_whose_clock_is_behind_is_that_of_its_true_start(story: Story) -> None:
    for number in range(5):
        good_with_clock(story, f"earlier-{number}", 100 * number, 0, took=20)
    good_with_clock(story, "behind", 1000, -3600)
    (row,) = (each for each in story.rows(schema.run) if each["run_id"] == "behind")
    assert row["baseline"] == 30 * 10**9


def test_no_time_at_all_is_no_baseline(story: Story) -> None:
    for number in range(5):
        good_with_clock(story, f"disordered-{number}", 1000 * number, 0, took=7)
        told = event(c.TARGET_REACHED, 1000 * number - 500, 901)
        story.receive(batch(source(f"disordered-{number}", **WORK), told), 1000 * number + 60)
    good_with_clock(story, "right", 6000, 0)
    (row,) = (each for each in story.rows(schema.run) if each["run_id"] == "right")
    assert row["baseline"] is None


def test_a_clock_that_becomes_known_after_the_end_counts_anew_what_was_counted(
    database: Engine, story: Story
) -> None:
    work = WORK | {"deadline": 100.0}
    for rank, clock in ((0, -3600), (1, 0)):
        sender = source("run", rank=rank, instance=f"r{rank}", **work)
        story.receive(batch(sender, event(c.RUN_STARTED, clock)), 0)
    # By a clock that nobody knows yet the target was reached an hour before the other rank started.
    first = source("run", rank=0, instance="r0", **work)
    story.receive(batch(first, event(c.TARGET_REACHED, 150 - 3600, 2)), 150)
    story.receive(batch(source("run", rank=1, instance="r1"), event(c.RUN_ENDED, 160, 9, STATUS="failed")), 160)
    keep(database, 5 * HOUR)
    for seconds in range(5 * HOUR, 5 * HOUR + 20, 5):
        story.receive(batch(first, event(c.RUN_HEARTBEAT, seconds - 3600, 3)), seconds)
    (row,) = story.rows(schema.run)
    assert row["target_reached_at"] - row["started_at"] == 150 * 10**9
    assert counted(database, CONVERGENCE, 6 * HOUR) == (0, 1)


@pytest.mark.parametrize(
    ("told", "other"),
    [
        ({"tier": "production"}, {"tier": "experiment"}),
        ({"team": "audio"}, {"team": "vision"}),
        ({"model": "mlp"}, {"model": "gpt"}),
        ({"dataset": "digits"}, {"dataset": "letters"}),
    ],
)
def test_who_a_run_belongs_to_may_be_told_by_another_rank_after_it_was_counted(
    database: Engine, story: Story, told: dict[str, Any], other: dict[str, Any]
) -> None:
    """A run is described by its lowest rank."""
    ((name, value),) = told.items()
    about = replace(SUCCESS, selection=Selection(((name, (value,)),)))
    second = source("run", rank=1, instance="r1", **other)
    story.receive(batch(second, event(c.RUN_STARTED, 0), event(c.RUN_ENDED, 60, 9, STATUS="failed")), 61)
    keep(database, 5 * HOUR, about)
    assert counted(database, about, 5 * HOUR) == (0, 0)
    first = source("run", rank=0, instance="r0", **told)
    story.receive(batch(first, event(c.RUN_STARTED, 1)), 5 * HOUR)
    assert counted(database, about, 5 * HOUR) == (0, 1)


def test_a_deadline_may_be_told_by_another_rank_after_the_run_was_counted(
    database: Engine, story: Story
) -> None:
    reached = event(c.TARGET_REACHED, 50, 2)
    second = source("run", rank=1, instance="r1", **WORK, deadline=100.0)
    end = event(c.RUN_ENDED, 60, 9, STATUS="failed")
    story.receive(batch(second, event(c.RUN_STARTED, 0), reached, end), 61)
    keep(database, 5 * HOUR)
    assert counted(database, CONVERGENCE, 5 * HOUR) == (1, 0)
    first = source("run", rank=0, instance="r0", **WORK, deadline=40.0)
    story.receive(batch(first, event(c.RUN_STARTED, 1)), 5 * HOUR)
    assert counted(database, CONVERGENCE, 5 * HOUR) == (0, 1)


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
