"""Whether memory stays bounded whatever clients do, and answers stay right: what is taken, what is refused."""

from __future__ import annotations

import functools
import gzip
import json
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlencode

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from sqlalchemy import Select, func
from sqlalchemy import select as select_rows

from collection.figures import Figure, at_most
from collection.load import Requests, Shape, connect
from collection.servers import Server, collector, new_database
from gradwatch import conventions as c
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema

_PROTOBUF: Final = {"Content-Type": "application/x-protobuf"}
_GZIP: Final = {"Content-Encoding": "gzip"}
_HUGE: Final = 64 << 20
_CHUNK: Final = 256 << 10
_AT_ONCE: Final = 100
_LINE: Final = 64 << 10
_SETS_AT_ONCE: Final = 1_000
_START: Final = 1_700_000_000_000_000_000
_GIVE_UP_SECONDS: Final = 600.0


@dataclass(frozen=True)
class Answer:
    """What came back. No answer, a connection that was cut off, is none of these: it raises."""

    status: int
    body: bytes


def figures(
    servers: dict[str, str], cap_bytes: int, *, sets: int, slow_seconds: float, large: int
) -> Iterator[Figure]:
    """Load a collector on SQLite in every way, each time a new one, whose peak is the figure.

    ``large`` is how many bodies of 64 MiB are to be taken.
    """
    parts: tuple[tuple[str, Callable[[Server, str], str]], ...] = (
        (f"{_AT_ONCE} slow clients", lambda server, _: _slow_clients(server, slow_seconds)),
        (f"{large} gzip bodies of 64 MiB at once, taken", lambda server, url: _large(server, url, large)),
        (f"{_AT_ONCE} bodies of 64 MiB at once, not taken", lambda server, _: _too_large(server)),
        (f"{_AT_ONCE} gzip bombs at once, not taken", lambda server, _: _bombs(server)),
        (f"{sets:,} attribute sets, taken", lambda server, url: _many_sets(server, url, sets)),
    )
    for number, (what, load) in enumerate(parts):
        url = new_database(servers["SQLite"], f"limits{number}")
        # What is sent is of 2023.
        with collector(url, "--memory", str(cap_bytes >> 20), "--keep-raw", "forever") as serving:
            note = load(serving, url)
            # It is the same process that answers still.
            assert _post(serving, "metrics", Requests("after", Shape(), 1).next()).status == 200
            peak = serving.peak_bytes() / 2**20
        yield at_most(f"{what}: resident memory", cap_bytes / 2**20, peak, " MiB", f" ({note})", digits=0)


def _post(server: Server, signal: str, body: bytes, headers: dict[str, str] | None = None) -> Answer:
    """Send a request and return its answer, which may come before all of the body is sent.

    Raises:
        OSError: the connection was cut off before an answer.
        http.client.HTTPException: likewise.
    """
    connection = connect(server.address)
    try:
        connection.putrequest("POST", f"/v1/{signal}")
        for name, value in {**_PROTOBUF, **(headers or {}), "Content-Length": str(len(body))}.items():
            connection.putheader(name, value)
        connection.endheaders()
        for start in range(0, len(body), _CHUNK):
            if select.select([connection.sock], [], [], 0)[0]:
                break
            connection.send(body[start : start + _CHUNK])
        answer = connection.getresponse()
        return Answer(answer.status, answer.read())
    finally:
        connection.close()


def _insist(post: Callable[[], Answer], expected: int) -> tuple[Answer, int]:
    """Send again for as long as the collector says later; return what it says then, and how often it did so."""
    give_up = time.monotonic() + _GIVE_UP_SECONDS
    put_off = 0
    while (answer := post()).status == 503 and time.monotonic() < give_up:
        put_off += 1
        time.sleep(1)
    assert answer.status == expected, f"{answer.status} instead of {expected}"
    return answer, put_off


def _all_at_once(post: Callable[[], Answer]) -> str:
    """Send all at once, each being refused as too large or put off; one alone after that is refused."""
    ready = threading.Barrier(_AT_ONCE)

    def send() -> int:
        ready.wait()
        return post().status

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = Counter(each.result() for each in [pool.submit(send) for _ in range(_AT_ONCE)])
    assert answers.keys() <= {413, 503}, answers
    _insist(post, 413)
    return f"{answers[413]} refused, {answers[503]} put off"


