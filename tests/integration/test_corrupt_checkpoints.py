"""A checkpoint that is found corrupt: the finding, the run's record, and the way from the disk to the page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, select

from gradwatch import conventions as c
from gradwatch_collector.api.views import show_run
from gradwatch_collector.findings import Observation, Severity
from gradwatch_collector.findings.acknowledging import acknowledge
from gradwatch_collector.findings.observation import Scene
from gradwatch_collector.findings.rules import checkpoint_corrupt
from gradwatch_collector.records import NO_RANK, Batch, EventRecord, Received, Source
from gradwatch_collector.runs.checkpoints import attempted
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.service.snapshot import recent_runs
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store
from tests.batches import at, batch, event, source
from tests.collector_process import GRADWATCH, collector, environment, eventually, train
from tests.told_runs import look

STARTED = event(c.RUN_STARTED, 0)
HOUR = 3600
DAY = 24 * HOUR


def receive(database: Engine, received: Batch, seconds: float) -> None:
    registry = Registry()
    with transaction(database) as connection:
        (key,) = registry.resolve(connection, [(received.source, at(seconds))])
        store(connection, SeriesIds(), [Received(key, received, at(seconds))])
        registry.apply(connection, [Received(key, received, at(seconds))])


def of(definition: c.Event, seconds: float, step: int, name: str = "run/last.pt") -> EventRecord:
    """One event of a checkpoint; its second tells events of a process apart."""
    fault = {"CHECKPOINT_FAULT": "truncated: last.pt has 5 bytes"} if definition is c.CHECKPOINT_CORRUPT else {}
    return event(definition, seconds, int(seconds), STEP=step, CHECKPOINT_NAME=name, **fault)


def seen(database: Engine, seconds: float) -> list[Observation]:
    with database.connect() as connection:
        scene = Scene(connection, at(seconds), recent_runs(connection, at(seconds)))
        return list(checkpoint_corrupt.detect(scene, lambda _: checkpoint_corrupt.RULE.parameters))


def from_outside(*events: EventRecord, host: str | None = None) -> Batch:
    """What `gradwatch checkpoint verify` sends."""
    resource = {c.SERVICE_NAME: "digits"} | ({} if host is None else {c.HOST_NAME: host})
    return Batch(Source("run", 1, NO_RANK, f"verify on {host}", resource), (), events)


def test_a_corrupt_checkpoint_of_a_production_run_pages_with_its_fault(database: Engine) -> None:
    told = (of(c.CHECKPOINT_SAVED, 10, 100), of(c.CHECKPOINT_SAVED, 20, 200), of(c.CHECKPOINT_CORRUPT, 30, 200))
    receive(database, batch(source(tier="production"), STARTED, *told), 31)
    (found,) = seen(database, 32)
    assert (found.severity, found.step, found.rank) == (Severity.PAGE, 200, 0)
    assert (found.first_seen, found.last_seen) == (at(30), at(30))
    assert found.evidence["fault"] == "truncated: last.pt has 5 bytes"
    assert (found.evidence["last_good_step"], found.evidence["last_good_age_seconds"]) == (100, 20)


def test_it_is_one_no_more_once_it_was_saved_again_or_found_good(database: Engine) -> None:
    receive(database, batch(source(), STARTED, of(c.CHECKPOINT_CORRUPT, 30, 200, "run/a.pt")), 31)
    receive(database, batch(source(), of(c.CHECKPOINT_CORRUPT, 32, 200, "run/b.pt")), 33)
    assert seen(database, 34)[0].evidence["corrupt"] == ["run/a.pt", "run/b.pt"]
    receive(database, batch(source(), of(c.CHECKPOINT_VERIFIED, 35, 200, "run/b.pt")), 36)
    assert seen(database, 37)[0].evidence["corrupt"] == ["run/a.pt"]
    receive(database, batch(source(), of(c.CHECKPOINT_SAVED, 38, 300, "run/a.pt")), 39)
    assert seen(database, 40) == []


def test_that_of_a_run_that_has_been_over_for_long_is_told_for_thirty_days_and_changes_nothing_else(
    database: Engine,
) -> None:
    over = (of(c.CHECKPOINT_SAVED, 10, 100), event(c.RUN_ENDED, 20, 20, STATUS="succeeded"))
    receive(database, batch(source(tier="production"), STARTED, *over), 21)
    receive(database, from_outside(of(c.CHECKPOINT_CORRUPT, 5 * HOUR, 100)), 5 * HOUR)
    (found,) = seen(database, 5 * HOUR + 1)
    assert (found.severity, found.rank, found.attempt) == (Severity.PAGE, None, 1)
    assert len(seen(database, 5 * HOUR + 30 * DAY)) == 1
    assert seen(database, 5 * HOUR + 30 * DAY + 1) == []
    with database.connect() as connection:
        shown: Any = show_run(connection, "run")
    assert (shown["status"], shown["ended_at"]) == ("succeeded", shown["attempts"][0]["ended_at"])
    assert [(each["state"], each["rank"]) for each in shown["checkpoints"]] == [("corrupt", None), ("saved", 0)]


def test_a_live_run_that_has_saved_another_one_since_has_something_to_go_on_from(database: Engine) -> None:
    told = (of(c.CHECKPOINT_SAVED, 10, 100, "run/a.pt"), of(c.CHECKPOINT_SAVED, 20, 200, "run/b.pt"))
    receive(database, batch(source(), STARTED, *told, of(c.CHECKPOINT_CORRUPT, 30, 100, "run/a.pt")), 31)
    assert len(seen(database, 32)) == 1  # b.pt may be as bad: it is older than what happened to a.pt
    receive(database, batch(source(), of(c.CHECKPOINT_SAVED, 40, 300, "run/c.pt")), 41)
    assert seen(database, 42) == []


def test_the_copy_of_another_rank_or_host_says_nothing_of_this_one(database: Engine) -> None:
    ranks = [Source("run", 1, rank, f"rank {rank}", {c.HOST_NAME: f"node-{rank}"}) for rank in (0, 1)]
    for rank in ranks:
        receive(database, batch(rank, STARTED, of(c.CHECKPOINT_SAVED, 10, 100)), 11)
    receive(database, batch(ranks[1], of(c.CHECKPOINT_CORRUPT, 20, 100)), 21)
    receive(database, batch(ranks[0], of(c.CHECKPOINT_VERIFIED, 22, 100)), 23)
    receive(database, from_outside(of(c.CHECKPOINT_VERIFIED, 24, 100), host="node-0"), 25)
    (found,) = seen(database, 26)
    assert (found.rank, found.evidence["last_good_step"]) == (1, None)
    with database.connect() as connection:
        assert attempted(connection, "run") == (1, 1)
    receive(database, from_outside(of(c.CHECKPOINT_VERIFIED, 27, 100), host="node-1"), 28)
    assert seen(database, 29) == []
    with database.connect() as connection:
        assert attempted(connection, "run") == (1, 0)


def test_when_it_was_found_is_told_by_the_collectors_clock(database: Engine) -> None:
    """That of a host which is 20 minutes behind has shown by then: the finding is of now, and pages."""
    behind = 20 * 60
    for second in range(0, 60, 5):
        heartbeat = event(c.RUN_HEARTBEAT if second else c.RUN_STARTED, second - behind, second)
        receive(database, batch(source(), heartbeat), second)
    receive(database, batch(source(), of(c.CHECKPOINT_CORRUPT, 65 - behind, 3)), 65)
    (found,) = seen(database, 66)
    assert found.last_seen == at(65)


def test_what_every_night_finds_is_one_finding_until_it_is_acknowledged(database: Engine) -> None:
    over = (of(c.CHECKPOINT_SAVED, 10, 100), event(c.RUN_ENDED, 20, 20, STATUS="succeeded"))
    receive(database, batch(source(tier="production"), STARTED, *over), 21)

    def night(number: int, name: str = "run/last.pt") -> list[str]:
        """Its verification, and how the finding stands an hour later."""
        receive(database, from_outside(of(c.CHECKPOINT_CORRUPT, number * DAY, 100, name)), number * DAY)
        for seconds in (1, HOUR + 1):
            look(database, number * DAY + seconds)
        with database.connect() as connection:
            return list(connection.execute(select(schema.finding.c.state)).scalars())

    assert [night(number) for number in (1, 2, 3)] == [["open"]] * 3
    with transaction(database) as connection:
        (number,) = connection.execute(select(schema.finding.c.finding_id)).scalars()
        acknowledge(connection, number, "moved away", now=at(3 * DAY + 2 * HOUR))
    assert night(4) == ["resolved"]
    assert night(5, "run/other.pt") == ["open"]


@pytest.mark.parametrize("again", [False, True])
def test_what_was_found_corrupt_counts_as_failed_and_is_not_the_last_good_one(
    database: Engine, again: bool
) -> None:
    """Unless it is found good again, as where a disk was away for a while."""
    told = [of(c.CHECKPOINT_SAVED, 10, 100), of(c.CHECKPOINT_SAVED, 20, 200), of(c.CHECKPOINT_CORRUPT, 30, 200)]
    told += [of(c.CHECKPOINT_VERIFIED, 40, 200)] if again else [of(c.CHECKPOINT_VERIFIED, 40, 100)]
    receive(database, batch(source(), STARTED, *told), 50)
    with database.connect() as connection:
        shown: Any = show_run(connection, "run")
        assert attempted(connection, "run") == (2, 0 if again else 1)
    assert shown["checkpoint_record"]["last_good_step"] == (200 if again else 100)


SCRIPT = """
import sys, torch, gradwatch
model = torch.nn.Linear(8, 1)
with gradwatch.watch(model, torch.optim.SGD(model.parameters()), tier="production") as watch:
    watch.save_checkpoint(model.state_dict(), sys.argv[0] + ".pt")
