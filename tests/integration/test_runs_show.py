"""``gradwatch runs show`` tells how attempts ended, and where a stalled run stood."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_collector.records import NO_RANK, Batch, Received
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store
from tests.batches import at, batch, event, source

STACKS = """Thread 0x7f00 (most recent call last):
  File "train.py", line 12 in <module>
  File "data.py", line 3 in \x1b[31mload
Thread 0x7f01:
  File "export.py", line 9 in wait"""


@pytest.fixture
def told(database: Engine) -> Engine:
    registry, series = Registry(), SeriesIds()
    trainer = source(rank=1, attempt=1, instance="trainer")
    supervisor = source(rank=NO_RANK, attempt=1, instance="supervisor", supervisor=True)
    ending = event(
        c.RUN_ENDED, 9, 2, STATUS="failed", REASON="oom_killed", EVIDENCE="killed 1 process", WILL_RETRY=True
    )
    batches: list[Batch] = [
        batch(supervisor, event(c.RUN_STARTED, 0)),
        batch(trainer, event(c.RUN_STARTED, 1), event(c.STALLED, 8, 1, STEP=41, STACKS=STACKS)),
        batch(supervisor, ending),
        batch(source(rank=1, attempt=2, instance="again"), event(c.RUN_STARTED, 20)),
    ]
    with transaction(database) as connection:
        for each in batches:
            (key,) = registry.resolve(connection, [(each.source, at(20))])
            store(connection, series, [Received(key, each, at(20))])
            registry.apply(connection, [Received(key, each, at(20))])
    return database


def show(database_url: str, *options: str) -> str:
    result = CliRunner().invoke(main, ["runs", "show", "run", "--db", database_url, *options])
    assert result.exit_code == 0, result.output
    return result.output


def test_attempts_are_told_with_evidence_and_what_comes_next(told: Engine, database_url: str) -> None:
    shown = show(database_url)
    lines = shown[shown.index("ATTEMPTS") :].splitlines()
    assert lines[1].endswith("failed  oom_killed  (rank 1)  will be retried  run.evidence=killed 1 process")
    assert lines[2].endswith("running")


def test_a_stall_is_told_with_a_line_for_each_frame_and_nothing_that_a_terminal_obeys(
    told: Engine, database_url: str
) -> None:
    shown = show(database_url)
    lines = shown[shown.index("STALLED") :].splitlines()
    assert lines[0].endswith("rank 1 after step 41")
    assert lines[1:4] == [
        "  Thread 0x7f00 (most recent call last):",
        '    File "train.py", line 12 in <module>',
        '    File "data.py", line 3 in \\x1b[31mload',
    ]
    assert "stacks=" not in shown


def test_json_keeps_the_stacks_and_tells_supervisors_from_ranks(told: Engine, database_url: str) -> None:
    shown = json.loads(show(database_url, "--format", "json"))
    (stall,) = [each for each in shown["events"] if each["name"] == c.STALLED.name]
    assert (stall["attributes"][c.STACKS], stall["rank"]) == (STACKS, 1)
    assert {each["rank"] for each in shown["events"] if each["attempt"] == 1} == {1, None}
    first = shown["attempts"][-1]
    assert (first["will_retry"], first["evidence"]) == (True, {c.EVIDENCE: "killed 1 process"})
    assert ([each["rank"] for each in first["processes"]], len(first["supervisors"])) == ([1], 1)
