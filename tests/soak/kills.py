"""A collector that is killed again and again while it takes data in: what it acknowledged is stored, once.

Senders post OTLP requests, each until it is acknowledged and now and then once more, while the collector is
killed with SIGKILL at random moments and started again. Then what is stored is held against what was sent.

    python -m tests.soak.kills [--kills 500] [--db URL]
"""

from __future__ import annotations

import argparse
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import requests
from sqlalchemy import func, select

from gradwatch import conventions as names
from gradwatch.export.otlp_encoding import encoded_resource, logs_request, metrics_request
from gradwatch.telemetry import Event, MetricSeries
from gradwatch_collector import database as db
from gradwatch_collector import schema
from gradwatch_collector.compaction import compact
from gradwatch_collector.reading import read_series
from tests.collector_process import collector

# Points in a request.
_POINTS = 8
# Of a hundred requests that were acknowledged, so many are sent again, as by a client that missed the answer.
_SENT_AGAIN = 10
_PAUSE_SECONDS = 0.002
_SECOND = 1_000_000_000


@dataclass(frozen=True)
class Figures:
    """What was seen. Points and events that were acknowledged, of those the lost and those stored twice."""

    kills: int
    acknowledged: int
    unanswered: int
    lost: int
    twice: int


@dataclass
class Sender:
    """One training process, as the collector sees it: losses 0, 1, 2, ... and an event with each request."""

    run_id: str
    url: str
    dice: random.Random
    stop: threading.Event
    began: int = field(default_factory=time.time_ns)
    sent: int = 0
    unanswered: int = 0

    def run(self) -> None:
        """Send until told to stop; every request until it is acknowledged."""
        resource = encoded_resource({names.SERVICE_NAME: "kills", names.RUN_ID: self.run_id, names.RANK: 0})
        with requests.Session() as session:
            while not self.stop.is_set():
                first = self.sent * _POINTS
                values = range(first, first + _POINTS)
                times = array("q", [self.began + value * 1000 for value in values])
                losses = MetricSeries(names.LOSS, {}, times, array("d", values))
                event = Event(names.RUN_HEARTBEAT.name, times[0], {names.EVENT_SEQUENCE: 2 * self.sent})
                told = Event("training.kept", times[0], {names.EVENT_SEQUENCE: 2 * self.sent + 1})
                bodies = {
                    "metrics": metrics_request(resource, [losses]),
                    "logs": logs_request(resource, [event, told]),
                }
                again = self.dice.randrange(100) < _SENT_AGAIN
                for signal_name, body in [*bodies.items()] * (2 if again else 1):
                    self._deliver(session, f"{self.url}/v1/{signal_name}", body)
                self.sent += 1
                time.sleep(_PAUSE_SECONDS)

    def _deliver(self, session: requests.Session, url: str, body: bytes) -> None:
        while True:
            try:
                reply = session.post(url, body, headers={"Content-Type": "application/x-protobuf"}, timeout=30)
            except requests.RequestException:
                self.unanswered += 1
                time.sleep(0.02)
                continue
            if reply.status_code == 200:
                return
            # Nothing in these requests is wrong: anything but "later" is a defect of the collector.
            assert reply.status_code in {429, 503}, f"{reply.status_code}: {reply.text}"
            time.sleep(0.02)


def kills(database: str, count: int, seed: int = 0, senders: int = 3, longest: float = 0.5) -> Figures:
    """Kill the collector ``count`` times, each at most ``longest`` seconds after it began to answer."""
    dice = random.Random(seed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stop = threading.Event()
    crowd = [
        Sender(f"run-{i}", f"http://127.0.0.1:{port}", random.Random(seed + i), stop) for i in range(senders)
    ]
    failures: list[BaseException] = []

    def send(sender: Sender) -> None:
        try:
            sender.run()
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=send, args=(sender,)) for sender in crowd]
    for thread in threads:
        thread.start()
    done = 0
    try:
        while done < count:
            with collector(database, "--listen", f"127.0.0.1:{port}") as running:
                time.sleep(dice.uniform(0, longest))
                running.process.send_signal(signal.SIGKILL)
                running.process.wait()
            done += 1
            if sys.stderr.isatty():
                print(f"\r{done} of {count} kills", end="", file=sys.stderr, flush=True)
        with collector(database, "--listen", f"127.0.0.1:{port}"):
            stop.set()
            for thread in threads:
                thread.join()
    finally:
        stop.set()
    assert not failures, failures
    lost, twice = _compare(database, crowd)
    acknowledged = sum(sender.sent for sender in crowd) * (_POINTS + 1)
    return Figures(done, acknowledged, sum(sender.unanswered for sender in crowd), lost, twice)


def _compare(database: str, crowd: list[Sender]) -> tuple[int, int]:
    """How many points and events are missing, and how many are there more than once."""
    lost = twice = 0
    engine = db.connect(database)
    try:
        with engine.begin() as connection:
            # What arrived again lies beside its block until the two are merged.
            while compact(connection, time.time_ns() + 3600 * _SECOND, quiet=0).series:
                pass
        with engine.connect() as connection:
            rows = 0
            for table in (schema.frame, schema.block):
                rows += connection.scalar(select(func.coalesce(func.sum(table.c.count), 0))) or 0
            for sender in crowd:
                points = Counter(
                    int(value)
                    for one in read_series(connection, sender.run_id, names.LOSS.name)
                    for value in np.asarray(one.values)
                )
                lost += sum(value not in points for value in range(sender.sent * _POINTS))
                event = schema.event.c
                told = connection.scalars(
                    select(event.sequence).where(event.run_id == sender.run_id, event.name == "training.kept")
                ).all()
                lost += len({2 * i + 1 for i in range(sender.sent)}.difference(told))
                twice += len(told) - len(set(told)) + points.total() - len(points)
                rows -= len(points)
            twice += rows
    finally:
        engine.dispose()
    return lost, twice


def main() -> None:
    """Print the figures; exit with 1 if anything is lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="how often the collector dies")
    parser.add_argument("--db", help="an empty database; a new SQLite file without")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        seen = kills(options.db or f"sqlite:///{folder}/gradwatch.db", options.kills, options.seed)
    print(f"kills                            {seen.kills}, in {time.monotonic() - began:.0f} s")
    print(f"points and events acknowledged   {seen.acknowledged}")
    print(f"requests without an answer       {seen.unanswered}")
    print(f"acknowledged and lost            {seen.lost}")
    print(f"stored twice                     {seen.twice}")
    sys.exit(bool(seen.lost or seen.twice))


if __name__ == "__main__":
    main()
