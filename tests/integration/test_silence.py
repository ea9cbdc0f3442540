"""A real collector that hears nothing: many runs at once, its own absence, and the spool of a killed run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from gradwatch import conventions as c
from gradwatch.export.otlp_values import key_values
from tests.collector_process import Collector, collector, eventually, free_port, train

LOST_AFTER = 4.0
HOUR = 3600.0


class Sender:
    """A process of a run that says what it is told to, with whatever time."""

    def __init__(self, collector: Collector, run_id: str, tier: str = c.TIER_EXPERIMENT) -> None:
        self.collector = collector
        self.sequence = 0
        self.resource = {
            c.RUN_ID: run_id,
            c.SERVICE_NAME: "silence",
            c.SERVICE_INSTANCE_ID: run_id,
            c.RANK: 0,
            c.RUN_ATTEMPT: 1,
            c.TIER: tier,
        }

    def say(self, event: c.Event, seconds_ago: float = 0.0, **attributes: Any) -> None:
        request = ExportLogsServiceRequest()
        logs = request.resource_logs.add()
        logs.resource.attributes.extend(key_values(self.resource))
        record = logs.scope_logs.add().log_records.add()
        record.event_name = event.name
        record.time_unix_nano = time.time_ns() - int(seconds_ago * 1e9)
        record.attributes.extend(key_values({c.EVENT_SEQUENCE: self.sequence, **attributes}))
        self.sequence += 1
        answer = requests.post(
            f"{self.collector.url}/v1/logs",
            request.SerializeToString(),
            headers={"Content-Type": "application/x-protobuf"},
            timeout=30,
        )
        assert answer.status_code == 200, answer.text


@pytest.fixture
def running(database_url: str) -> Iterator[Collector]:
    with collector(database_url, "--lost-after", str(LOST_AFTER)) as started:
        yield started


def history(running: Collector, run_id: str) -> list[str]:
    return [entry["status"] for entry in reversed(running.show(run_id)["history"])]


def outages(running: Collector, run_id: str) -> list[Any]:
    return [found for found in running.show(run_id)["findings"] if found["rule"] == c.RULE_TELEMETRY_OUTAGE]


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def test_runs_that_fall_silent_together_and_come_back_were_never_lost(running: Collector) -> None:
    senders = [Sender(running, f"r{number}") for number in range(5)]
    senders.append(Sender(running, "production", c.TIER_PRODUCTION))
    for sender in senders:
        sender.say(c.RUN_STARTED)
    (found,) = eventually(lambda: outages(running, "production"), "the outage")
    assert (found["run_id"], found["severity"], found["state"]) == ("production", "page", "open")
    assert found["evidence"]["runs"] == ["production", *(f"r{number}" for number in range(5))]
    active = f'rule="{c.RULE_TELEMETRY_OUTAGE}",run_id="production",severity="page"'
    eventually(lambda: active in _sorted_labels(running.get("/metrics").text), "the finding on /metrics")
    time.sleep(LOST_AFTER)  # well past the limit: only ten times it makes them lost
    for sender in senders:
        sender.say(c.RUN_HEARTBEAT)
    eventually(lambda: outages(running, "production")[0]["state"] == "resolved", "the end of the outage")
    for sender in senders:
        sender.say(c.RUN_ENDED, **{c.STATUS: "succeeded"})
        assert history(running, sender.resource[c.RUN_ID]) == ["running", "succeeded"]


def _sorted_labels(text: str) -> str:
    """The series of findings, with those labels first that a test looks for, in order."""
    lines = [line for line in text.splitlines() if line.startswith(c.FINDING_ACTIVE.name)]
    labels = [sorted(line[line.index("{") + 1 : line.index("}")].split(",")) for line in lines]
    return "\n".join(",".join(each) for each in labels)


def test_a_collector_that_was_suspended_blames_nobody(running: Collector) -> None:
    sender = Sender(running, "watched")
    sender.say(c.RUN_STARTED)
    running.process.send_signal(signal.SIGSTOP)
    time.sleep(LOST_AFTER + 1)
    running.process.send_signal(signal.SIGCONT)
    for _ in range(5):
        time.sleep(0.5)
        sender.say(c.RUN_HEARTBEAT)
    assert history(running, "watched") == ["running"]


def test_a_run_that_is_silent_is_lost_though_the_collector_was_started_anew(database_url: str) -> None:
    options = ("--lost-after", str(LOST_AFTER))
    with collector(database_url, *options) as first:
        Sender(first, "silent").say(c.RUN_STARTED)
        last_seen = first.runs()["silent"]["last_seen_at"]
    time.sleep(LOST_AFTER)
    with collector(database_url, *options) as second:
        assert second.runs()["silent"]["status"] == "running"
        assert second.await_status("silent", "lost")["ended_at"] == last_seen


def test_what_was_kept_of_a_killed_run_does_not_bring_it_to_life(running: Collector) -> None:
    sender = Sender(running, "killed")
    sender.say(c.RUN_STARTED, HOUR)
    for seconds in range(5, 65, 5):
        sender.say(c.RUN_HEARTBEAT, HOUR - seconds, **{c.STEP: seconds})
    run = running.await_status("killed", "lost")
    for name, ago in (("started_at", HOUR), ("ended_at", HOUR - 60), ("last_seen_at", HOUR - 60)):
        happened = datetime.now(UTC) - timedelta(seconds=ago)
        assert abs(moment(run[name]) - happened) < timedelta(seconds=50)
    assert moment(run["ended_at"]) - moment(run["started_at"]) == pytest.approx(
        timedelta(seconds=60), abs=timedelta(seconds=5)
    )
    sender.say(c.RUN_HEARTBEAT, HOUR - 600, **{c.STEP: 70})
    run = running.runs()["killed"]
    assert (run["status"], run["last_step"]) == ("lost", 70)
    assert history(running, "killed") == ["running", "lost"]


LOOP = """
import os, time
import torch
from torch import nn
import gradwatch

model = nn.Linear(8, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
gradwatch.watch(model, optimizer, job="adopted")
for step in range(20):
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    time.sleep(0.05)
print("trained", flush=True)
time.sleep(float(os.environ["LINGERS"]))
"""


def test_the_next_run_on_the_host_tells_of_a_killed_one_when_it_ended(tmp_path: Path) -> None:
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    port = free_port()
    place = {"GRADWATCH_DIR": str(tmp_path), "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}
    with train(script, None, GRADWATCH_RUN_ID="killed", LINGERS="600", **place) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "trained\n"
        eventually(lambda: list(tmp_path.rglob("*.segment")), "the spool")
        time.sleep(1)
        os.kill(process.pid, signal.SIGKILL)
    died = datetime.now(UTC)
    time.sleep(LOST_AFTER)
    listening = ("--listen", f"127.0.0.1:{port}", "--lost-after", str(LOST_AFTER))
    with collector(f"sqlite:///{tmp_path}/gradwatch.db", *listening) as running:
        with train(script, None, GRADWATCH_RUN_ID="next", LINGERS="0", **place) as process:
            assert process.wait(60) == 0
        run = running.await_status("killed", "lost")
        assert moment(run["started_at"]) < moment(run["ended_at"]) <= died
        assert running.runs()["next"]["status"] == "succeeded"
