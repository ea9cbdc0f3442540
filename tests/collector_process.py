"""A real collector in a process of its own, and real training processes that talk to it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import requests

T = TypeVar("T")

GRADWATCH = (sys.executable, "-m", "gradwatch.cli")
PATIENCE_SECONDS = 120.0
# Black boxes of the training processes; gone with this process.
_files = tempfile.TemporaryDirectory(prefix="gradwatch-")


@dataclass(frozen=True)
class Collector:
    """Where the collector listens, and its process. ``grpc``: HOST:PORT, empty if none is served."""

    url: str
    process: subprocess.Popen[str]
    database: str
    grpc: str = ""

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=10, **options)

    def runs(self) -> dict[str, Any]:
        """All runs by id."""
        return {run["run_id"]: run for run in self.get("/api/v1/runs").json()["runs"]}

    def show(self, run_id: str) -> Any:
        return self.get(f"/api/v1/runs/{run_id}").json()

    def peak_mib(self) -> float:
        """The most MiB that ever were resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024

    def await_status(self, run_id: str, status: str) -> Any:
        """The run, once it stands so."""
        return eventually(
            lambda: run if (run := self.runs().get(run_id)) and run["status"] == status else None,
            f"{run_id} to be {status}",
        )


def eventually(probe: Callable[[], T | None], what: str, patience: float = PATIENCE_SECONDS) -> T:
    """What ``probe`` returns as soon as that is true."""
    give_up = time.monotonic() + patience
    while not (found := probe()):
        assert time.monotonic() < give_up, f"waited {patience:g} s in vain for {what}"
        time.sleep(0.05)
    return found


def free_port() -> int:
    """A loopback port that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def collector(
    database: str, *options: str, log: IO[str] | None = None, program: Sequence[str] = GRADWATCH
) -> Iterator[Collector]:
    """Serve on a free loopback port until the block ends; no gRPC, unless an option asks for it.

    ``log``: a file for what it logs; without, that goes to this process's standard error. ``program``: what is
    run instead of ``gradwatch``.
    """
    command = [*program, "collector", "serve", "--db", database, "--listen", "127.0.0.1:0", "--grpc", "off"]
    command += options
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"https?://[^\s,]+", line)
        assert address, f"the collector did not start: {line!r}"
        _, _, grpc = line.partition("gRPC on ")
        yield Collector(address[0], process, database, grpc.split(",")[0])
    finally:
        process.terminate()
        process.wait(timeout=30)
        process.stdout.close()


def environment(collector: Collector | None, **settings: str) -> dict[str, str]:
    """An environment for a training process: exports every 0.2 s, internal errors surface."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GRADWATCH_", "OTEL_"))}
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url} if collector else {}
    return {
        **clean,
        "GRADWATCH_EXPORT_INTERVAL": "0.2",
        "GRADWATCH_TESTING": "1",
        "GRADWATCH_DIR": _files.name,
        "OMP_NUM_THREADS": "1",
        **endpoint,
        **settings,
    }


def train(script: Path, collector: Collector | None, **settings: str) -> subprocess.Popen[str]:
    """Start a training script; keywords are environment variables."""
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=environment(collector, **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def gradwatch(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end, as in a pipe."""
    return subprocess.run(
        [*GRADWATCH, *arguments], env=environment(None, **settings), capture_output=True, text=True, timeout=300
    )
