"""A collector that is away for an hour's worth of exports: what the spool costs, and that all is replayed.

An hour at 10 exports a minute is 600 exports; they are made at a shorter interval, by a real training loop, and
delivered to a real collector that is started when they are all on disk.

    python -m tests.soak.outage [--exports 600] [--interval 0.1]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import gradwatch
from gradwatch import conventions as names
from gradwatch.export.spool_records import unpack
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage.reading import read_series
from tests.collector_process import collector, free_port

_RUN: str = "outage"


@dataclass(frozen=True)
class Figures:
    """What was seen: steps trained and stored, requests and bytes in the spool, seconds of the replay."""

    trained: int
    stored: int
    complete: bool
    requests: int
    payload_bytes: int
    spool_bytes: int
    replay_seconds: float

    @property
    def ratio(self) -> float:
        """Bytes on disk for a byte that is sent."""
        return self.spool_bytes / self.payload_bytes


def outage(folder: Path, exports: int, interval: float) -> Figures:
    """Train through an outage of so many exports, ``interval`` seconds apart; then the collector comes back."""
    port = free_port()
    endpoint, database = f"http://127.0.0.1:{port}", f"sqlite:///{folder}/gradwatch.db"
    spool = folder / "host" / "spool"
    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(10)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trained = 0
    with ExitStack() as stack:
        watch = gradwatch.watch(
            model,
            optimizer,
            run_id=_RUN,
            endpoint=endpoint,
            directory=folder / "host",
            export_interval=interval,
            exit_timeout=120.0,
        )
        until = time.monotonic() + exports * interval
        while time.monotonic() < until:
            optimizer.zero_grad()
            model(torch.randn(8, 32)).square().mean().backward()
            optimizer.step()
            trained += 1
            time.sleep(interval / 10)
        kept = [path.read_bytes() for path in spool.rglob("*.segment")]
        running = stack.enter_context(collector(database, "--listen", f"127.0.0.1:{port}"))
        began = time.monotonic()
        watch.close()
        running.await_status(_RUN, "succeeded")
        took = time.monotonic() - began
    stored = _steps(database)
    requests = [request for segment in kept for request in unpack(segment)[0]]
    return Figures(
        trained,
        len(stored),
        stored == list(range(trained)) and not list(spool.rglob("*.segment")),
        len(requests),
        sum(len(request.body) for request in requests),
        sum(map(len, kept)),
        took,
    )


def _steps(database: str) -> list[int]:
    engine = db.connect(database)
    try:
        with engine.connect() as connection:
            series = read_series(connection, _RUN, names.STEP_INDEX.name)
            return [int(value) for one in series for value in np.asarray(one.values)]
    finally:
        engine.dispose()


def main() -> None:
    """Print the figures; exit with 1 if anything is missing or too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exports", type=int, default=600, help="exports that the collector misses")
    parser.add_argument("--interval", type=float, default=0.1, help="seconds between them")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        seen = outage(Path(folder), options.exports, options.interval)
    print(f"steps trained / stored      {seen.trained} / {seen.stored}")
    print(f"replayed completely         {'yes' if seen.complete else 'NO'}, in {seen.replay_seconds:.1f} s")
    print(f"requests in the spool       {seen.requests}")
    print(f"spool bytes / payload bytes {seen.spool_bytes} / {seen.payload_bytes} = {seen.ratio:.3f}")
    sys.exit(not seen.complete or seen.ratio > 2)


if __name__ == "__main__":
    main()
