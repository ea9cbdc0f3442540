"""Senders that post OTLP requests, each until it is acknowledged, and what is stored of what they sent."""

from __future__ import annotations

import random
import threading
import time
from array import array
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import requests
from sqlalchemy import Connection, func, select

from gradwatch import conventions as names
from gradwatch.export.otlp_encoding import encoded_resource, logs_request, metrics_request
from gradwatch.telemetry import Event, MetricSeries
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.compaction import compact
from gradwatch_collector.storage.reading import read_series
from tests.collector_process import eventually

# Points in a request.
POINTS = 8
# Of a hundred requests that were acknowledged, so many are sent again, as by a client that missed the answer.
_SENT_AGAIN = 10
_PAUSE_SECONDS = 0.002
_SECOND = 1_000_000_000
# What a collector says to requests that nothing is wrong with, and what a proxy says where none answers.
LATER = frozenset({429, 503})
LATER_BEHIND_A_PROXY = LATER | {502, 504}


@dataclass
class Sender:
    """One training process, as the collector sees it: losses 0, 1, 2, ... and an event with each request."""

    run_id: str
    url: str
    dice: random.Random
    stop: threading.Event
    later: Collection[int] = LATER
    began: int = field(default_factory=time.time_ns)
    sent: int = 0
    unanswered: int = 0
    put_off: Counter[int] = field(default_factory=Counter)

    def run(self) -> None:
        """Send until told to stop; every request until it is acknowledged."""
        resource = encoded_resource({names.SERVICE_NAME: "crowd", names.RUN_ID: self.run_id, names.RANK: 0})
        with requests.Session() as session:
            while not self.stop.is_set():
                first = self.sent * POINTS
                values = range(first, first + POINTS)
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
                reply = session.post(url, body, headers={"Content-Type": "application/x-protobuf"}, timeout=60)
            except requests.RequestException:
                self.unanswered += 1
                time.sleep(0.02)
                continue
            if reply.status_code == 200:
                return
            # Nothing in these requests is wrong: anything but "later" is a defect.
            assert reply.status_code in self.later, f"{reply.status_code}: {reply.text}"
            self.put_off[reply.status_code] += 1
            time.sleep(0.02)


class Crowd:
    """Senders on threads of their own, each to one of the addresses."""

    def __init__(self, *urls: str, count: int = 3, seed: int = 0, later: Collection[int] = LATER) -> None:
        self._stop = threading.Event()
        self.senders = [
            Sender(f"run-{i}", urls[i % len(urls)], random.Random(seed + i), self._stop, later)
            for i in range(count)
        ]
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._send, args=(sender,)) for sender in self.senders]
        for thread in self._threads:
            thread.start()

    def _send(self, sender: Sender) -> None:
        try:
            sender.run()
        except BaseException as error:
            self._failures.append(error)
            raise

    @property
    def sent(self) -> dict[str, int]:
        """How many requests of each run are acknowledged by now."""
        return {sender.run_id: sender.sent for sender in self.senders}

    @property
    def acknowledged(self) -> int:
        """Points and events that are acknowledged by now."""
        return sum(self.sent.values()) * (POINTS + 1)

    @property
    def unanswered(self) -> int:
        return sum(sender.unanswered for sender in self.senders)

    @property
    def put_off(self) -> int:
        """Requests that were answered, and told to come again."""
        return sum(sender.put_off.total() for sender in self.senders)

    def await_more(self, more: int) -> None:
        """Wait until everyone has had that many more requests acknowledged."""
        before = self.sent
        eventually(
            lambda: all(sent >= before[run] + more for run, sent in self.sent.items()), "everyone to be heard"
        )

    def give_up(self) -> None:
        """Let everyone stop, whatever they are at."""
        self._stop.set()

    def finish(self) -> None:
        """Let everyone have the request that is under way acknowledged, and stop."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert not self._failures, self._failures


def lost(connection: Connection, sent: dict[str, int]) -> int:
    """How many of the points and events of that many requests of each run are missing."""
    missing = 0
    for run_id, requests_sent in sent.items():
        points = stored_points(connection, run_id)
        missing += sum(value not in points for value in range(requests_sent * POINTS))
        missing += len({2 * i + 1 for i in range(requests_sent)}.difference(_events(connection, run_id)))
    return missing


def lost_and_twice(database: str, sent: dict[str, int]) -> tuple[int, int]:
    """How many points and events are missing, and how many are there more than once."""
    twice = 0
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
            for run_id in sent:
                points, told = stored_points(connection, run_id), _events(connection, run_id)
                twice += len(told) - len(set(told)) + points.total() - len(points)
                rows -= len(points)
            return lost(connection, sent), twice + rows
    finally:
        engine.dispose()


def stored_points(connection: Connection, run_id: str) -> Counter[int]:
    """The losses of a run, and how often each is stored."""
    return Counter(
        int(value)
        for one in read_series(connection, run_id, names.LOSS.name)
        for value in np.asarray(one.values)
    )


def _events(connection: Connection, run_id: str) -> list[int]:
    event = schema.event.c
    return list(
        connection.scalars(select(event.sequence).where(event.run_id == run_id, event.name == "training.kept"))
    )
