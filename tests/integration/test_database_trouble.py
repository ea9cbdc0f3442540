"""A database that is full, gone or hangs: senders are put off, and what was acknowledged is there."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from gradwatch import conventions as names
from gradwatch.export.otlp_encoding import encoded_resource, logs_request
from gradwatch.telemetry import Event
from gradwatch_collector.storage import database as db
from tests.collector_process import Collector, collector, eventually
from tests.crowd import Crowd, lost_and_twice
from tests.postgresql import own_server

HEADERS = {"Content-Type": "application/x-protobuf"}
BODY = logs_request(
    encoded_resource({names.SERVICE_NAME: "probe", names.RUN_ID: "probe"}),
    [Event(names.RUN_STARTED.name, 1, {names.EVENT_SEQUENCE: 1})],
)


def post(url: str) -> requests.Response:
    return requests.post(f"{url}/v1/logs", BODY, headers=HEADERS, timeout=60)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)


def assert_put_off(reply: requests.Response) -> None:
    assert reply.status_code == 503
    assert int(reply.headers["Retry-After"]) > 0


def test_a_full_disk_puts_senders_off_until_there_is_room(small_disk: Path) -> None:
    database = f"sqlite:///{small_disk}/gradwatch.db"
    with collector(database) as running:
        crowd = Crowd(running.url)
        try:
            crowd.await_more(5)
            fill(small_disk / "ballast")
            eventually(lambda: crowd.put_off > 10, "requests to be put off")
            assert_put_off(post(running.url))
            assert running.get("/healthz").status_code == 200
            (small_disk / "ballast").unlink()
            crowd.await_more(5)
            crowd.finish()
        finally:
            crowd.give_up()
        assert running.process.poll() is None
    assert lost_and_twice(database, crowd.sent) == (0, 0)


def test_a_database_that_is_restarted_is_found_again() -> None:
    with own_server() as server:
        url = server.get_uri()
        engine = db.connect(url)
        db.upgrade(engine)
        engine.dispose()
        with collector(url) as running:
            crowd = Crowd(running.url)
            try:
                crowd.await_more(5)
                server.stop()
                eventually(lambda: crowd.put_off > 3, "requests to be put off")
                assert_put_off(post(running.url))
                reply = running.get("/api/v1/runs")
                assert (reply.status_code, reply.headers["Retry-After"]) == (503, "5")
                assert running.get("/healthz").status_code == 200
                server.ensure_postgres_running()
                crowd.await_more(5)
                crowd.finish()
            finally:
                crowd.give_up()
            assert running.process.poll() is None
        assert lost_and_twice(url, crowd.sent) == (0, 0)


def test_an_orderly_end_answers_what_is_under_way_and_loses_nothing(database_url: str) -> None:
    with collector(database_url) as running:
        crowd = Crowd(running.url, count=6)
        try:
            crowd.await_more(20)
            running.process.terminate()
            assert running.process.wait(30) == 0
        finally:
            crowd.give_up()
        with collector(database_url, "--listen", running.url.removeprefix("http://")):
            crowd.finish()
    assert lost_and_twice(database_url, crowd.sent) == (0, 0)


def test_an_interrupt_ends_it_in_order_too(database_url: str) -> None:
    with collector(database_url) as running:
        assert running.get("/readyz").status_code == 200
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(30) == 0


@contextlib.contextmanager
def hanging(file: str) -> Iterator[None]:
    """Nobody else can write to the file meanwhile."""
    with contextlib.closing(sqlite3.connect(file, timeout=30, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def test_an_orderly_end_does_not_wait_for_a_database_that_hangs(tmp_path: Path) -> None:
    file = str(tmp_path / "gradwatch.db")
    answers: list[int] = []

    def send(running: Collector) -> None:
        answers.append(post(running.url).status_code)

    with collector(f"sqlite:///{file}") as running, hanging(file):
        sender = threading.Thread(target=send, args=(running,))
        sender.start()
        time.sleep(1)
        began = time.monotonic()
        running.process.terminate()
        assert running.process.wait(30) == 0
        assert time.monotonic() - began < 25
        sender.join()
    assert answers == [503]
