"""How often stored runs were interrupted, how soon that was noticed, and how soon they went on."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from click.testing import CliRunner
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_collector.objectives.exclusions import What, exclude
from gradwatch_collector.runs.interruptions import interruptions_of
from gradwatch_collector.runs.silence import mark_silent
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_slo.interruptions import Interruptions
from tests.batches import SECOND, at, batch, event, source
from tests.told_runs import tell

WEEK = 7 * 86_400


def read(database: Engine, start: float = 0, end: float = WEEK, *conditions: Any) -> Interruptions:
    with database.connect() as connection:
        return interruptions_of(connection, at(start), at(end), *conditions)


def begin(database: Engine, run_id: str, attempt: int, seconds: float, **of: Any) -> None:
    sender = source(run_id, attempt=attempt, instance=f"{run_id}-{attempt}", **of)
    tell(database, batch(sender, event(c.RUN_STARTED, seconds)), seconds)


def end(
    database: Engine, run_id: str, attempt: int, seconds: float, status: str, told: float = 0, **of: Any
) -> None:
    sender = source(run_id, attempt=attempt, instance=f"{run_id}-{attempt}")
    tell(database, batch(sender, event(c.RUN_ENDED, seconds, 1, STATUS=status, **of)), seconds + told)


def test_a_run_that_failed_was_lost_and_went_on_each_time(database: Engine) -> None:
    begin(database, "run", 1, 0)
    # It will be tried again, so that the run goes on and its history has no ending.
    end(database, "run", 1, 1000, "failed", told=1, WILL_RETRY=True)
    begin(database, "run", 2, 1100)
    with transaction(database) as connection:
        assert mark_silent(connection, at(2000), 30 * SECOND, at(0)) == ["run"]
    begin(database, "run", 3, 3100)
    end(database, "run", 3, 9100, "succeeded")
    found = read(database)
    assert (found.attempts, found.interruptions) == (3, 2)
    # The second lived for an instant, as far as anybody knows.
    assert found.running == (1000 + 0 + 6000) * SECOND
    assert found.mean_time_to_interrupt == 3500 * SECOND
    assert found.mean_time_to_detect == (1 + 900) / 2 * SECOND
    assert found.mean_time_to_recover == (100 + 2000) / 2 * SECOND


def test_an_attempt_whose_successor_is_heard_of_before_it_is_missed_was_noticed_then(database: Engine) -> None:
    begin(database, "run", 1, 0)
    begin(database, "run", 2, 20)
    with transaction(database) as connection:
        mark_silent(connection, at(40), 30 * SECOND, at(0))
    end(database, "run", 2, 100, "succeeded")
    found = read(database)
    assert (found.interruptions, found.detected) == (1, 1)
    assert found.mean_time_to_detect == 20 * SECOND


def test_an_attempt_that_was_given_up_too_soon_is_noticed_when_it_ends(database: Engine) -> None:
    begin(database, "run", 1, 0)
    with transaction(database) as connection:
        assert mark_silent(connection, at(100), 30 * SECOND, at(0)) == ["run"]
    begin(database, "run", 2, 110)
    end(database, "run", 1, 1000, "failed", told=3)
    end(database, "run", 2, 2000, "succeeded")
    found = read(database)
    assert (found.interruptions, found.mean_time_to_detect) == (1, 3 * SECOND)


def test_a_run_that_nobody_continued_has_not_recovered(database: Engine) -> None:
    begin(database, "run", 1, 0)
    end(database, "run", 1, 100, "failed")
    found = read(database)
    assert (found.interruptions, found.detected, found.recovered) == (1, 1, 0)
    assert found.mean_time_to_recover is None


def test_only_the_window_and_the_runs_that_are_asked_for_count(database: Engine) -> None:
    for run_id, tier in (("a", "production"), ("b", "experiment"), ("excluded", "production")):
        begin(database, run_id, 1, 0, tier=tier)
        end(database, run_id, 1, 100, "failed")
    begin(database, "live", 1, 50, tier="production")
    with transaction(database) as connection:
        exclude(connection, What(single_run="excluded"), "a drill", now=at(200))
    assert read(database).interruptions == 2
    of_production = read(database, 0, 200, schema.run.c.tier == "production")
    assert (of_production.attempts, of_production.interruptions) == (2, 1)
    assert of_production.running == (100 + 150) * SECOND
    later = read(database, 100.5, 200)
    assert (later.attempts, later.interruptions, later.running) == (1, 0, 99.5 * SECOND)


def test_the_command_tells_it_of_a_window_and_a_group(database: Engine, database_url: str) -> None:
    for run_id, tier in (("a", "production"), ("b", "experiment")):
        begin(database, run_id, 1, 0, tier=tier)
        end(database, run_id, 1, 3600, "failed", told=2)
    begin(database, "a", 2, 3720, tier="production")
    end(database, "a", 2, 7200, "succeeded")
    day = f"{datetime.fromtimestamp(at(0) / SECOND, UTC):%Y-%m-%d}"
    words = ("slo", "interruptions", "--db", database_url, "--window", day, "--group", "tier=production")
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "1 interruption of 2 attempts, which ran for 2.0 h in all",
        "mean time to interrupt: 1h58m (of 1)",
        "mean time to detect: 2 s (of 1)",
        "mean time to recover: 2m00s (of 1)",
    ]
    told = json.loads(CliRunner().invoke(main, [*words, "--format", "json"]).stdout)
    assert (told["attempts"], told["mean_time_to_recover_seconds"], told["from"]) == (
        2,
        120.0,
        f"{day}T00:00:00Z",
    )
    nothing = CliRunner().invoke(main, [*words[:4], "--window", "1h"])
    assert "mean time to recover: unknown" in nothing.stdout
