"""The spool and the delivery before it: nothing is lost but what is damaged, and all else keeps its order."""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from torch import nn

import gradwatch
from gradwatch import conventions as names
from gradwatch.export.delivery import Delivery
from gradwatch.export.exporters import otlp_exporter
from gradwatch.export.otlp import OtlpEncoder
from gradwatch.export.spool import Drained, Lane, Spool, drain, places
from gradwatch.export.spool_records import Request, pack, unpack
from gradwatch.export.transport import REPLY_SECONDS, Away, Outcome, Taken, Transport
from gradwatch.settings import Settings
from gradwatch.telemetry import Event, MetricPoints, Point
from tests.faulty_servers import Behaviour, faulty_server, trickling_body, trickling_head
from tests.otlp_sink import OtlpSink, otlp_sink

ENDPOINT = "http://collector:4318"
RESOURCE = {names.RUN_ID: "run"}
REQUESTS = st.builds(
    Request,
    signal=st.sampled_from(["logs", "metrics"]),
    # Full of what marks a record, but not at its end: the next one's mark could stand in for what is cut out.
    body=st.binary(max_size=300) | st.just(b"gwr1" * 9 + b"."),
    items=st.integers(0, 2**32 - 1),
    gzipped=st.booleans(),
    urgent=st.just(False),
)


def request(number: int, *, urgent: bool = False, size: int = 0, items: int = 1) -> Request:
    return Request("metrics", f"{number}".encode().ljust(size, b"."), items, gzipped=True, urgent=urgent)


def number(one: Request) -> int:
    return int(one.body.rstrip(b"."))


def bodies(lane: Lane) -> list[int]:
    """Numbers of the requests in a lane, taken from it."""
    found = []
    while (head := lane.head()) is not None:
        found.append(number(head))
        lane.pop(head)
    return found


@pytest.fixture
def sink() -> Iterator[OtlpSink]:
    with otlp_sink() as running:
        yield running


# --- Records ---------------------------------------------------------------------------------------------


@given(st.lists(REQUESTS, max_size=6))
def test_requests_come_back_as_they_were(requests: list[Request]) -> None:
    found, lost = unpack(b"".join(map(pack, requests)))
    assert (list(found), lost) == (requests, 0)


def test_a_record_torn_anywhere_loses_itself_only() -> None:
    kept, torn = request(1, size=40), request(2, size=60, items=7)
    whole = pack(kept) + pack(torn)
    header = len(pack(torn)) - len(torn.body)
    for cut in range(len(pack(kept)), len(whole)):
        found, lost = unpack(whole[:cut])
        written = cut - len(pack(kept))
        assert list(found) == [kept]
        assert lost == (0 if written == 0 else 7 if written >= header else 1)


def test_a_byte_altered_anywhere_in_a_record_loses_that_one_only() -> None:
    before, middle, after = request(1, size=30), request(2, size=30, items=7), request(3, size=30)
    segment = b"".join(map(pack, (before, middle, after)))
    begin, end = len(pack(before)), len(pack(before)) + len(pack(middle))
    for at in range(begin, end):
        damaged = bytearray(segment)
        damaged[at] ^= 0x55
        found, lost = unpack(bytes(damaged))
        assert list(found) == [before, after]
        assert lost in {1, 7}


@given(st.lists(REQUESTS, min_size=1, max_size=4), st.data())
def test_whatever_is_cut_out_or_put_in_nothing_else_is_lost(requests: list[Request], data: Any) -> None:
    segment = b"".join(map(pack, requests))
    at = data.draw(st.integers(0, len(segment)))
    until = data.draw(st.integers(at, len(segment)))
    found, _ = unpack(segment[:at] + data.draw(st.binary(max_size=50)) + segment[until:])
    offset, untouched = 0, []
    for one in requests:
        end = offset + len(pack(one))
        if end <= at or offset >= until:
            untouched.append(one)
        offset = end
    rest = iter(found)  # equal requests may be among those that were touched, too
    assert all(one in rest for one in untouched)


# --- On disk ---------------------------------------------------------------------------------------------


def test_the_next_process_finds_everything_in_order_and_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "spool"
    first = Spool([place], ENDPOINT)
    for i in range(50):
        assert first.append(request(i, urgent=i in {20, 40}, size=50_000))
    files = list(place.rglob("*.segment"))
    assert len(files) > 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert {folder.stat().st_mode & 0o777 for folder in (place, files[0].parent)} == {0o700}
    first.close()
    second = Spool([place], ENDPOINT)
    second.adopt()
    second.append(request(99))
    assert bodies(second.adopted_urgent) == [20, 40]
    assert bodies(second.adopted) == [i for i in range(50) if i not in {20, 40}]
    assert bodies(second.normal) == [99]
    assert second.take_lost() == 0
    second.close()
    assert list(place.iterdir()) == []