"""


def test_the_command_tells_the_collector_of_a_checkpoint_of_a_run_that_is_over(tmp_path: Path) -> None:
    script, url = tmp_path / "train.py", f"sqlite:///{tmp_path}/gradwatch.db"
    script.write_text(SCRIPT)
    with collector(url) as serving:
        train(script, serving, GRADWATCH_RUN_ID="real").communicate(timeout=60)
        serving.await_status("real", "succeeded")
        saved = Path(f"{script}.pt")
        saved.write_bytes(saved.read_bytes()[:-100])
        command = [*GRADWATCH, "checkpoint", "verify", str(saved)]
        quiet = subprocess.run(command, env=environment(None), capture_output=True, text=True, check=False)
        assert (quiet.returncode, quiet.stderr) == (1, "")
        assert serving.show("real")["checkpoints"][0]["state"] == "saved"
        command += ["--endpoint", serving.url]
        loud = subprocess.run(command, env=environment(None), capture_output=True, text=True, check=False)
        assert (loud.returncode, loud.stderr) == (1, "")
        (finding,) = eventually(
            lambda: [each for each in serving.show("real")["findings"] if each["severity"] != "info"],
            "a finding",
        )
        assert (finding["rule"], finding["severity"], finding["state"]) == (
            "checkpoint_corrupt",
            "page",
            "open",
        )
        assert finding["evidence"]["fault"].startswith("truncated: ")
        active = 'gradwatch_finding_active{rule="checkpoint_corrupt",run_id="real",severity="page"'
        eventually(lambda: active in serving.get("/metrics").text, "the metric that alerts are made of")
        assert serving.show("real")["status"] == "succeeded"


def test_a_collector_that_is_away_is_told_later_and_the_command_says_so(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    settings = {"GRADWATCH_DIR": str(tmp_path / "state"), "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    subprocess.run([sys.executable, str(script)], env=environment(None, **settings), check=True)
    command = [*GRADWATCH, "checkpoint", "verify", f"{script}.pt"]
    told = subprocess.run(
        command, env=environment(None, **settings), capture_output=True, text=True, check=False
    )
    assert told.returncode == 0
    assert "http://127.0.0.1:9 was not told of it yet" in told.stderr
