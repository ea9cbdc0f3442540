"""The OpenTelemetry Collector's own load-test scene: 10 000 datapoints a second.

Theirs must pass within 60 % of a core and 105 MiB, acknowledging from memory
(https://github.com/open-telemetry/opentelemetry-collector-contrib/tree/main/testbed).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from collection.figures import Figure, at_most
from collection.load import Shape, generate
from collection.servers import collector, new_database

RATE: Final = 10_000


def figures(servers: dict[str, str], *, seconds: float) -> Iterator[Figure]:
    """Send at the pace, and see what the collector's process uses."""
    for name, server in servers.items():
        with collector(new_database(server, "steady")) as serving:
            generate(serving.address, 5, points_per_second=RATE)  # until all is imported and cached
            before, began = serving.processor_seconds(), time.monotonic()
            load = generate(serving.address, seconds, points_per_second=RATE, first=100)
            used = serving.processor_seconds() - before
            share = 100 * used / (time.monotonic() - began)
            peak = serving.peak_bytes() / 2**20
        sent = load.rate * Shape().points
        yield at_most(f"{name}, share of a core at {sent:,.0f} a second", 10, share, " %")
        yield at_most(f"{name}, resident memory", 150, peak, " MiB", digits=0)
