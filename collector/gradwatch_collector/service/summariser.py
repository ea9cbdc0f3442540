"""The loop that summarises ended runs. It has a thread of its own: a run may have been of a thousand ranks."""

from __future__ import annotations

import logging
import threading
from typing import Final

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from gradwatch_collector.objectives.summaries import summarise_due
from gradwatch_collector.service.lease import Lease, LeaseLostError
from gradwatch_collector.storage.database_clock import DatabaseClock
from gradwatch_slo.cost import PriceTable

logger = logging.getLogger(__name__)

_INTERVAL_SECONDS: Final = 1.0
_STOP_SECONDS: Final = 5.0


class Summariser:
    """Summarises what is due every second, if it is the holder of the lease."""

    def __init__(self, engine: Engine, lease: Lease, clock: DatabaseClock, prices: PriceTable | None) -> None:
        self._engine = engine
        self._lease = lease
        self._clock = clock
        self._prices = prices
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gradwatch-summariser", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the run that is under way; leave a database that hangs alone."""
        self._stop.set()
        self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            try:
                self._summarise()
            except SQLAlchemyError as error:
                logger.warning("no summaries, trying again: %s", str(error).splitlines()[0])
            except LeaseLostError:
                logger.info("another collector summarises now")
            except Exception:
                logger.exception("summarising failed, trying again")

    def _summarise(self) -> None:
        def go_on() -> bool:
            return self._lease.is_held and not self._stop.is_set()

        done = False
        while not done and go_on():
            done = summarise_due(self._engine, self._lease.transaction, self._prices, self._clock.now(), go_on)
