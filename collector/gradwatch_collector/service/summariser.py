"""The loop that summarises ended runs. It has a thread of its own: a run may have been of a thousand ranks."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Engine

from gradwatch_collector.objectives.summaries import summarise_due
from gradwatch_collector.service.lease import Lease
from gradwatch_collector.service.loop import Loop
from gradwatch_collector.storage.database_clock import DatabaseClock
from gradwatch_slo.cost import PriceTable

_INTERVAL_SECONDS: Final = 1.0


class Summariser:
    """Summarises what is due every second, if it is the holder of the lease."""

    def __init__(self, engine: Engine, lease: Lease, clock: DatabaseClock, prices: PriceTable | None) -> None:
        self._engine = engine
        self._lease = lease
        self._clock = clock
        self._prices = prices
        self._loop = Loop("summaries", _INTERVAL_SECONDS, self._summarise)

    def start(self) -> None:
        """Start the thread."""
        self._loop.start()

    def stop(self) -> None:
        """Stop after the run that is under way."""
        self._loop.stop()

    def _summarise(self) -> None:
        def go_on() -> bool:
            return self._lease.is_held and self._loop.goes_on

        done = False
        while not done and go_on():
            done = summarise_due(self._engine, self._lease.transaction, self._prices, self._clock.now(), go_on)
