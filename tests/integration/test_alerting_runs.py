"""From real training that goes wrong to what people are told: agent, collector, Prometheus, Alertmanager."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import psutil
import pytest
import requests

from gradwatch import conventions as c
from gradwatch.export.otlp_encoding import encoded_resource, logs_request
from gradwatch.export.spool import drain
from gradwatch.telemetry import Event
from tests.collector_process import (
    GRADWATCH,
    Collector,
    collector,
    environment,
    free_port,
    gradwatch,
    train,
)
from tests.prometheus_servers import (
    Configuration,
    Prometheus,
    WebhookReceiver,
    alertmanager,
    answers,
    get_json,
    needs_prometheus,
    prometheus,
    wait_for,
    webhook_receiver,
)

pytestmark = [pytest.mark.prometheus, needs_prometheus]

T = TypeVar("T")

TRAINING = """
import os, sys, time
if os.environ.get("AGO"):
    real, real_ns, ago = time.time, time.time_ns, int(os.environ["AGO"])
    time.time, time.time_ns = lambda: real() - ago, lambda: real_ns() - ago * 10**9
import torch
import gradwatch

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
watch = gradwatch.watch(model, optimizer)
fault = os.environ["FAULT"]
step = 0
while step < 12 or fault == "killed":
    optimizer.zero_grad()
    loss = model(torch.ones(8, 4)).mean()
    if fault == "nan" and step > 4:
        loss = loss * float("nan")
    loss.backward()
    optimizer.step()
    step += 1
    print(step, flush=True)
    time.sleep(0.02)
if fault == "raises":
    raise ValueError("planted")
if fault == "saves":
    watch.save_checkpoint(model.state_dict(), sys.argv[0] + ".pt")
"""

# Two ranks that reduce once a step, until one of them no longer comes.
HANGING = """
import os, time
import torch
import gradwatch

rank = int(os.environ["RANK"])
torch.distributed.init_process_group("gloo")
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
gradwatch.watch(model, optimizer, stall_after=3)
for step in range(10**6):
    optimizer.zero_grad()
    model(torch.ones(8, 4)).mean().backward()
    if rank == 1 and step == 20:
        time.sleep(10**6)
    torch.distributed.all_reduce(model.weight.grad)
    optimizer.step()
    time.sleep(0.02)