def test_what_the_same_process_appends_while_it_replays_comes_last(tmp_path: Path) -> None:
    spool = Spool([tmp_path / "spool"], ENDPOINT)
    spool.append(request(0))
    spool.append(request(1))
    head = spool.normal.head()
    assert head is not None
    spool.append(request(2))
    spool.normal.pop(request(7))  # not the oldest: dropped meanwhile
    spool.normal.pop(head)
    rest = spool.normal.head()
    assert rest is not None
    spool.normal.pop(rest)
    assert len(list(tmp_path.rglob("*.segment"))) == 1  # of what is delivered nothing is left to deliver again
    assert bodies(spool.normal) == [2]
    spool.close()


def test_past_the_cap_the_oldest_go_and_are_counted(tmp_path: Path) -> None:
    place = tmp_path / "spool"
    spool = Spool([place], ENDPOINT, most_bytes=10_000)
    spool.append(request(1000, urgent=True))
    for i in range(100):
        spool.append(request(i, size=500, items=3))
        assert sum(file.stat().st_size for file in place.rglob("*.segment")) <= 10_000
    left = bodies(spool.normal)
    assert left == list(range(100 - len(left), 100))
    assert len(left) > 10
    assert spool.take_lost() == 3 * (100 - len(left))
    spool.append(request(200))
    spool.append(request(5, size=10_001, items=9))
    assert spool.take_lost() == 9
    assert bodies(spool.normal) == [200]
    assert bodies(spool.urgent) == [1000]
    spool.close()


def test_what_was_delivered_of_a_segment_is_not_counted_when_the_rest_is_dropped(tmp_path: Path) -> None:
    spool = Spool([tmp_path], ENDPOINT, most_bytes=8_000)
    for i in range(3):
        spool.append(request(i, size=200))
    head = spool.normal.head()
    assert head is not None
    spool.normal.pop(head)
    spool.append(request(3, size=7_500))
    assert bodies(spool.normal) == [3]
    assert spool.take_lost() == 2
    spool.close()


def test_the_cap_holds_for_what_was_adopted_too(tmp_path: Path) -> None:
    for run in range(5):
        spool = Spool([tmp_path / "spool"], ENDPOINT, most_bytes=4_000)
        spool.adopt()
        for i in range(6):
            spool.append(request(10 * run + i, size=500))
        spool.close()
    last = Spool([tmp_path / "spool"], ENDPOINT, most_bytes=4_000)
    last.adopt()
    assert last.size <= 4_000
    left = bodies(last.adopted)
    assert left == sorted(left)
    assert left[-6:] == list(range(40, 46))
    last.close()


def test_of_several_dead_spools_the_oldest_comes_first_and_goes_first(tmp_path: Path) -> None:
    place = tmp_path / "spool"
    place.mkdir(mode=0o755)
    for i in (3, 1, 2):
        dead = Spool([place], ENDPOINT)
        dead.append(request(i, size=500, urgent=True))
        dead.append(request(i, size=500))
        (lock,) = (path / "lock" for path in place.iterdir() if not (path / "aged").exists())
        (lock.parent / "aged").touch()
        os.utime(lock, (i, i))
        dead.close()
    assert place.stat().st_mode & 0o777 == 0o700
    spool = Spool([place], ENDPOINT, most_bytes=2_800)
    spool.adopt()
    assert spool.size <= 2_800
    assert spool.take_lost() == 1
    urgent = spool.adopted_urgent.head()
    assert urgent is not None
    assert urgent.urgent
    assert bodies(spool.adopted_urgent) == [1, 2, 3]
    assert bodies(spool.adopted) == [2, 3]
    spool.close()


def test_adoption_stops_when_it_is_out_of_time_and_goes_on_the_next_time(tmp_path: Path) -> None:
    for i in range(3):
        dead = Spool([tmp_path], ENDPOINT)
        dead.append(request(i))
        dead.close()
    spool = Spool([tmp_path], ENDPOINT)
    found = []
    while not spool.adopt(lambda: True):
        found.append(len(spool.adopted.segments))
        assert len(found) <= 3
    assert found == [1, 2, 3]
    spool.close()


def test_what_was_meant_for_another_collector_is_left_alone_within_a_bound(tmp_path: Path) -> None:
    for i in (0, 1, 4, 3, 2):
        other = Spool([tmp_path / "spool"], f"http://other-{i}")
        other.append(request(i, size=1000, items=10))
        (folder,) = {path.parent for path in tmp_path.rglob("*.segment") if path.stat().st_mtime > 1000}
        other.close()
        for path in (*folder.iterdir(), folder):
            os.utime(path, (i, i))
    spool = Spool([tmp_path / "spool"], ENDPOINT, most_bytes=3500)
    spool.adopt()
    assert spool.adopted.head() is None
    left = sorted(unpack(file.read_bytes())[0][0] for file in (tmp_path / "spool").rglob("*.segment"))
    assert [number(one) for one in left] == [2, 3, 4]
    assert spool.take_lost() == 20
    spool.close()


