"""Starts a collector and the demo's training processes, and waits until every run stands.

Everything runs as a user would run it: the collector and each training loop in a process of its own, speaking
OTLP over loopback.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOST_AFTER_SECONDS = 6.0
# One export a second and two processes at a time: a machine with two cores is enough.
AT_ONCE = 2
KILL_AFTER_STEPS = 50
_DEADLINE_SECONDS = 150.0


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run of the demo and what must become of it."""

    run_id: str
    recipe: str
    seed: int
    status: str
    story: str
    killed: bool = False


PLAN = (
    PlannedRun("demo-killed", "endless", 0, "lost", "killed with SIGKILL while it trained", killed=True),
    PlannedRun("demo-nan", "nan", 0, "succeeded", "a blank scan in batch 40 meets a square root"),
    PlannedRun("demo-crash", "crash", 0, "failed", "a corrupt label in batch 60"),
    PlannedRun("demo-plateau", "plateau", 0, "succeeded", "a learning rate far too small"),
    PlannedRun("demo-mlp-1", "mlp", 1, "succeeded", "healthy"),
    PlannedRun("demo-mlp-2", "mlp", 2, "succeeded", "healthy"),
    PlannedRun("demo-mlp-3", "mlp", 3, "succeeded", "healthy"),
    PlannedRun("demo-cnn-1", "cnn", 1, "succeeded", "healthy"),
    PlannedRun("demo-cnn-2", "cnn", 2, "succeeded", "healthy"),
)


class DemoError(Exception):
    """The demo could not be played to its end; the message says where it stopped."""


class CollectorProcess:
    """A collector in a process of its own, and its API."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url

    def get(self, path: str) -> Any:
        """Return the JSON answer of an API path, or None when there is none."""
        with (
            suppress(OSError),
            urllib.request.urlopen(  # noqa: S310 - our own collector
                self.url + path, timeout=5
            ) as answer,
        ):
            return json.load(answer)
        return None

    def run(self, run_id: str) -> Any:
        """Return a run, or None while it is unknown."""
        listed = self.get("/api/v1/runs")
        return next((run for run in (listed or {"runs": []})["runs"] if run["run_id"] == run_id), None)


@contextmanager
def collector(database: str, log: Path) -> Iterator[CollectorProcess]:
    """Run a collector on a free loopback port until the block ends."""
    command = [sys.executable, "-m", "gradwatch.cli", "collector", "serve", "--db", database]
    command += ["--listen", "127.0.0.1:0", "--grpc", "off", "--lost-after", str(LOST_AFTER_SECONDS)]
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        words = process.stdout.readline().split()
        url = next((word.rstrip(",") for word in words if word.startswith("http://")), None)
        if url is None:
            raise DemoError(f"the collector did not start; see {log}")
        yield CollectorProcess(process, url)
    finally:
        process.terminate()
        process.wait()


def play(server: CollectorProcess, logs: Path, tell: Callable[[PlannedRun, str], None]) -> None:
    """Train all of `PLAN`, a few at a time, and return when no run is running any more.

    ``tell`` is called with each run and what just became of it.

    Raises:
        DemoError: a run took far too long.
    """
    give_up = time.monotonic() + _DEADLINE_SECONDS
    waiting, training = list(PLAN), dict[str, tuple[PlannedRun, subprocess.Popen[bytes]]]()
    try:
        while waiting or training:
            while waiting and len(training) < AT_ONCE:
                planned = waiting.pop(0)
                training[planned.run_id] = (planned, _start(planned, server.url, logs))
                tell(planned, "started")
            time.sleep(0.1)
            for planned, process in list(training.values()):
                if planned.killed and process.poll() is None and _has_trained(server, planned):
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                if process.poll() is not None:
                    del training[planned.run_id]
                    tell(planned, f"ended, {_ending(process.returncode)}")
            _check(give_up, "training took too long", logs)
    finally:
        for _, process in training.values():
            process.kill()
            process.wait()
    while any((server.run(planned.run_id) or {"status": "running"})["status"] == "running" for planned in PLAN):
        time.sleep(0.2)
        _check(give_up, "a run is still called running", logs)


def _start(planned: PlannedRun, url: str, logs: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "GRADWATCH_RUN_ID": planned.run_id,
        "GRADWATCH_EXPORT_INTERVAL": "1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
    }
    with (logs / f"{planned.run_id}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "gradwatch_collector.demo.train", planned.recipe, str(planned.seed)],
            env=environment,
            stdout=log,
            stderr=log,
        )


def _has_trained(server: CollectorProcess, planned: PlannedRun) -> bool:
    run = server.run(planned.run_id)
    return run is not None and (run["last_step"] or 0) >= KILL_AFTER_STEPS


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"


def _check(give_up: float, what: str, logs: Path) -> None:
    if time.monotonic() > give_up:
        raise DemoError(f"{what}; the logs are in {logs}")