"""


class Restartable(Generic[T]):
    """A server that can be ended by SIGTERM and started again, on the same data."""

    def __init__(self, start: Callable[[], AbstractContextManager[T]]) -> None:
        self._start = start
        self._running = ExitStack()
        self.server = self._running.enter_context(start())

    def restart(self) -> None:
        self.stop()
        self.server = self._running.enter_context(self._start())

    def stop(self) -> None:
        self._running.close()


@dataclass(frozen=True, slots=True)
class World:
    """All servers, and the people at the end."""

    script: Path
    collector: Restartable[Collector]
    alertmanager: Restartable[str]
    prometheus: Restartable[Prometheus]
    people: WebhookReceiver
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def train(
        self, run_id: str, fault: str, tier: str = c.TIER_PRODUCTION, **settings: str
    ) -> subprocess.Popen[str]:
        process = train(
            self.script,
            self.collector.server,
            FAULT=fault,
            GRADWATCH_RUN_ID=run_id,
            GRADWATCH_TIER=tier,
            GRADWATCH_JOB="resnet",
            **settings,
        )
        self.started.append(process)
        return process

    def hears(self, receiver: str, run_id: str, rule: str, seconds: float = 60) -> str:
        """Wait until a receiver is told of it, and return what it says."""
        told = wait_for(
            lambda: self.people.got(receiver, "firing", run_id=run_id, rule=rule),
            seconds=seconds,
            what=f"{receiver} to hear of {rule} of {run_id}",
        )
        return told[0].annotations["description"]

    def settle(self) -> None:
        """Let several evaluations and group intervals pass: whatever was to be sent has been sent."""
        self.prometheus.server.wait_for_evaluations(3)

    def told_of(self, run_id: str) -> list[tuple[str, str, str]]:
        """Everything anybody was told of a run: receiver, status and rule."""
        return [
            (n.receiver, n.status, n.labels["rule"])
            for kind in ("page", "ticket")
            for n in self.people.got(kind, run_id=run_id)
        ]


@contextmanager
def world(folder: Path, database: str, *others: str) -> Iterator[World]:
    """Everything as shipped, but that notifications of a group follow each other sooner.

    ``others``: addresses of further collectors that Prometheus scrapes.
    """
    script = folder / "train.py"
    script.write_text(TRAINING, encoding="utf-8")
    address, listen = (f"127.0.0.1:{free_port()}" for _ in range(2))
    with webhook_receiver() as people, ExitStack() as stack:
        targets = '", "'.join((address, *others))
        configuration = Configuration.shipped(
            folder,
            collector=targets,
            alertmanager=listen,
            webhook=people.url,
            changes={"group_interval: 10s": "group_interval: 1s"},
        )
        options = ("--listen", address, "--lost-after", "6")
        collecting = Restartable(lambda: collector(database, *options))
        stack.callback(collecting.stop)
        alerting = Restartable(lambda: alertmanager(configuration, folder, listen))
        stack.callback(alerting.stop)
        # What still fires is sent again after a minute, unless told otherwise.
        watching = Restartable(lambda: prometheus(configuration, folder, "--rules.alert.resend-delay=5s"))
        stack.callback(watching.stop)
        wait_for(lambda: answers(f"{collecting.server.url}/readyz"), what="the collector to be ready")
        watching.server.wait_for_alertmanager()
        found = World(script, collecting, alerting, watching, people)
        try:
            yield found
        finally:
            for process in found.started:
                process.kill()
                process.communicate()


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("everything")
    with world(folder, f"sqlite:///{folder / 'gradwatch.db'}") as found:
        yield found


def test_repeated_nans_wake_an_engineer_where_it_is_production_and_nobody_else(everything: World) -> None:
    nan = everything.train("r-nan", "nan")
    tried = everything.train("r-nan-try", "nan", tier=c.TIER_EXPERIMENT)
    healthy = everything.train("r-fine", "none")
    assert [each.wait(60) for each in (nan, tried, healthy)] == [0, 0, 0]
    everything.hears("ml-engineer-page", "r-nan", c.RULE_NONFINITE)
    everything.hears("ml-engineer-ticket", "r-nan-try", c.RULE_NONFINITE)
    everything.settle()
    assert everything.told_of("r-nan").count(("ml-engineer-page", "firing", c.RULE_NONFINITE)) == 1
    assert everything.told_of("r-nan-try") == [("ml-engineer-ticket", "firing", c.RULE_NONFINITE)]
    assert everything.told_of("r-fine") == []


def test_a_killed_run_is_a_page_at_once_where_somebody_watched_it_and_else_once_it_is_silent(
    everything: World,
) -> None:
    alone = everything.train("r-killed", "killed", GRADWATCH_HEARTBEAT_INTERVAL="1")
    settings = {"FAULT": "killed", "GRADWATCH_RUN_ID": "r-watched", "GRADWATCH_TIER": c.TIER_PRODUCTION}
    watched = subprocess.Popen(
        [*GRADWATCH, "run", "--", sys.executable, str(everything.script)],
        env=environment(everything.collector.server, GRADWATCH_JOB="resnet", **settings),
        stdout=subprocess.PIPE,
        text=True,
    )
    everything.started.append(watched)
    for process, run_id in ((alone, "r-killed"), (watched, "r-watched")):
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        everything.collector.server.await_status(run_id, "running")
    alone.kill()
    (child,) = psutil.Process(watched.pid).children()
    child.kill()
    assert "SIGKILL" in everything.hears("ml-sre-page", "r-watched", c.RULE_RUN_FAILED)
    everything.hears("ml-sre-page", "r-killed", c.RULE_RUN_LOST)
    everything.settle()
    assert everything.told_of("r-watched") == [("ml-sre-page", "firing", c.RULE_RUN_FAILED)]
    assert everything.told_of("r-killed") == [("ml-sre-page", "firing", c.RULE_RUN_LOST)]


def test_a_run_whose_collective_hangs_is_one_page(everything: World, tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGING, encoding="utf-8")
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    told = {"GRADWATCH_RUN_ID": "r-hung", "GRADWATCH_TIER": c.TIER_PRODUCTION, "GRADWATCH_JOB": "resnet"}
    for rank in ("0", "1"):
        everything.started.append(
            train(script, everything.collector.server, **meeting, **told, RANK=rank, LOCAL_RANK=rank)
        )
    everything.hears("ml-sre-page", "r-hung", c.RULE_STALLED, seconds=120)
    everything.settle()
    assert everything.told_of("r-hung") == [("ml-sre-page", "firing", c.RULE_STALLED)]
    for process in everything.started[-2:]:
        process.kill()


def test_a_checkpoint_that_is_found_corrupt_is_one_page(everything: World) -> None:
    assert everything.train("r-saves", "saves").wait(60) == 0
    saved = Path(f"{everything.script}.pt")
    saved.write_bytes(saved.read_bytes()[:-100])
    url = everything.collector.server.url
    assert gradwatch("checkpoint", "verify", str(saved), "--endpoint", url).returncode == 1
    everything.hears("ml-sre-page", "r-saves", c.RULE_CHECKPOINT_CORRUPT)
    everything.settle()
    assert everything.told_of("r-saves") == [("ml-sre-page", "firing", c.RULE_CHECKPOINT_CORRUPT)]


def test_a_failure_of_twenty_minutes_ago_that_is_replayed_now_wakes_nobody(
    everything: World, tmp_path: Path
) -> None:
    everything.collector.stop()
    waiting = {"GRADWATCH_DIR": str(tmp_path), "AGO": "1200"}
    assert everything.train("r-old", "raises", **waiting).wait(60) == 1
    everything.collector.restart()
    assert drain(tmp_path, everything.collector.server.url, {}, seconds=30.0).delivered > 0
    everything.hears("ml-sre-ticket", "r-old", c.RULE_RUN_FAILED)
    everything.settle()
    assert everything.told_of("r-old") == [("ml-sre-ticket", "firing", c.RULE_RUN_FAILED)]


def test_no_restart_pages_twice_or_says_that_it_is_over(everything: World) -> None:
    everything.train("r-raises", "raises").wait(60)
    assert "ValueError" in everything.hears("ml-sre-page", "r-raises", c.RULE_RUN_FAILED)
    once = [("ml-sre-page", "firing", c.RULE_RUN_FAILED)]

    everything.collector.restart()
    wait_for(lambda: answers(f"{everything.collector.server.url}/readyz"), what="the collector to be back")
    everything.settle()
    assert everything.told_of("r-raises") == once

    everything.alertmanager.restart()
    # It knows of alerts only once they are sent again.
    wait_for(lambda: knows_of(everything.alertmanager.server, "r-raises"), what="Alertmanager to hear again")
    everything.settle()
    assert everything.told_of("r-raises") == once

    everything.prometheus.restart()
    everything.prometheus.server.wait_for_alertmanager()
    everything.settle()
    assert everything.told_of("r-raises") == once


def test_many_runs_that_fall_silent_at_once_are_one_page(everything: World) -> None:
    silent = [f"r-silent{number}" for number in range(6)]
    for run_id in silent:
        told = {c.SERVICE_NAME: "resnet", c.RUN_ID: run_id, c.RANK: 0, c.TIER: c.TIER_PRODUCTION}
        started = Event(c.RUN_STARTED.name, time.time_ns(), {c.EVENT_SEQUENCE: 0})
        body = logs_request(encoded_resource(told), [started])
        headers = {"Content-Type": "application/x-protobuf"}
        url = f"{everything.collector.server.url}/v1/logs"
        requests.post(url, data=body, headers=headers, timeout=10).raise_for_status()
    assert "leave them alone" in everything.hears("ml-sre-page", silent[0], c.RULE_TELEMETRY_OUTAGE)
    everything.settle()
    heard = [each for run_id in silent for each in everything.told_of(run_id)]
    assert heard == [("ml-sre-page", "firing", c.RULE_TELEMETRY_OUTAGE)]


@pytest.mark.postgresql
def test_replicas_of_the_collector_double_nothing(
    tmp_path: Path, template: Callable[[str], str], new_postgresql: Callable[[str | None], str]
) -> None:
    database = new_postgresql(template("postgresql"))
    with (
        collector(database, "--lost-after", "6") as other,
        world(tmp_path, database, other.url.removeprefix("http://")) as two,
    ):
        two.train("r-two", "raises").wait(60)
        two.hears("ml-sre-page", "r-two", c.RULE_RUN_FAILED)
        two.prometheus.server.wait_for_series(
            f'count({c.FINDING_ACTIVE.name}{{run_id="r-two", rule="run_failed"}}) == 2'
        )
        two.settle()
        assert two.told_of("r-two") == [("ml-sre-page", "firing", c.RULE_RUN_FAILED)]
        # The one that is left shows the same.
        two.collector.stop()
        two.settle()
        assert two.told_of("r-two") == [("ml-sre-page", "firing", c.RULE_RUN_FAILED)]


def knows_of(url: str, run_id: str) -> bool:
    return any(alert["labels"].get("run_id") == run_id for alert in get_json(f"{url}/api/v2/alerts"))
