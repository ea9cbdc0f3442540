"""Bytes stored a value after compaction, keys, indexes and times included."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from typing import Final

from sqlalchemy import Engine, text

from collection.figures import Figure, at_most
from collection.load import Requests, Shape
from collection.servers import new_database, stored_bytes
from gradwatch_collector.otlp.metrics import MetricsDecoder
from gradwatch_collector.records import ProcessKey, Received
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage.compaction import compact
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store

ASKED: Final = {"SQLite": 3.6, "PostgreSQL": 4.7}
_FAR_AHEAD: Final = 365 * 86_400 * 1_000_000_000
_AT_ONCE: Final = 50


def figures(servers: dict[str, str], *, steps: int) -> Iterator[Figure]:
    """Store ``steps`` steps of four metrics, for narrow and wide models, and divide."""
    for name, server in servers.items():
        for layers in (30, 300):
            engine = db.connect(new_database(server, f"space{layers}"))
            compact_everything(engine)  # nothing yet, but PostgreSQL's own tables shrink by it
            before = stored_bytes(engine)
            shape = Shape(layers=layers)
            _store(engine, shape, steps)
            compact_everything(engine)
            per_value = (stored_bytes(engine) - before) / (steps * shape.points)
            engine.dispose()
            yield at_most(f"{name}, bytes a float32 value, {layers} layers", ASKED[name], per_value, digits=2)


def _store(engine: Engine, shape: Shape, steps: int) -> None:
    requests, decoder, series = Requests("space", shape, 1), MetricsDecoder(), SeriesIds()
    key = ProcessKey("space", 1, 0, "space")
    for start in range(0, steps, _AT_ONCE):
        group = [
            Received(key, batch, time.time_ns())
            for _ in range(start, min(start + _AT_ONCE, steps))
            for batch in decoder.decode(requests.next()).batches
        ]
        with db.transaction(engine) as connection:
            store(connection, series, group)
        series.keep()


def compact_everything(engine: Engine) -> None:
    """Compact until nothing is left, and give unused pages back."""
    more = True
    while more:
        with db.transaction(engine) as connection:
            more = compact(connection, time.time_ns() + _FAR_AHEAD).more
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM FULL"))
    else:
        engine.dispose()  # the last one to leave moves the log into the database
        with contextlib.closing(sqlite3.connect(engine.url.database or "")) as file:
            file.execute("VACUUM")
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM frame")) == 0