def test_damage_on_disk_is_counted_by_items(tmp_path: Path) -> None:
    place = tmp_path / "spool"
    spool = Spool([place], ENDPOINT)
    for i in range(3):
        spool.append(request(i, items=5, size=9))
    (file,) = place.rglob("*.segment")
    file.write_bytes(file.read_bytes().replace(b"1........", b"1...x...."))
    assert bodies(spool.normal) == [0, 2]
    assert spool.take_lost() == 5
    spool.append(request(3, items=7))
    (file,) = place.rglob("*.segment")
    file.write_bytes(b"")
    assert bodies(spool.normal) == []
    assert spool.take_lost() == 7
    spool.close()


def test_a_spool_that_is_removed_loses_what_was_in_it_and_goes_on(tmp_path: Path) -> None:
    import shutil

    place = tmp_path / "spool"
    spool = Spool([place], ENDPOINT)
    spool.append(request(0, items=4))
    shutil.rmtree(place)
    assert spool.append(request(1))
    assert bodies(spool.normal) == [1]
    assert spool.take_lost() == 4
    spool.close()


def test_an_unusable_place_is_said_once_and_the_next_one_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    spool = Spool([tmp_path / "file" / "spool", tmp_path / "other"], ENDPOINT)
    assert all(spool.append(request(i)) for i in range(3))
    assert bodies(spool.normal) == [0, 1, 2]
    assert caplog.text.count("cannot keep undelivered telemetry") == 1
    nowhere = Spool([tmp_path / "file" / "spool"], ENDPOINT)
    assert not any(nowhere.append(request(i)) for i in range(3))
    nowhere.adopt()
    assert caplog.text.count("nothing but memory") == 1
    spool.close()
    nowhere.close()


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """No file may grow beyond this; a write is cut short there, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing_that_was_written(tmp_path: Path) -> None:
    spool = Spool([tmp_path / "spool"], ENDPOINT)
    with full_disk(1000):
        assert spool.append(request(0, size=600))
        assert not spool.append(request(1, size=2000))
    assert spool.append(request(2, size=2000))
    spool.close()
    spool = Spool([tmp_path / "spool"], ENDPOINT)
    spool.adopt()
    assert bodies(spool.adopted) == [0, 2]
    assert spool.take_lost() == 0
    spool.close()


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "spool").symlink_to(tmp_path / "real")
    spool = Spool([tmp_path / "spool"], ENDPOINT)
    assert not spool.append(request(0))
    spool.close()
    assert list((tmp_path / "real").iterdir()) == []


# --- Several processes -----------------------------------------------------------------------------------

ADOPT = """
import sys
from pathlib import Path
sys.modules["torch"] = None
from gradwatch.export.spool import Spool
spool = Spool([Path(sys.argv[1])], sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
spool.adopt()
while (head := spool.adopted.head()) is not None:
    print(int(head.body), flush=True)
    spool.adopted.pop(head)
spool.close()
"""


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def test_each_dead_spool_is_adopted_by_exactly_one_process_and_a_live_one_by_none(tmp_path: Path) -> None:
    live = Spool([tmp_path], ENDPOINT)
    live.append(request(999))
    for i in range(40):
        dead = Spool([tmp_path], ENDPOINT)
        dead.append(request(i))
        dead.close()
    adopters = [python(ADOPT, str(tmp_path), ENDPOINT) for _ in range(4)]
    for adopter in adopters:
        assert adopter.stdout is not None
        assert adopter.stdout.readline() == "ready\n"
    for adopter in adopters:
        assert adopter.stdin is not None
        adopter.stdin.write("go\n")
        adopter.stdin.flush()
    found = [int(line) for adopter in adopters for line in adopter.communicate(timeout=60)[0].split()]
    assert sorted(found) == list(range(40))
    assert [adopter.returncode for adopter in adopters] == [0] * 4
    assert bodies(live.normal) == [999]
    live.close()
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_does_not_keep_its_dead_parents_spool(tmp_path: Path) -> None:
    spool = Spool([tmp_path], ENDPOINT)
    spool.append(request(1))
    reader, writer = os.pipe()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        spool.forget_in_child()
        os.write(tell, b".")
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    os.read(ready, 1)
    os.close(ready)
    os.close(tell)
    for folder in spool._folders.values():
        os.close(folder._lock)  # as the kernel does when the parent dies
    heir = Spool([tmp_path], ENDPOINT)
    heir.adopt()
    assert bodies(heir.adopted) == [1]
    heir.close()
    os.close(writer)
    os.waitpid(child, 0)


def test_draining_delivers_the_very_same_bytes_without_torch(sink: OtlpSink, tmp_path: Path) -> None:
    encoder = OtlpEncoder(lambda: None)
    sent = [
        encoder.metrics(RESOURCE, [MetricPoints(names.LOSS, [Point(1, 0.5, {})])]),
        encoder.events(RESOURCE, [Event(names.RUN_ENDED.name, 2, {})], urgent=True),
    ]
    spool = Spool(places(tmp_path), sink.endpoint)
    assert all(map(spool.append, sent))
    spool.close()
    code = """
    import sys
    from pathlib import Path
    sys.modules["torch"] = None
    from gradwatch.export.spool import drain
    print(*drain(Path(sys.argv[1]), sys.argv[2], {}, 10.0))
    """
    drained, _ = python(code, str(tmp_path), sink.endpoint).communicate(timeout=60)
    assert drained.split() == ["2", "0", "0"]
    assert sink.requests == [("/v1/logs", sent[1].body), ("/v1/metrics", sent[0].body)]


def test_draining_keeps_what_is_not_taken(sink: OtlpSink, tmp_path: Path) -> None:
    spool = Spool(places(tmp_path), sink.endpoint)
    spool.append(OtlpEncoder(lambda: None).events(RESOURCE, [Event("a", 1, {})], urgent=False))
    size = spool.size
    spool.close()
    sink.status = 503
    assert drain(tmp_path, sink.endpoint, {}, 10.0) == Drained(0, 0, size)
    sink.status = 200
    assert drain(tmp_path, sink.endpoint, {}, 10.0) == Drained(1, 0, 0)
    assert sink.names() == ["a"]


def test_draining_keeps_to_the_bound_it_is_given_and_counts_what_is_past_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tempfile.tempdir", str(tmp_path)
    )  # what others left on this host is not for this bound
    spool = Spool([tmp_path / "spool"], ENDPOINT)
    for i in range(4):
        spool.append(request(i, size=1000, items=10))
        spool.normal.stop_writing()  # the next in a segment of its own
    spool.close()
    assert drain(tmp_path, ENDPOINT, {}, 0.0, most_bytes=10_000).lost == 0
    assert drain(tmp_path, ENDPOINT, {}, 0.0, most_bytes=2500).lost == 20


def test_draining_begins_with_endings_counts_what_is_refused_and_keeps_to_its_time(
    sink: OtlpSink, tmp_path: Path
) -> None:
    spool = Spool([tmp_path / "spool"], sink.endpoint)
    for name in ("a", names.RUN_ENDED.name):
        one = OtlpEncoder(lambda: None).events(RESOURCE, [event(name)], urgent=name != "a")
        spool.append(one)
    size = spool.size
    spool.close()
    assert drain(tmp_path, sink.endpoint, {}, 0.0) == Drained(0, 0, size)
    assert not sink.requests
    sink.refuses = lambda body: b"called" in body and b"run.ended" not in body
    delivered, lost, left = drain(tmp_path, sink.endpoint, {}, 10.0)
    assert (delivered, lost, left) == (2, 1, 0)
    assert sink.names() == [names.RUN_ENDED.name]


# --- Delivery --------------------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Scripted:
    """Answers with what is next in ``outcomes``, then takes everything."""

    def __init__(self, *outcomes: Outcome, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.outcomes = list(outcomes)
        self.meanwhile = meanwhile
        self.tried: list[Request] = []
        self.taken: list[Request] = []
        self.patience: list[float] = []
        self.closed = 0

    def send(self, request: Request, seconds: float) -> Outcome:
        self.tried.append(request)
        self.patience.append(seconds)
        self.meanwhile()
        outcome = self.outcomes.pop(0) if self.outcomes else Taken()
        if isinstance(outcome, Taken):
            self.taken.append(request)
        return outcome

    def close(self) -> None:
        self.closed += 1


class Named:
    """Encodes events by their names, so that a test can read them."""

    def events(self, resource: Any, events: Any, *, urgent: bool) -> Request:
        text = ",".join(str(event.attributes["called"]) for event in events)
        return Request("logs", text.encode(), len(events), gzipped=True, urgent=urgent)

    def metrics(self, resource: Any, metrics: Any) -> Request:
        return Request("metrics", str(metrics).encode(), 1, gzipped=True)


def event(name: str, **attributes: Any) -> Event:
    return Event(name, 1, {"called": name, **attributes})


ENDED = event(names.RUN_ENDED.name, called="ended")
FIRST_NAN = event(names.NONFINITE_STEP.name, called="first", **{names.NONFINITE_STEPS: 1})
SECOND_NAN = event(names.NONFINITE_STEP.name, called="second", **{names.NONFINITE_STEPS: 2})


@pytest.mark.parametrize("on_disk", [True, False])
def test_an_ending_and_the_first_nan_overtake_what_waits(tmp_path: Path, on_disk: bool) -> None:
    clock, sender = Clock(), Scripted(*[Away("down")] * 8)
    spool = Spool([tmp_path], ENDPOINT) if on_disk else None
    delivery = Delivery(Named(), sender, spool, ENDPOINT, clock)
    for batch in ([event("a"), event("b")], [FIRST_NAN, event("c")], [SECOND_NAN], [event("d"), ENDED]):
        delivery.send_events({}, batch)
        delivery.send_metrics({}, f"{batch[0].attributes['called']} points")  # type: ignore[arg-type]
        assert delivery.deliver(1.0) > 0
        clock.now += 100
    sender.outcomes.clear()
    assert delivery.deliver(1.0) == float("inf")
    assert [one.body.decode() for one in sender.taken] == [
        "first", "ended", "a,b", "a points", "c", "first points", "second", "second points", "d", "d points",
    ]  # fmt: skip
    delivery.close()


def test_endings_of_anybody_come_first_and_ones_own_hour_before_that_of_the_dead(tmp_path: Path) -> None:
    dead = Spool([tmp_path], ENDPOINT)
    dead.append(request(3, urgent=True))
    dead.append(request(6))
    dead.close()
    clock, sender = Clock(), Scripted(Away("down"))
    delivery = Delivery(Named(), sender, Spool([tmp_path], ENDPOINT), ENDPOINT, clock)
    delivery._put(request(1, urgent=True))
    delivery._put(request(4))
    delivery.deliver(1.0)
    delivery._put(request(2, urgent=True))
    delivery._put(request(5))
    clock.now += 100
    assert delivery.deliver(1.0) == float("inf")
    assert [number(one) for one in sender.taken] == [1, 2, 3, 4, 5, 6]
    delivery.close()
    delivery.close()
    assert sender.closed == 1


def test_last_words_and_the_export_thread_send_nothing_twice() -> None:
    inner: list[Callable[[float], object]] = []
    sender = Scripted(meanwhile=lambda: inner and inner.pop()(1.0))
    delivery = Delivery(Named(), sender, None, ENDPOINT)
    for outer, meanwhile in (
        (delivery.send_last_words, delivery.deliver),
        (delivery.deliver, delivery.send_last_words),
    ):
        delivery.send_events({}, [ENDED])
        inner.append(meanwhile)
        outer(1.0)
        assert [one.body for one in sender.tried] == [b"ended"]
        sender.tried.clear()


def test_last_words_wait_for_nobody() -> None:
    clock, sender = Clock(), Scripted(Away("down", 40.0))
    delivery = Delivery(Named(), sender, None, ENDPOINT, clock)
    delivery.send_events({}, [ENDED])
    delivery.send_last_words(0.0)
    assert not sender.tried
    for _ in range(2):
        delivery.send_last_words(1.0)
    assert sender.patience == [1.0]  # then the collector asked for a pause


def test_delivery_keeps_to_its_time() -> None:
    clock = Clock()

    def pass_a_second() -> None:
        clock.now += 1.0

    sender = Scripted(meanwhile=pass_a_second)
    delivery = Delivery(Named(), sender, None, ENDPOINT, clock)
    for i in range(9):
        delivery._put(request(i))
    delivery.deliver(1.5)
    delivery.deliver(1.5, at_once=True)
    assert [number(one) for one in sender.taken] == [0, 1, 2, 3]
    assert sender.patience == [REPLY_SECONDS, REPLY_SECONDS, 1.5, 0.5]


def test_a_request_that_cannot_be_sent_is_counted_and_does_not_hold_up_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GRADWATCH_TESTING")
    faults = [ValueError("odd")]

    def fail_once() -> None:
        if faults:
            raise faults.pop()

    sender = Scripted(meanwhile=fail_once)
    delivery = Delivery(Named(), sender, None, ENDPOINT)
    delivery._put(request(0, items=3))
    delivery._put(request(1))
    assert delivery.deliver(1.0) == float("inf")
    assert [number(one) for one in sender.taken] == [1]
    assert (delivery.take_lost(), delivery.take_lost()) == (3, 0)


def test_after_a_delivery_nothing_is_left_of_the_pauses_before(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    sender = Scripted(Away("down"), Away("down"), Taken(), Taken(), Away("down"))
    delivery = Delivery(Named(), sender, None, ENDPOINT, clock, lambda: 0.0)
    delivery._put(request(0))
    assert delivery.deliver(1.0) == 0.5
    clock.now += 0.5
    assert delivery.deliver(1.0) == 1.0
    assert delivery.deliver(1.0, at_once=True) == float("inf")
    delivery._put(request(1))
    assert delivery.deliver(1.0) == float("inf")
    delivery._put(request(2))
    assert delivery.deliver(1.0) == 0.5
    assert caplog.text.count("cannot deliver telemetry") == 1


def test_a_pause_that_is_asked_for_lengthens_ones_own_and_differs_by_rank() -> None:
    for asked, chance, expected in ((40.0, 1.0, 44.0), (0.1, 1.0, 1.0)):
        delivery = Delivery(
            Named(), Scripted(Away("busy", asked)), None, ENDPOINT, Clock(), lambda chance=chance: chance
        )
        delivery._put(request(0))
        assert delivery.deliver(1.0) == expected


def test_what_does_not_fit_in_memory_goes_to_disk_and_so_does_what_is_left_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradwatch.export.delivery._MEMORY_BYTES", 100)
    spool = Spool([tmp_path], ENDPOINT, most_bytes=5_000)
    delivery = Delivery(Named(), Scripted(), spool, ENDPOINT)
    for i in range(9):
        delivery._put(request(i, size=20))
    delivery._put(request(9, size=6_000, items=4))
    assert delivery.take_lost() == 4
    delivery.close()
    after = Spool([tmp_path], ENDPOINT)
    after.adopt()
    assert bodies(after.adopted) == list(range(9))
    after.close()


def test_what_was_delivered_takes_no_room_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradwatch.export.delivery._MEMORY_BYTES", 100)
    sender = Scripted()
    delivery = Delivery(Named(), sender, None, ENDPOINT)
    for i in range(30):
        delivery._put(request(i, size=20))
        delivery.deliver(1.0)
    assert [number(one) for one in sender.taken] == list(range(30))
    assert delivery.take_lost() == 0


def test_after_a_fork_the_childs_copy_sends_and_keeps_nothing(tmp_path: Path) -> None:
    sender = Scripted()
    delivery = Delivery(Named(), sender, Spool([tmp_path], ENDPOINT), ENDPOINT)
    delivery._put(request(0))
    delivery.forget_in_child()
    delivery.deliver(1.0)
    delivery.keep()
    assert not sender.tried
    assert not list(tmp_path.rglob("*.segment"))


def test_a_short_run_is_told_in_order() -> None:
    sender = Scripted()
    delivery = Delivery(Named(), sender, None, ENDPOINT)
    delivery.send_events({}, [event("started"), ENDED])
    delivery.deliver(1.0)
    assert [one.body for one in sender.taken] == [b"started,ended"]


def test_pauses_grow_and_differ_and_stay_below_what_makes_a_run_lost() -> None:
    clock = Clock()
    pauses = []
    for chance in (0.0, 1.0):
        delivery = Delivery(Named(), Scripted(*[Away("down")] * 9), None, ENDPOINT, clock, lambda c=chance: c)
        delivery.send_events({}, [event("a")])
        for _ in range(9):
            pauses.append(delivery.deliver(1.0))
            assert delivery.deliver(1.0) == pauses[-1]  # nothing is tried meanwhile
            clock.now += pauses[-1]
    assert pauses[:9] == [0.5, 1.0, 2.0, 4.0, 7.5, 7.5, 7.5, 7.5, 7.5]
    assert pauses[9:] == [2 * pause for pause in pauses[:9]]


def test_the_generator_that_training_draws_from_is_not_ours() -> None:
    import random

    random.seed(1)
    state = random.getstate()
    delivery = Delivery(Named(), Scripted(Away("down")), None, ENDPOINT)
    delivery.send_events({}, [event("a")])
    delivery.deliver(1.0)
    assert random.getstate() == state


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("form", ["seconds", "date", "date without a clock"])
def test_a_collector_that_asks_for_a_pause_gets_it(sink: OtlpSink, status: int, form: str) -> None:
    wall = 1_700_000_000
    sink.status = status
    sink.headers = {"Retry-After": "40" if form == "seconds" else formatdate(wall + 40, usegmt=True)}
    if form == "date":
        sink.headers["Date"] = formatdate(wall, usegmt=True)
    clock = Clock()
    transport = Transport(sink.endpoint, {}, wall=lambda: wall if form == "date without a clock" else 0)
    delivery = Delivery(OtlpEncoder(lambda: None), transport, None, sink.endpoint, clock, lambda: 0.0)
    delivery.send_events(RESOURCE, [event("a")])
    assert delivery.deliver(1.0) == 40
    sink.status = 200
    for waited in (20, 19):
        clock.now += waited
        assert delivery.deliver(1.0, at_once=True) > 0
        assert len(sink.requests) == 1
    clock.now += 1
    assert delivery.deliver(1.0) == float("inf")
    assert sink.names() == ["a"]
    delivery.close()


@pytest.mark.parametrize(("asked", "seconds"), [("90000", 3600.0), ("Mon, 02 Jan 2023 00:00:00 GMT", 0.0)])
def test_a_pause_is_no_longer_than_an_hour_and_none_in_the_past(
    sink: OtlpSink, asked: str, seconds: float
) -> None:
    sink.status, sink.headers = 503, {"Retry-After": asked}
    transport = Transport(sink.endpoint, {})
    outcome = transport.send(OtlpEncoder(lambda: None).events({}, [event("a")], urgent=False))
    assert outcome == Away("HTTP 503", seconds)
    transport.close()


@pytest.mark.parametrize("nonsense", ["soon", "-5", "1e999", "Mon, 99 Foo 2023"])
def test_a_pause_that_makes_no_sense_is_not_kept(sink: OtlpSink, nonsense: str) -> None:
    sink.status, sink.headers = 503, {"Retry-After": nonsense}
    transport = Transport(sink.endpoint, {})
    outcome = transport.send(OtlpEncoder(lambda: None).events({}, [event("a")], urgent=False))
    assert outcome == Away("HTTP 503", None)
    transport.close()


@pytest.mark.parametrize("signal", ["logs", "metrics"])
def test_a_partial_success_is_counted_and_said(
    sink: OtlpSink, signal: str, caplog: pytest.LogCaptureFixture
) -> None:
    reply: Any = ExportLogsServiceResponse() if signal == "logs" else ExportMetricsServiceResponse()
    if signal == "logs":
        reply.partial_success.rejected_log_records = 2
    else:
        reply.partial_success.rejected_data_points = 2
    reply.partial_success.error_message = "too old"
    sink.reply, sink.headers = reply.SerializeToString(), {"Content-Type": "application/x-protobuf"}
    delivery = Delivery(OtlpEncoder(lambda: None), Transport(sink.endpoint, {}), None, sink.endpoint)
    for _ in range(3):
        if signal == "logs":
            delivery.send_events(RESOURCE, [event("a"), event("b"), event("c")])
        else:
            delivery.send_metrics(RESOURCE, [MetricPoints(names.LOSS, [Point(1, 0.5, {})] * 3)])
        assert delivery.deliver(1.0) == float("inf")
    assert len(sink.requests) == 3
    assert delivery.take_lost() == 6
    assert caplog.text.count("too old") == 1
    delivery.close()


@pytest.mark.parametrize("case", ["no protobuf", "broken", "negative", "endless"])
def test_an_answer_that_makes_no_sense_is_a_yes(sink: OtlpSink, case: str) -> None:
    refusal = ExportLogsServiceResponse()
    refusal.partial_success.rejected_log_records = -3 if case == "negative" else 3
    endless = b"\x0a" + b"\xff" * 2_000_000
    sink.reply = {"broken": b"\xff\xff", "endless": endless}.get(case, refusal.SerializeToString())
    sink.headers = {"Content-Type": "application/json" if case == "no protobuf" else "application/x-protobuf"}
    transport = Transport(sink.endpoint, {})
    assert transport.send(OtlpEncoder(lambda: None).events({}, [event("a")], urgent=False)) == Taken()
    transport.close()


@pytest.mark.parametrize("trickling", [trickling_head, trickling_body])
def test_an_answer_that_trickles_in_holds_nobody_longer_than_the_time_out(
    trickling: Callable[[int], Behaviour],
) -> None:
    with faulty_server(trickling(25)) as endpoint:
        transport = Transport(endpoint, {})
        sent = OtlpEncoder(lambda: None).events({}, [event("a")], urgent=False)
        assert isinstance(transport.send(sent, 0.5), Away)  # five seconds in all
        assert transport.send(sent, 60.0) == Taken()
        transport.close()


def test_a_request_goes_nowhere_but_where_it_was_sent(sink: OtlpSink) -> None:
    with otlp_sink() as other:
        sink.status, sink.headers = 307, {"Location": f"{other.endpoint}/v1/logs"}
        transport = Transport(sink.endpoint, {})
        outcome = transport.send(OtlpEncoder(lambda: None).events({}, [event("a")], urgent=False))
        assert outcome == Away("HTTP 307", None)
        assert not other.requests
        transport.close()


def test_what_netrc_says_does_not_replace_the_configured_header(
    sink: OtlpSink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password other\n")
    monkeypatch.setenv("NETRC", str(netrc))
    transport = Transport(sink.endpoint, {"Authorization": "Bearer mine"})
    transport.send(OtlpEncoder(lambda: None).events({}, [event("a")], urgent=False))
    transport.close()
    assert sink.authorizations == {"Bearer mine"}


def test_a_warning_does_not_print_the_password_in_an_endpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings.resolve({"endpoint": "http://user:s3cret@127.0.0.1:1", "directory": tmp_path}, {}, "a")
    exporter = otlp_exporter(settings, lambda: None)
    exporter.send_events({}, [event("a")])
    exporter.deliver(1.0)
    exporter.close()
    assert "cannot deliver" in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("status", [400, 404, 413])
def test_what_is_refused_for_good_is_dropped_and_counted(sink: OtlpSink, status: int, tmp_path: Path) -> None:
    sink.status = status
    spool = Spool([tmp_path], sink.endpoint)
    delivery = Delivery(OtlpEncoder(lambda: None), Transport(sink.endpoint, {}), spool, sink.endpoint)
    delivery.send_metrics(RESOURCE, [MetricPoints(names.LOSS, [Point(1, 0.5, {})] * 3)])
    assert delivery.deliver(1.0) == float("inf")
    assert delivery.take_lost() == 3
    delivery.close()
    assert list(tmp_path.iterdir()) == []


def test_an_event_that_is_refused_does_not_take_the_ending_with_it(sink: OtlpSink) -> None:
    sink.refuses = lambda body: b"poison" in body
    delivery = Delivery(OtlpEncoder(lambda: None), Transport(sink.endpoint, {}), None, sink.endpoint)
    delivery.send_events(RESOURCE, [event("started"), event("poison"), ENDED])
    assert delivery.deliver(1.0) == float("inf")
    assert sink.names() == ["started", names.RUN_ENDED.name]
    assert sink.events[0].resource == RESOURCE
    assert delivery.take_lost() == 1
    delivery.close()


@pytest.mark.parametrize("status", [302, 401, 403, 408, 429, 500, 503])
def test_what_may_be_mended_is_tried_again(sink: OtlpSink, status: int) -> None:
    sink.status, sink.headers = status, {"Location": sink.endpoint}
    clock = Clock()
    delivery = Delivery(OtlpEncoder(lambda: None), Transport(sink.endpoint, {}), None, sink.endpoint, clock)
    delivery.send_events(RESOURCE, [event("a")])
    clock.now += delivery.deliver(1.0)
    sink.status = 200
    delivery.deliver(1.0)
    assert sink.names() == ["a"]
    assert delivery.take_lost() == 0
    delivery.close()


def test_memory_is_bounded_where_there_is_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradwatch.export.delivery._MEMORY_BYTES", 100)
    clock, sender = Clock(), Scripted(Away("down"))
    delivery = Delivery(Named(), sender, None, ENDPOINT, clock)
    delivery.send_events({}, [ENDED])
    for i in range(50):
        delivery.send_metrics({}, f"{i:010d}")  # type: ignore[arg-type]
        delivery.deliver(1.0)
    assert delivery.take_lost() == 41
    clock.now += 100
    delivery.deliver(1.0)
    assert [one.body for one in sender.taken] == [b"ended", *(f"{i:010d}".encode() for i in range(41, 50))]


def test_a_full_disk_loses_the_order_of_nothing(tmp_path: Path) -> None:
    clock, sender = Clock(), Scripted(Away("down"))
    delivery = Delivery(Named(), sender, Spool([tmp_path], ENDPOINT), ENDPOINT, clock)
    for i in range(9):
        delivery.send_metrics({}, f"{i}" * 100)  # type: ignore[arg-type]
        with full_disk(500 if i in {4, 5, 6} else resource.RLIM_INFINITY):
            delivery.deliver(1.0)
    clock.now += 100
    assert delivery.deliver(1.0) == float("inf")
    assert [one.body[:1] for one in sender.taken] == [f"{i}".encode() for i in range(9)]
    assert delivery.take_lost() == 0
    delivery.close()


def test_nothing_is_written_while_the_collector_is_there(tmp_path: Path, sink: OtlpSink) -> None:
    spool = Spool([tmp_path / "spool"], sink.endpoint)
    delivery = Delivery(OtlpEncoder(lambda: None), Transport(sink.endpoint, {}), spool, sink.endpoint)
    for _ in range(3):
        delivery.send_events(RESOURCE, [event("a")])
        delivery.deliver(1.0)
    delivery.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_compressed_is_on_disk(tmp_path: Path) -> None:
    spool = Spool([tmp_path], ENDPOINT)
    delivery = Delivery(Named(), Scripted(), spool, ENDPOINT)
    delivery._put(Request("metrics", b"a" * 10_000, 1, gzipped=False))
    delivery.keep()
    head = spool.normal.head()
    assert head is not None
    assert head.gzipped
    assert zlib.decompress(head.body, wbits=31) == b"a" * 10_000
    delivery.close()


# --- A run -----------------------------------------------------------------------------------------------


def train(steps: int, **settings: Any) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, every=1, export_interval=0.02, **settings):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()


def test_a_run_that_nobody_heard_is_told_by_the_next_one(sink: OtlpSink, tmp_path: Path) -> None:
    sink.status = 503
    train(30, endpoint=sink.endpoint, run_id="unheard", directory=tmp_path)
    assert list((tmp_path / "spool").rglob("*.segment"))
    sink.status = 200
    train(3, endpoint=sink.endpoint, run_id="heard", directory=tmp_path)
    told = {
        run: [e.name for e in sink.events if e.resource[names.RUN_ID] == run] for run in ("unheard", "heard")
    }
    started, ended = names.RUN_STARTED.name, names.RUN_ENDED.name
    assert sorted(told["unheard"]) == sorted([started, ended])
    assert sorted(told["heard"]) == sorted([started, ended])  # an ending goes ahead of what waits
    assert sorted(sink.values(names.STEP_INDEX.name)) == sorted([*range(3), *range(30)])
    assert list((tmp_path / "spool").iterdir()) == []


def test_without_any_disk_a_run_is_the_same_and_delivers_at_its_end(
    sink: OtlpSink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # imports what makes temporary folders
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "gone").write_text("in the way too")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    sink.status = 503
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("gradwatch.export.delivery._FIRST_PAUSE", 0.01)
    settings: dict[str, Any] = {
        "endpoint": sink.endpoint,
        "directory": tmp_path / "file",
        "export_interval": 0.02,
    }
    with gradwatch.watch(model, optimizer, every=1, **settings) as watch:
        for _ in range(20):
            optimizer.zero_grad()
            model(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()
        watch._run._thread.flush(5.0)  # type: ignore[union-attr]
        sink.status = 200
    assert sink.values(names.STEP_INDEX.name) == list(range(20))
    assert names.RUN_ENDED.name in sink.names()
    assert caplog.text.count("cannot keep undelivered telemetry") == 2
