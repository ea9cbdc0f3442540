"""A collector under spoiled requests: it goes on, keeps to its memory, and what is good in between is stored.

Clients send requests that were made well and then spoiled with their structure in mind (``tests/fuzzing``), as
protobuf and JSON over HTTP and as protobuf over gRPC. Of eight requests one is good. Looked for are: a
collector that died, an answer that OTLP does not know or a 5xx that is no announced overload, an exception in
the log, more resident memory than `serve --memory` allows, and good requests that were not stored exactly. The
API is read meanwhile, and its answers are held against their schemas.

    python -m tests.soak.fuzz [--requests 1000000] [--db URL] [--seed N]

The requests of a seed are always the same, but for the moments in them. What was answered wrongly is written to
files, with its answer.
"""

from __future__ import annotations

import argparse
import random
import re
import socket
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import grpc
import httptools
import numpy as np
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from sqlalchemy import select

from gradwatch import conventions as c
from gradwatch.export.otlp_encoding import encoded_resource, logs_request, metrics_request
from gradwatch.telemetry import Event, MetricSeries
from gradwatch_collector.schemas import SCHEMAS, load_schema
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.reading import read_series
from tests.collector_process import Collector, collector
from tests.fuzzing.traffic import PROTOBUF, Request, Spoiler, Verdict, grpc_path, judged_grpc, judged_http
from tests.otlp_clients import attributes

MEMORY_MIB: Final = 512
_OVER_HTTP: Final = 28
_OVER_GRPC: Final = 4
# Sent before the first answer is waited for; one of them is good.
_AT_ONCE: Final = 8
_POINTS: Final = 8
_PATIENCE_SECONDS: Final = 60.0
# A request that ends too early gets no answer; nobody can tell but by waiting.
_UNSOUND_SECONDS: Final = 0.1
_LOOK_SECONDS: Final = 0.2
_LOOKS_A_READING: Final = 25
_READ_AT_ONCE: Final = 5
_READ_AT_THE_END: Final = 50
_SHOWN: Final = 10
_SHAPES: Final = {name: Draft202012Validator(load_schema(name)) for name in SCHEMAS}


@dataclass(frozen=True)
class Figures:
    """What was seen. ``verdicts``: answers by what they say; ``unanswered``: of requests that are no HTTP.

    ``good`` and ``missing``: points, events and spans of good requests, and those of them that are not stored
    exactly once. ``broken``: what should not have been answered, read or logged, a line each.
    """

    requests: int
    seconds: float
    verdicts: Counter[str]
    good: int
    missing: int
    peak_mib: float
    read: int
    broken: Sequence[str]

    @property
    def is_met(self) -> bool:
        """Whether every promise was kept."""
        return not (self.broken or self.missing) and self.good > 0 and self.peak_mib <= MEMORY_MIB


@dataclass
class Findings:
    """What went wrong, and the requests that it went wrong with, as files. Thread-safe, as lists are."""

    folder: Path
    told: list[str] = field(default_factory=list)

    def add(self, who: str, number: int, request: Request, why: str) -> None:
        """Note a request that was answered wrongly."""
        self.told.append(f"{who}, request {number}: {why}")
        if len(self.told) <= _SHOWN:
            self.folder.mkdir(exist_ok=True, parents=True)
            (self.folder / f"{who}-{number}.bin").write_bytes(request.wire if request.lines else request.body)

    def read_log(self, log: str) -> None:
        """Note the exceptions in the collector's log, and keep that if there are any."""
        ends = Counter(re.findall(r"^Traceback .*\n(?:[ \n].*\n|\n)+(.+)", log, re.MULTILINE))
        self.told += [f"{count} times in the log: {error[:300]}" for error, count in ends.items()]
        if ends:
            self.folder.mkdir(exist_ok=True, parents=True)
            (self.folder / "collector.log").write_text(log)


