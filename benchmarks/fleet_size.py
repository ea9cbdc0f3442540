"""Bytes that one day of one run of a fleet takes: as it was sent, after compaction, and as roll-ups after that.

A run of the fleet profile (docs/scaling.md) tells its numbers once a minute: of every layer the distribution
of its gradient norms over the minute, and per-step scalars, one step a second. A day of that is encoded as the
agent encodes it, decoded as the receiver does, stored, compacted, and pruned. Sizes are of whole databases,
keys and indexes included, less the empty one; a PostgreSQL table counts without the dead rows that vacuum
reuses.

    python benchmarks/fleet_size.py [--layers 300] [--minutes 1440]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from array import array
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sqlalchemy import Engine, text

from collection.servers import postgresql, stored_bytes
from gradwatch import conventions as c
from gradwatch.export.aggregate import LayerAggregate
from gradwatch.export.otlp_encoding import encoded_resource, metrics_request
from gradwatch.telemetry import HistogramPoint, MetricPoints, MetricSeries, Point
from gradwatch_collector.otlp.metrics import MetricsDecoder
from gradwatch_collector.records import Received
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage.compaction import compact
from gradwatch_collector.storage.retention import Policy, prune
from gradwatch_collector.storage.segments import DAY
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store

SECOND = 1_000_000_000
STEPS = 60
SCALARS = (c.LOSS, c.LEARNING_RATE, c.STEP_INDEX, c.GRADIENT_NORM, c.STEP_DURATION, c.DATA_WAIT)
GAUGES = (c.PROCESS_MEMORY, c.HOST_MEMORY_LIMIT, c.DEVICE_MEMORY_PEAK, c.DEVICE_MEMORY_LIMIT)


class Run:
    """What a run sends each minute."""

    def __init__(self, layers: int, began: int) -> None:
        self._random = np.random.default_rng(1)
        self._norms = np.exp(self._random.normal(0, 2, layers))
        self._began = began
        self._resource = encoded_resource(
            {c.RUN_ID: "run", c.SERVICE_NAME: "fleet", c.SERVICE_INSTANCE_ID: "1"}
        )

    def minute(self, number: int) -> bytes:
        """Return the request at the end of a minute."""
        start = self._began + number * 60 * SECOND
        end = start + 60 * SECOND
        steps = self._norms * np.exp(self._random.normal(0, 0.1, (STEPS, len(self._norms))))
        self._norms = steps[-1]
        times = array("q", [start + (step + 1) * SECOND for step in range(STEPS)])
        scalars = self._random.normal(1, 0.1, (len(SCALARS), STEPS)).astype(np.float32).astype(float)
        return metrics_request(
            self._resource,
            [
                MetricPoints(
                    c.LAYER_GRADIENT_NORM,
                    [self._layer(i, column, start, end) for i, column in enumerate(steps.T)],
                ),
                *(
                    MetricSeries(each, {}, times, array("d", values))
                    for each, values in zip(SCALARS, scalars, strict=True)
                ),
                *(MetricPoints(each, [Point(end, 10**10 + number, {})]) for each in GAUGES),
            ],
        )

    def _layer(self, index: int, norms: npt.NDArray[np.float64], start: int, end: int) -> HistogramPoint:
        aggregate = LayerAggregate()
        for norm in norms.astype(np.float32).tolist():
            aggregate.add(norm)
        point = aggregate.point(
            start, end, {c.LAYER_NAME: f"transformer.h.{index // 10}.mlp.{index % 10}.weight"}
        )
        assert point is not None
        return point


def measure(url: str, layers: int, minutes: int) -> None:
    """Store a day, compact it, roll it up, and print what each takes."""
    midnight = time.time_ns() // DAY * DAY - 10 * DAY
    engine = db.connect(url)
    db.upgrade(engine, now=lambda: midnight)
    empty = size(engine)
    run, decoder, series, registry = Run(layers, midnight), MetricsDecoder(), SeriesIds(), Registry()
    sent = values = 0
    for number in range(minutes):
        request = run.minute(number)
        sent += len(request)
        (batch,) = decoder.decode(request).batches
        values += sum(frame.values.size for frame in batch.frames if frame.values is not None)
        with db.transaction(engine) as connection:
            (key,) = registry.resolve(connection, [(batch.source, midnight)])
            store(connection, series, [Received(key, batch, midnight)])
        series.keep()
    more = True
    while more:
        with db.transaction(engine) as connection:
            more = compact(connection, midnight + 2 * DAY).more
    prune(lambda: db.transaction(engine), Policy(raw=30 * DAY, rollups=90 * DAY), midnight + 4 * DAY)
    raw = size(engine) - empty
    prune(lambda: db.transaction(engine), Policy(raw=2 * DAY, rollups=90 * DAY), midnight + 4 * DAY)
    rolled = size(engine) - empty
    print(
        f"  {layers} layers, {minutes} minutes: {values:,} numbers and {layers * minutes:,} distributions, "
        f"{sent / 1e6:.1f} MB on the wire\n"
        f"  stored {raw / 1e6:.2f} MB, rolled up {rolled / 1e6:.2f} MB (1 in {raw / rolled:.0f})"
    )
    engine.dispose()


def size(engine: Engine) -> int:
    """Return the bytes of the database without what is free in it."""
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM FULL"))
    else:
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    return stored_bytes(engine)


def main() -> None:
    """Print the figures for both databases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=300)
    parser.add_argument("--minutes", type=int, default=1440)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print("SQLite:")
        measure(f"sqlite:///{folder}/fleet.db", options.layers, options.minutes)
        with postgresql(Path(folder)) as server:
            print("PostgreSQL:")
            measure(server, options.layers, options.minutes)


if __name__ == "__main__":
    main()
