"""Whether memory stays bounded under abuse, and answers stay right."""

from __future__ import annotations

import gzip
import http.client
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from collection.figures import Figure, at_most
from collection.load import Requests, Shape, connect
from collection.servers import Server, collector, new_database

_PROTOBUF: Final = {"Content-Type": "application/x-protobuf"}
_HUGE: Final = 64 << 20
_SETS_AT_ONCE: Final = 1_000


def figures(servers: dict[str, str], cap_bytes: int, *, sets: int, slow_seconds: float) -> Iterator[Figure]:
    """Abuse a collector on SQLite in every way, one after the other."""
    cap = cap_bytes / 2**20
    with collector(new_database(servers["SQLite"], "limits"), "--memory", str(cap_bytes >> 20)) as serving:
        abuses: tuple[tuple[str, Callable[[], int]], ...] = (
            ("100 slow clients", lambda: _slow_clients(serving, slow_seconds)),
            (
                "100 bodies of 64 MiB at once",
                lambda: _all_at_once(lambda: _post(serving, bytes(_HUGE), {}, 413)),
            ),
            ("100 gzip bombs at once", lambda: _bombs(serving)),
            (f"{sets:,} attribute sets", lambda: _many_sets(serving, sets)),
        )
        for what, abuse in abuses:
            refused = abuse()
            note = f" ({refused} refused as they should be)" if refused else ""
            yield at_most(f"{what}: resident memory", cap, serving.peak_bytes() / 2**20, " MiB", note, digits=0)
            _post(serving, Requests("after", Shape(), 1).next(), {}, 200)


def _post(server: Server, body: bytes, headers: dict[str, str], *expected: int) -> int:
    connection = connect(server.address)
    try:
        connection.request("POST", "/v1/metrics", body, _PROTOBUF | headers)
        status = connection.getresponse().status
    except (ConnectionError, http.client.HTTPException):
        status = 413  # it hung up in the middle of what it had refused already
    finally:
        connection.close()
    assert status in expected, f"{status} instead of {expected}"
    return status


def _all_at_once(post: Callable[[], int], count: int = 100) -> int:
    threads = [threading.Thread(target=post) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return count


def _bombs(server: Server) -> int:
    bomb = gzip.compress(bytes(16 << 30 >> 4), 9)  # a thousandfold
    return _all_at_once(lambda: _post(server, bomb, {"Content-Encoding": "gzip"}, 413, 503))


def _slow_clients(server: Server, seconds: float, count: int = 100) -> int:
    body = Requests("slow", Shape(), 1).next()
    connections = [connect(server.address) for _ in range(count)]
    for connection in connections:
        connection.putrequest("POST", "/v1/metrics")
        connection.putheader("Content-Type", _PROTOBUF["Content-Type"])
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
    parts = max(1, int(seconds * 4))
    size = -(-len(body) // parts)
    for start in range(0, len(body), size):
        for connection in connections:
            connection.send(body[start : start + size])
        # Those who are not slow are answered meanwhile.
        _post(server, body, {}, 200)
        time.sleep(seconds / parts)
    for connection in connections:
        assert connection.getresponse().status == 200
        connection.close()
    return 0


def _many_sets(server: Server, sets: int) -> int:
    refused = 0
    for start in range(0, sets, _SETS_AT_ONCE):
        request = ExportMetricsServiceRequest()
        resource = request.resource_metrics.add()
        resource.resource.attributes.add(key="service.name").value.string_value = "careless"
        metric = resource.scope_metrics.add().metrics.add(name="requests", unit="1")
        for user in range(start, start + _SETS_AT_ONCE):
            point = metric.gauge.data_points.add(time_unix_nano=1_700_000_000_000_000_000 + start, as_double=1)
            point.attributes.add(key="user").value.string_value = f"user-{user}"
        refused += _post(server, request.SerializeToString(), {}, 200, 503) != 200
    return refused
