"""Load: the requests of training processes, and the connections that send them."""

from __future__ import annotations

import http.client
import multiprocessing
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from gradwatch import conventions as c

STEP_NANOS: Final = 30_000_000
# Bytes that occur nowhere else in a request: where times and values go.
_TIME_MARK: Final = 0x1122_3344_5566_7788
_VALUE_MARK: Final = float(np.frombuffer(b"\x99\xaa\xbb\xcc\xdd\xee\x77\x40", "<f8")[0])
_PROTOBUF: Final = {"Content-Type": "application/x-protobuf"}


@dataclass(frozen=True)
class Shape:
    """What a request holds: every metric of every layer, at one step."""

    layers: int = 300
    metrics: int = 4

    @property
    def points(self) -> int:
        """Datapoints of a request."""
        return self.layers * self.metrics


@dataclass(frozen=True)
class Load:
    """What was acknowledged: latencies of the requests and the time from the first to the last, in seconds."""

    latencies: Sequence[float]
    refused: int
    busy: float

    @property
    def rate(self) -> float:
        """Acknowledged requests a second."""
        return len(self.latencies) / self.busy


class Requests:
    """Requests of one training process, one a step: the same bytes but for times and values."""

    def __init__(self, run_id: str, shape: Shape, seed: int) -> None:
        self._body = np.frombuffer(_template(run_id, shape), np.uint8).copy()
        raw = self._body.tobytes()
        self._time_at = _places(raw, np.uint64(_TIME_MARK).tobytes())
        self._value_at = _places(raw, np.float64(_VALUE_MARK).tobytes())
        assert len(self._time_at) == len(self._value_at) == shape.points
        self._random = np.random.default_rng(seed)
        self._norms = np.exp(self._random.normal(0, 2, shape.points))
        self._time = time.time_ns()

    def next(self) -> bytes:
        """Return the next step's request: norms wander as those of a training do, in float32 precision."""
        self._time += STEP_NANOS
        self._norms *= np.exp(self._random.normal(0, 0.1, len(self._norms)))
        self._body[self._time_at] = np.frombuffer(np.uint64(self._time).tobytes(), np.uint8)
        values = self._norms.astype(np.float32).astype("<f8")
        self._body[self._value_at] = values.view(np.uint8).reshape(-1, 8)
        return self._body.tobytes()


def _template(run_id: str, shape: Shape) -> bytes:
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    for name, value in ((c.RUN_ID, run_id), (c.SERVICE_NAME, "bench"), (c.SERVICE_INSTANCE_ID, run_id)):
        resource.resource.attributes.add(key=name).value.string_value = value
    scope = resource.scope_metrics.add()
    for index in range(shape.metrics):
        metric = scope.metrics.add(name=f"training.layer.metric{index}", unit="{norm}")
        for layer in range(shape.layers):
            point = metric.gauge.data_points.add(time_unix_nano=_TIME_MARK, as_double=_VALUE_MARK)
            point.attributes.add(key=c.LAYER_NAME).value.string_value = layer_name(layer)
    encoded: bytes = request.SerializeToString()
    return encoded


def layer_name(layer: int) -> str:
    """Return the name of a layer as a transformer would have it."""
    return f"transformer.h.{layer // 10}.mlp.c_fc{layer % 10}.weight"


def _places(body: bytes, mark: bytes) -> npt.NDArray[np.int64]:
    found = []
    at = body.find(mark)
    while at >= 0:
        found.append(at)
        at = body.find(mark, at + len(mark))
    return np.array(found)[:, None] + np.arange(8)


def generate(
    address: str,
    seconds: float,
    *,
    shape: Shape = Shape(),
    connections: int = 8,
    points_per_second: float | None = None,
    first: int = 0,
) -> Load:
    """Send from a process of its own, each connection one request after another, or at a pace.

    ``first``: number of the first run; each connection is one.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    every = None if points_per_second is None else connections * shape.points / points_per_second
    arguments = (address, range(first, first + connections), shape, seconds, every, results)
    generator = context.Process(target=_generate, args=arguments)
    generator.start()
    loads: list[Load] = [results.get(timeout=seconds + 120) for _ in range(connections)]
    generator.join()
    return Load(
        [latency for load in loads for latency in load.latencies],
        sum(load.refused for load in loads),
        max(load.busy for load in loads),
    )


def _generate(
    address: str, seeds: range, shape: Shape, seconds: float, every: float | None, results: Any
) -> None:
    requests = [Requests(f"bench-{seed}", shape, seed) for seed in seeds]
    threads = [
        threading.Thread(
            target=lambda each=each, index=index: results.put(
                _send(address, each, seconds, every, index / len(seeds))
            )
        )
        for index, each in enumerate(requests)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _send(address: str, requests: Requests, seconds: float, every: float | None, phase: float) -> Load:
    """Send until ``seconds`` have passed; with ``every`` (seconds) at that pace, beginning at its phase."""
    connection = connect(address)
    began = time.monotonic()
    due = began + (every or 0) * phase
    latencies: list[float] = []
    refused = 0
    while (started := time.monotonic()) < began + seconds:
        if every is not None:
            if due > started:
                time.sleep(due - started)
            due += every
            started = time.monotonic()
        connection.request("POST", "/v1/metrics", requests.next(), _PROTOBUF)
        response = connection.getresponse()
        response.read()
        if response.status == 200:
            latencies.append(time.monotonic() - started)
        else:
            refused += 1
    connection.close()
    return Load(latencies, refused, time.monotonic() - began)


def connect(address: str) -> http.client.HTTPConnection:
    """Return an open connection that sends at once."""
    place = urlsplit(address)
    assert place.hostname is not None
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
