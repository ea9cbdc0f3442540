"""Real training, a real collector that is away: what it missed is there when it is back, once and in full."""

from __future__ import annotations

import gzip
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from gradwatch import conventions as names
from gradwatch.export.spool import drain
from gradwatch.export.spool_records import unpack
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage.reading import read_series
from tests.collector_process import Collector, collector, eventually, free_port, train
from tests.soak.outage import outage

STEPS = 40
LOOP = """
import os, time
import torch
from torch import nn
import gradwatch

torch.manual_seed(0)
model = nn.Linear(8, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
watch = gradwatch.watch(model, optimizer, job="spooled", every=1)
for step in range(40):
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    time.sleep(0.01)
    if step == 20:
        print("halfway", flush=True)
        while "WAITS_FOR" in os.environ and not os.path.exists(os.environ["WAITS_FOR"]):
            time.sleep(0.01)
print("trained", flush=True)
if os.environ.get("LINGERS"):
    time.sleep(600)
if os.environ.get("FAILS"):
    raise ValueError("too bad")
"""


class Place:
    """A host's files, a database, and a port at which a collector is to be found, or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = f"sqlite:///{folder}/gradwatch.db"
        self.script = folder / "loop.py"
        self.script.write_text(LOOP)
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.started: list[subprocess.Popen[str]] = []

    def train(self, run_id: str, **settings: str) -> subprocess.Popen[str]:
        files = {"GRADWATCH_DIR": str(self.folder / "host"), "GRADWATCH_RUN_ID": run_id}
        process = train(self.script, None, OTEL_EXPORTER_OTLP_ENDPOINT=self.endpoint, **files, **settings)
        self.started.append(process)
        return process

    def collector(self) -> AbstractContextManager[Collector]:
        return collector(self.database, "--listen", f"127.0.0.1:{self.port}")

    def steps(self, run_id: str) -> list[int]:
        """Indices of the steps that the database holds, each as often as it is there."""
        engine = db.connect(self.database)
        try:
            with engine.connect() as connection:
                series = read_series(connection, run_id, names.STEP_INDEX.name)
                return [int(value) for one in series for value in np.asarray(one.values)]
        finally:
            engine.dispose()

    def spooled_steps(self) -> list[int]:
        """Indices of the steps that lie in the spool."""
        requests = [one for file in sorted(self.segments) for one in unpack(file.read_bytes())[0]]
        return [
            point.as_int
            for one in requests
            if one.signal == "metrics"
            for owner in ExportMetricsServiceRequest.FromString(gzip.decompress(one.body)).resource_metrics
            for metric in owner.scope_metrics[0].metrics
            if metric.name == names.STEP_INDEX.name
            for point in metric.gauge.data_points
        ]

    @property
    def segments(self) -> list[Path]:
        return list((self.folder / "host" / "spool").rglob("*.segment"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    for process in made.started:
        with process:
            process.kill()


def finish(process: subprocess.Popen[str]) -> int:
    _, errors = process.communicate(timeout=120)
    assert errors.count("\n") <= 1, errors
    return process.returncode


def await_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


def test_a_run_that_no_collector_saw_is_told_by_the_next_run_on_the_host(place: Place) -> None:
    assert finish(place.train("unseen")) == 0
    assert place.segments
    with place.collector() as running:
        assert finish(place.train("seen")) == 0
        run = running.await_status("unseen", "succeeded")
        assert (run["job"], run["last_step"]) == ("spooled", STEPS - 1)
        running.await_status("seen", "succeeded")
    assert place.steps("unseen") == place.steps("seen") == list(range(STEPS))
    assert place.segments == []


def test_what_a_killed_process_left_is_drained(place: Place) -> None:
    process = place.train("killed", LINGERS="1", GRADWATCH_EXPORT_INTERVAL="0.05")
    await_line(process, "halfway")
    await_line(process, "trained")

    # The last step waits in the process for the next to begin.
    eventually(lambda: place.spooled_steps() == list(range(STEPS - 1)), "the spool to be written")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with place.collector() as running:
        drained = drain(place.folder / "host", place.endpoint, {}, 60.0)
        assert drained.delivered > 0
        assert (drained.lost, drained.bytes_left) == (0, 0)
        assert running.runs()["killed"]["status"] == "running"  # until silence says otherwise
    assert place.steps("killed") == list(range(STEPS - 1))
    assert list((place.folder / "host" / "spool").iterdir()) == []


def test_a_collector_that_is_killed_in_the_middle_misses_nothing(place: Place) -> None:
    with place.collector() as first:
        process = place.train("interrupted", WAITS_FOR=str(place.folder / "go"))
        await_line(process, "halfway")
        eventually(lambda: place.steps("interrupted"), "the first steps")
        first.process.kill()
        first.process.wait()
    eventually(lambda: place.segments, "the spool to be written")
    with place.collector() as second:
        (place.folder / "go").touch()
        assert finish(process) == 0
        second.await_status("interrupted", "succeeded")
    assert place.steps("interrupted") == list(range(STEPS))
    assert place.segments == []


def test_a_collector_that_never_answers_does_not_keep_the_ending(place: Place) -> None:
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        deaf.bind(("127.0.0.1", place.port))
        deaf.listen(64)
        assert finish(place.train("unanswered", GRADWATCH_EXIT_TIMEOUT="0.5")) == 0
    with place.collector() as running:
        drain(place.folder / "host", place.endpoint, {}, 60.0)
        assert running.runs()["unanswered"]["status"] == "succeeded"
    assert place.steps("unanswered") == list(range(STEPS))


def test_a_terminated_process_leaves_its_ending_to_be_told(place: Place) -> None:
    process = place.train("terminated", WAITS_FOR=str(place.folder / "never"))
    await_line(process, "halfway")
    process.send_signal(signal.SIGTERM)
    assert finish(process) == -signal.SIGTERM
    with place.collector() as running:
        drain(place.folder / "host", place.endpoint, {}, 60.0)
        run = running.runs()["terminated"]
        assert (run["status"], run["reason"]) == ("cancelled", "SIGTERM")
    assert place.steps("terminated") == list(range(20))


def test_a_failed_process_that_is_terminated_while_it_waits_leaves_its_failure_to_be_told(place: Place) -> None:
    with socket.create_server(("127.0.0.1", place.port), backlog=64):  # accepts, and never answers
        process = place.train("impatient", FAILS="1", GRADWATCH_EXIT_TIMEOUT="60")
        assert process.stderr is not None
        while "ValueError: too bad" not in (line := process.stderr.readline()):
            assert line
        time.sleep(1.0)  # until it waits
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    with place.collector() as running:
        drain(place.folder / "host", place.endpoint, {}, 60.0)
        run = running.runs()["impatient"]
        assert (run["status"], run["reason"]) == ("failed", "ValueError")
    assert place.steps("impatient") == list(range(STEPS))


def test_an_outage_in_short_is_replayed_in_full_and_costs_little_disk(tmp_path: Path) -> None:
    seen = outage(tmp_path, exports=30, interval=0.05)
    assert seen.complete
    assert seen.requests > 10
    assert 1 < seen.ratio < 1.2