def _large(server: Server, url: str, count: int) -> str:
    request = ExportLogsServiceRequest()
    owner = request.resource_logs.add()
    owner.resource.attributes.add(key=c.RUN_ID).value.string_value = "talkative"
    lines = owner.scope_logs.add().log_records
    line = "all work and no play makes a long log " * (_LINE // 38)
    while len(lines) * _LINE < _HUGE - 2 * _LINE:
        lines.add(time_unix_nano=_START + len(lines)).body.string_value = f"{len(lines)} {line}"
    encoded = request.SerializeToString()
    assert 0.95 * _HUGE < len(encoded) <= _HUGE
    # Each its own lines: one that came again would be one that is stored already.
    bodies = []
    for _ in range(count):
        for record in lines:
            record.time_unix_nano += 1_000_000_000
        bodies.append(gzip.compress(request.SerializeToString(), 1))
    with ThreadPoolExecutor(count) as pool:
        sends = [functools.partial(_post, server, "logs", body, _GZIP) for body in bodies]
        sent = [pool.submit(_insist, send, 200) for send in sends]
        put_off = sum(each.result()[1] for each in sent)
    stored = _scalar(url, select_rows(func.count()).select_from(schema.event))
    assert stored == count * len(lines), f"{stored} of {count * len(lines)} lines are stored"
    return f"{count} taken and stored, {put_off} put off before"


def _too_large(server: Server) -> str:
    body = bytes(_HUGE)
    return _all_at_once(lambda: _post(server, "metrics", body))


def _bombs(server: Server) -> str:
    bomb = gzip.compress(bytes(16 << 30 >> 4), 9)  # a thousandfold
    return _all_at_once(lambda: _post(server, "metrics", bomb, _GZIP))


def _slow_clients(server: Server, seconds: float) -> str:
    body = Requests("slow", Shape(), 1).next()
    connections = [connect(server.address) for _ in range(_AT_ONCE)]
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
        assert _post(server, "metrics", body).status == 200
        time.sleep(seconds / parts)
    answers = Counter(connection.getresponse().status for connection in connections)
    assert answers == {200: _AT_ONCE}, answers
    for connection in connections:
        connection.close()
    return f"all {_AT_ONCE} taken"


def _many_sets(server: Server, url: str, sets: int) -> str:
    put_off = 0
    for start in range(0, sets, _SETS_AT_ONCE):
        request = ExportMetricsServiceRequest()
        resource = request.resource_metrics.add()
        resource.resource.attributes.add(key=c.RUN_ID).value.string_value = "careless"
        metric = resource.scope_metrics.add().metrics.add(name="requests", unit="1")
        for user in range(start, start + _SETS_AT_ONCE):
            point = metric.gauge.data_points.add(time_unix_nano=_START + start, as_double=user)
            point.attributes.add(key="user").value.string_value = f"user-{user}"
        body = request.SerializeToString()
        answer, later = _insist(functools.partial(_post, server, "metrics", body), 200)
        assert not ExportMetricsServiceResponse.FromString(answer.body).HasField("partial_success")
        put_off += later
    points = (
        select_rows(func.sum(schema.attribute_set.c.width))
        .join(schema.series, schema.series.c.set_id == schema.attribute_set.c.set_id)
        .where(schema.series.c.run_id == "careless")
    )
    assert (stored := _scalar(url, points)) == sets, f"{stored} of {sets} sets are stored"
    for user in (0, sets // 2, sets - 1):
        assert _values(server, user) == [user]
    return f"all taken and found, {put_off} put off before"


def _values(server: Server, user: int) -> list[float]:
    query = urlencode({"run": "careless", "metric": "requests", "label": f"user=user-{user}"})
    connection = connect(server.address)
    connection.sock.settimeout(_GIVE_UP_SECONDS)  # it is looked for among all of them
    connection.request("GET", f"/api/v1/series?{query}")
    (found,) = json.loads(connection.getresponse().read())["series"]
    connection.close()
    return [point["value"] for point in found["points"]]


def _scalar(url: str, statement: Select[int]) -> int:
    engine = db.connect(url)
    with engine.connect() as connection:
        found = connection.scalar(statement)
    engine.dispose()
    return int(found or 0)