class Client(ABC):
    """One sender of spoiled requests, and of good ones about a run of its own."""

    def __init__(self, name: str, seed: int, began: int, findings: Findings) -> None:
        self.run_id = f"good-{name}"
        self.name = name
        self.dice = random.Random(f"{seed}/{name}")
        self.spoiler = Spoiler(self.dice, began)
        self.sent = 0
        self.kept = 0
        self.verdicts: Counter[str] = Counter()
        self._began = began
        self._findings = findings

    def run(self, count: int, stop: threading.Event) -> None:
        """Send so many requests, eight at once."""
        while self.sent < count and not stop.is_set():
            batch = [self._spoiled() for _ in range(_AT_ONCE)]
            place = self.dice.randrange(_AT_ONCE)
            batch[place] = self._good()
            for index, (request, verdict) in enumerate(zip(batch, self._exchange(batch), strict=True)):
                self._note(request, verdict, is_good=index == place)

    def _note(self, request: Request, verdict: Verdict, *, is_good: bool) -> None:
        self.verdicts[verdict.word] += 1
        self.sent += 1
        if is_good and verdict.word not in ("taken", "overload", "unanswered"):
            self._findings.add(self.name, self.sent, request, f"a good one is {verdict.word}: {verdict.why}")
        elif verdict.word == "BROKEN":
            self._findings.add(self.name, self.sent, request, verdict.why)
        # One that came in an overload is sent again.
        self.kept += is_good and verdict.word == "taken"

    @abstractmethod
    def close(self) -> None:
        """Send nothing any more."""

    @abstractmethod
    def _spoiled(self) -> Request:
        """Return the next request."""

    @abstractmethod
    def _exchange(self, batch: Sequence[Request]) -> Sequence[Verdict]:
        """Send requests and return what the answers are worth."""

    def _good(self) -> Request:
        """The next good one: losses, an event and a span in turn."""
        turn, signal = divmod(self.kept, 3)
        resource = encoded_resource({c.SERVICE_NAME: "fuzz", c.RUN_ID: self.run_id, c.RANK: 0})
        if signal == 0:
            values = range(turn * _POINTS, (turn + 1) * _POINTS)
            times = array("q", [self._began + value * 1000 for value in values])
            body = metrics_request(resource, [MetricSeries(c.LOSS, {}, times, array("d", values))])
            return self._carried(ExportMetricsServiceRequest, body)
        if signal == 1:
            told = Event("training.kept", self._began, {c.EVENT_SEQUENCE: turn})
            return self._carried(ExportLogsServiceRequest, logs_request(resource, [told]))
        request = ExportTraceServiceRequest()
        owner = request.resource_spans.add()
        owner.resource.attributes.extend(attributes({c.RUN_ID: self.run_id}))
        owner.scope_spans.add().spans.add(
            trace_id=self.run_id.encode().ljust(16, b".")[:16],
            span_id=(turn + 1).to_bytes(8),
            name="kept",
            start_time_unix_nano=self._began,
            end_time_unix_nano=self._began + turn,
        )
        return self._carried(ExportTraceServiceRequest, request.SerializeToString())

    @abstractmethod
    def _carried(self, kind: Any, body: bytes) -> Request:
        """Return a message as this client sends it."""

    def missing(self, engine: db.Engine) -> tuple[int, int]:
        """How many good points, events and spans there were, and how many are not stored exactly once."""
        turns = [(self.kept + 2 - signal) // 3 for signal in range(3)]
        with engine.connect() as connection:
            losses = [
                value
                for one in read_series(connection, self.run_id, c.LOSS.name)
                for value in np.asarray(one.values).ravel().tolist()
            ]
            event, span = schema.event.c, schema.span.c
            events = connection.scalars(select(event.sequence).where(event.run_id == self.run_id)).all()
            spans = (
                connection.execute(select(span.end - span.start).where(span.run_id == self.run_id))
                .scalars()
                .all()
            )
        sent = (range(turns[0] * _POINTS), range(turns[1]), range(turns[2]))
        wrong = sum(
            ((Counter(stored) - Counter(told)) + (Counter(told) - Counter(stored))).total()
            for stored, told in zip((losses, events, spans), sent, strict=True)
        )
        return sum(map(len, sent)), wrong


class _Answers:
    """Reads answers from a connection, in order."""

    def __init__(self) -> None:
        self.whole: list[tuple[int, dict[str, str], bytes]] = []
        self._headers: dict[str, str] = {}
        self._body = b""
        self.parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        status = self.parser.get_status_code()
        if status >= 200:  # 100 goes ahead of the answer
            self.whole.append((status, self._headers, self._body))
        self._headers, self._body = {}, b""


class HttpClient(Client):
    """Over one connection that stays, and a new one for each request that is no HTTP."""

    def __init__(self, url: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        host, _, port = url.removeprefix("http://").rpartition(":")
        self._address = host, int(port)
        self._connection: socket.socket | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _spoiled(self) -> Request:
        return self.spoiler.over_http()

    def _carried(self, kind: Any, body: bytes) -> Request:
        path = {ExportMetricsServiceRequest: "metrics", ExportLogsServiceRequest: "logs"}.get(kind, "traces")
        lines = (
            f"POST /v1/{path} HTTP/1.1",
            "Host: localhost",
            f"Content-Type: {PROTOBUF}",
            f"Content-Length: {len(body)}",
        )
        return Request(kind, body, PROTOBUF, lines)

    def _exchange(self, batch: Sequence[Request]) -> Sequence[Verdict]:
        sound = [request for request in batch if request.sound]
        verdicts = dict(zip(map(id, sound), self._pipelined(sound), strict=True))
        return [verdicts[id(each)] if each.sound else self._alone(each) for each in batch]

    def _pipelined(self, requests: Sequence[Request]) -> list[Verdict]:
        if self._connection is None:
            self._connection = socket.create_connection(self._address, timeout=_PATIENCE_SECONDS)
        answers = _Answers()
        try:
            self._connection.sendall(b"".join(request.wire for request in requests))
            while len(answers.whole) < len(requests):
                received = self._connection.recv(1 << 16)
                if not received:
                    break
                answers.parser.feed_data(received)
        except (OSError, httptools.HttpParserError) as error:
            why = f"the connection ended: {error!r}"
        else:
            why = "the connection was closed"
        verdicts = [
            judged_http(request, *answer) for request, answer in zip(requests, answers.whole, strict=False)
        ]
        if len(verdicts) < len(requests):
            self.close()
            # After an internal error the server closes, and that is one finding and not eight.
            first = Verdict("unanswered") if any(each.why for each in verdicts) else Verdict("BROKEN", why)
            verdicts += [first, *[Verdict("unanswered")] * (len(requests) - len(verdicts) - 1)]
        return verdicts

    def _alone(self, request: Request) -> Verdict:
        answers = _Answers()
        with closing(socket.create_connection(self._address, timeout=_PATIENCE_SECONDS)) as connection:
            try:
                connection.sendall(request.wire)
                connection.settimeout(_UNSOUND_SECONDS)
                while not answers.whole and (received := connection.recv(1 << 16)):
                    answers.parser.feed_data(received)
            except OSError:
                pass
            except httptools.HttpParserError as error:
                return Verdict("BROKEN", f"the answer is not HTTP: {error!r}")
        return judged_http(request, *answers.whole[0]) if answers.whole else Verdict("unanswered")


class GrpcClient(Client):
    """Over one channel."""

    def __init__(self, address: str, *arguments: Any) -> None:
        super().__init__(*arguments)
        options = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
        self._channel = grpc.insecure_channel(address, options=options)

    def close(self) -> None:
        self._channel.close()

    def _spoiled(self) -> Request:
        return self.spoiler.over_grpc()

    def _carried(self, kind: Any, body: bytes) -> Request:
        return Request(kind, body)

    def _exchange(self, batch: Sequence[Request]) -> Sequence[Verdict]:
        calls = [
            self._channel.unary_unary(grpc_path(request.kind)).future(
                request.body,
                timeout=_PATIENCE_SECONDS,
                compression=grpc.Compression.Gzip if request.compressed else grpc.Compression.NoCompression,
            )
            for request in batch
        ]
        return [judged_grpc(request, call) for request, call in zip(batch, calls, strict=True)]


@dataclass
class Reader:
    """Reads what is stored through the API, as somebody would who looks on."""

    running: Collector
    dice: random.Random
    count: int = 0
    broken: list[str] = field(default_factory=list)

    def read(self, most: int) -> None:
        """Read the lists, and at most so many runs and metrics of them."""
        runs = self._get("/api/v1/runs", "run-list") or {"runs": []}
        for run in self._some(runs["runs"], most):
            self._get(f"/api/v1/runs/{quote(run['run_id'], safe='')}", "run-detail")
        metrics = self._get("/api/v1/metrics", "metric-list") or {"metrics": []}
        for metric in self._some(metrics["metrics"], most):
            for source in metric["sources"][:1]:
                asked = f"metric={quote(metric['name'], safe='')}&run={quote(source['run_id'], safe='')}"
                self._get(f"/api/v1/series?{asked}", "series-list")
        for path in ("/api/v1/slos", "/metrics", "/readyz"):
            self._get(path)

    def _some(self, found: Sequence[Any], most: int) -> Sequence[Any]:
        return self.dice.sample(found, min(most, len(found)))

    def _get(self, path: str, shape: str | None = None) -> Any:
        self.count += 1
        answer = self.running.get(path)
        told = f"{answer.status_code} {answer.text[:300]!r}"
        if answer.status_code == 503 and "retry-after" in answer.headers:
            return None
        if answer.status_code != 200:
            self.broken.append(f"GET {path[:300]}: {told}")
            return None
        if shape is None:
            return None
        found = answer.json()
        if (error := best_match(_SHAPES[shape].iter_errors(found))) is not None:
            self.broken.append(f"GET {path[:300]}: {error.message[:300]} at {error.json_path}")
        return found


def fuzz(
    database: str,
    requests: int,
    seed: int,
    folder: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> Figures:
    """Send so many requests to a collector on an empty database; ``folder`` is for what went wrong."""
    findings = Findings(folder)
    began, started = time.time_ns(), time.monotonic()
    stop = threading.Event()
    with tempfile.TemporaryFile("w+") as log:
        options = ("--grpc", "127.0.0.1:0", "--memory", str(MEMORY_MIB))
        with collector(database, *options, log=log) as running:
            told = [seed, began, findings]
            clients: list[Client] = [HttpClient(running.url, f"http-{i}", *told) for i in range(_OVER_HTTP)]
            clients += [GrpcClient(running.grpc, f"grpc-{i}", *told) for i in range(_OVER_GRPC)]
            reader = Reader(running, random.Random(seed))
            with ThreadPoolExecutor(len(clients)) as pool:
                sending = [pool.submit(each.run, -(-requests // len(clients)), stop) for each in clients]
                try:
                    peak = _watch(running, reader, sending, lambda: progress(sum(one.sent for one in clients)))
                finally:
                    stop.set()
            for client, done in zip(clients, sending, strict=True):
                client.close()
                done.result()
            seconds = time.monotonic() - started
            if running.process.poll() is None:
                reader.read(_READ_AT_THE_END)
                peak = max(peak, running.peak_mib())
            else:
                findings.told.append(f"the collector ended with {running.process.returncode}")
        log.seek(0)
        findings.read_log(log.read())
    engine = db.connect(database)
    try:
        counted = [each.missing(engine) for each in clients]
    finally:
        engine.dispose()
    return Figures(
        sum(each.sent for each in clients),
        seconds,
        sum((each.verdicts for each in clients), Counter()),
        sum(good for good, _ in counted),
        sum(missing for _, missing in counted),
        peak,
        reader.count,
        [*findings.told, *reader.broken],
    )


def _watch(running: Collector, reader: Reader, sending: Sequence[Any], show: Callable[[], None]) -> float:
    """Look on until all is sent or the collector is gone; return the most MiB that were resident."""
    peak, looks = 0.0, 0
    while not all(each.done() for each in sending) and running.process.poll() is None:
        peak = max(peak, running.peak_mib())
        looks += 1
        if looks % _LOOKS_A_READING == 0:
            reader.read(_READ_AT_ONCE)
        show()
        time.sleep(_LOOK_SECONDS)
    return peak


def main() -> None:
    """Print the figures; exit with 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--db", help="an empty database; a new SQLite file without")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="folder for what went wrong")
    options = parser.parse_args()
    print(f"seed                             {options.seed}", flush=True)

    def progress(sent: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{sent} of {options.requests} requests", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        database = options.db or f"sqlite:///{folder}/gradwatch.db"
        seen = fuzz(database, options.requests, options.seed, options.keep, progress)
    print(f"requests                         {seen.requests}, {seen.requests / seen.seconds:.0f} a second")
    for word, count in seen.verdicts.most_common():
        print(f"  {word:30} {count}")
    print(f"good points, events and spans    {seen.good}")
    print(f"of them not stored exactly once  {seen.missing}")
    print(f"resident memory at most          {seen.peak_mib:.0f} MiB of {MEMORY_MIB}")
    print(f"answers of the API read          {seen.read}")
    print(f"broken promises                  {len(seen.broken)}")
    for line in seen.broken[:_SHOWN]:
        print(f"  {line}")
    sys.exit(not seen.is_met)


if __name__ == "__main__":
    main()
