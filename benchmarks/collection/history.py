"""What a long history costs: reading it back, and taking in more."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from sqlalchemy import Engine

from collection.figures import Figure, at_most
from collection.load import STEP_NANOS, Shape, generate, layer_name
from collection.servers import collector, new_database, stored_bytes
from collection.space import compact_everything
from gradwatch import conventions as c
from gradwatch_collector.api.heat_map import heat_map
from gradwatch_collector.records import Batch, Frame, MetricIdentity, ProcessKey, Received, Source
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage.partitions import maintain_partitions
from gradwatch_collector.storage.reading import read_series
from gradwatch_collector.storage.series import SeriesIds, attribute_set
from gradwatch_collector.storage.writing import store

LAYERS: Final = 300
STEPS: Final = 10_000
STRETCHES: Final = 500
_METRIC: Final = MetricIdentity("training.layer.metric0", "{norm}", "gauge")
_BEGAN: Final = 1_700_000_000 * 1_000_000_000
_AT_ONCE: Final = 250
_READS: Final = 30


def figures(servers: dict[str, str], *, runs: int, seconds: float, rounds: int) -> Iterator[Figure]:
    """Fill a database with ``runs`` runs, read it, send to it and to an empty one in turn, prune it."""
    for name, server in servers.items():
        url = new_database(server, "history")
        engine = db.connect(url)
        _fill(engine, runs)
        size = stored_bytes(engine) / 2**30
        yield Figure(f"{name}, {runs} runs x {LAYERS} layers x {STEPS:,} steps", "", f"{size:.2f} GiB")
        yield from _reads(name, engine, runs)
        engine.dispose()
        yield from _ingest(name, server, url, seconds, rounds)
        yield from _pruned(name, url)


def _fill(engine: Engine, runs: int) -> None:
    points = attribute_set([{c.LAYER_NAME: layer_name(layer)} for layer in range(LAYERS)])
    series = SeriesIds()
    with db.transaction(engine) as connection:
        maintain_partitions(connection, _BEGAN)  # as the collector of those days has done
    for run in range(runs):
        generator = np.random.default_rng(run)
        norms = np.exp(generator.normal(0, 2, LAYERS))
        key = ProcessKey(f"run-{run}", 1, 0, "history")
        source = Source(key.run_id, 1, 0, key.instance, {})
        for start in range(0, STEPS, _AT_ONCE):
            moves = np.cumsum(generator.normal(0, 0.1, (LAYERS, _AT_ONCE)), axis=1)
            values = (norms[:, None] * np.exp(moves)).astype(np.float32)
            norms = values[:, -1].astype(np.float64)
            times = _BEGAN + STEP_NANOS * np.arange(start, start + _AT_ONCE, dtype=np.int64)
            frame = Frame(_METRIC, "value", points, times, values)
            with db.transaction(engine) as connection:
                store(connection, series, [Received(key, Batch(source, (frame,)), _BEGAN)])
            series.keep()
        if run % 10 == 9:
            compact_everything(engine)
    compact_everything(engine)


def _reads(name: str, engine: Engine, runs: int) -> Iterator[Figure]:
    chosen = np.random.default_rng(7)

    def one_layer() -> None:
        run, layer = chosen.integers(runs), layer_name(int(chosen.integers(LAYERS)))
        with engine.connect() as connection:
            (found,) = read_series(connection, f"run-{run}", _METRIC.name, attributes={c.LAYER_NAME: layer})
        assert found.values is not None
        assert len(found.values) == STEPS

    def map_of_one() -> None:
        with engine.connect() as connection:
            found = heat_map(connection, f"run-{chosen.integers(runs)}", _METRIC.name, stretches=STRETCHES)
        assert found is not None
        assert found.values.shape == (LAYERS, STRETCHES)

    layer_ms, late = _milliseconds(one_layer)
    yield at_most(f"{name}, one layer's history, warm", 20, layer_ms, " ms", f" (p90 {late:.1f})")
    map_ms, late = _milliseconds(map_of_one)
    yield at_most(f"{name}, heat map of a run, warm", 50, map_ms, " ms", f" (p90 {late:.1f})")
    if engine.dialect.name == "sqlite":
        cold, late = _milliseconds(one_layer, before=lambda: _forget(engine))
        yield at_most(f"{name}, one layer's history, cold", 150, cold, " ms", f" (p90 {late:.1f})")


def _milliseconds(read: Callable[[], None], before: Callable[[], None] = lambda: None) -> tuple[float, float]:
    """Median and 90th percentile."""
    read()
    taken = []
    for _ in range(_READS):
        before()
        began = time.perf_counter()
        read()
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken), float(np.quantile(taken, 0.9))


def _forget(engine: Engine) -> None:
    """Make the next read come from the disk: new connections, and none of the file in the page cache."""
    engine.dispose()
    file = os.open(engine.url.database or "", os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _ingest(name: str, server: str, full: str, seconds: float, rounds: int) -> Iterator[Figure]:
    rates: dict[str, list[float]] = {"full": [], "empty": []}
    middles: dict[str, list[float]] = {"full": [], "empty": []}
    for round_ in range(rounds):
        empty = new_database(server, f"empty{round_}")
        for which, url in (("full", full), ("empty", empty)):
            # The history is of another year: by default it would be pruned meanwhile.
            with collector(url, "--keep-raw", "forever") as serving:
                load = generate(serving.address, seconds, first=1000 * (round_ + 1))
            rates[which].append(load.rate * Shape().points)
            middles[which].append(statistics.median(load.latencies))
    full_rate, empty_rate = (statistics.median(rates[which]) for which in ("full", "empty"))
    slower = 100 * (1 - full_rate / empty_rate)
    note = f" ({full_rate:,.0f} against {empty_rate:,.0f} a second)"
    yield at_most(f"{name}, ingest is slower than into an empty database by", 20, slower, " %", note)
    ratio = statistics.median(middles["full"]) / statistics.median(middles["empty"])
    yield Figure(f"{name}, latency of a request against an empty database's", "flat", f"{ratio:.2f}")


def _pruned(name: str, url: str) -> Iterator[Figure]:
    """What is left of the history, and of what came on top, when it is rolled up, and when that is gone."""
    engine = db.connect(url)
    before = stored_bytes(engine)
    for what, kept in (("rolled up", "forever"), ("pruned", "365d")):
        began = time.perf_counter()
        options = ("--older-than", "30d", "--rollups-older-than", kept)
        command = (sys.executable, "-m", "gradwatch.cli", "db", "prune", "--db", url, *options)
        subprocess.run(command, check=True, capture_output=True)
        taken = time.perf_counter() - began
        size = f"{before / 2**30:.2f} to {stored_bytes(engine) / 2**30:.2f} GiB"
        yield Figure(f"{name}, the same {what}", "gives the space back", f"{size} in {taken:.0f} s")
    engine.dispose()
