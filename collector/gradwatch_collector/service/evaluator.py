"""The loop that looks at what was stored: silence, findings, objectives.

Of many collectors on one database one judges, the holder of the lease (`lease.py`): it marks who has fallen
silent, and opens and resolves findings. Every collector looks: what it reads of runs, findings and objectives
is published as one immutable `Snapshot`, which its ``/metrics`` and API show without touching the
database. So they all show the same, and when the holder dies nothing has to be handed over.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from opentelemetry.trace import NoOpTracer, Tracer
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from gradwatch_collector.findings import RULES, Detection, reconcile
from gradwatch_collector.findings.overrides import Override
from gradwatch_collector.objectives.counters import keep_counted
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.runs.live import LiveRuns
from gradwatch_collector.runs.presence import Presence
from gradwatch_collector.runs.silence import mark_silent
from gradwatch_collector.service.lease import Lease, LeaseLostError
from gradwatch_collector.service.loop import Loop
from gradwatch_collector.service.snapshot import Snapshot, look, recent_runs
from gradwatch_collector.storage.database import of_one_moment
from gradwatch_slo.objective import Objective

logger = logging.getLogger(__name__)

_NANOS: Final = 1_000_000_000
# Of a tick, what goes into counting what is not counted yet: ingest waits for it on SQLite.
_COUNT_SECONDS: Final = 0.05
# And into reading what is new of runs: those that are not reached are first in the next.
_DETECT_SECONDS: Final = 0.5
_CLEARS_AFTER: Final = {name: rule.clears_after for name, rule in RULES.items()}


class Evaluator:
    """Runs :meth:`tick` every ``interval`` seconds on a thread of its own."""

    def __init__(
        self,
        engine: Engine,
        live: LiveRuns,
        objectives: Sequence[Objective],
        *,
        lease: Lease,
        lost_after: float,
        overrides: Sequence[Override] = (),
        interval: float = 1.0,
        now: Callable[[], int] = time.time_ns,
        tracer: Tracer | None = None,
    ) -> None:
        self._engine = engine
        self._tracer = tracer or NoOpTracer()
        self._live = live
        self._objectives = objectives
        self._indicators = frozenset(map(Indicator.of, objectives))
        self._detection = Detection(overrides)
        self._lease = lease
        self._lost_after = int(lost_after * _NANOS)
        self._now = now
        started_at = now()
        self._presence = Presence(started_at, started_at)
        self._failed = False
        self.snapshot = Snapshot(evaluated_at=0)
        self._loop = Loop("evaluation", interval, self._evaluate)

    def start(self) -> None:
        """Start the thread."""
        self._loop.start()

    def stop(self) -> None:
        """Stop after the tick that is under way and give the lease back."""
        if self._loop.stop():
            try:
                self._lease.release()
            except SQLAlchemyError as error:
                logger.warning("the lease will expire by itself: %s", str(error).splitlines()[0])

    def _evaluate(self) -> None:
        # Where the database is away for long, the alert on the age of the evaluation tells.
        with self._tracer.start_as_current_span("gradwatch.evaluate"):
            self.tick()

    def tick(self) -> Snapshot:
        """Judge, if that is ours to do; then look, and publish what was found."""
        now = self._now()
        presence = self._presence.tick(now, self._lost_after, failed=self._failed)
        self._failed = True
        try:
            judges = self._lease.acquire()
            if judges:
                self._mark_silent(now, presence.up_since)
            self._presence, self._failed = presence, False
            if judges:
                self._find(now)
                self._count(now)
        except LeaseLostError:
            logger.warning("another collector evaluates now: this one was suspended, or is too slow")
        with of_one_moment(self._engine).connect() as connection:
            self.snapshot = look(connection, self.snapshot, self._objectives, now)
        self._live.forget({run.run_id: run.last_seen_at - 2 * self._lost_after for run in self.snapshot.runs})
        return self.snapshot

    # Each in a short transaction of its own that begins by finding the lease ours.

    def _mark_silent(self, now: int, up_since: int) -> None:
        with self._lease.transaction() as connection:
            mark_silent(connection, now, self._lost_after, up_since)

    def _find(self, now: int) -> None:
        until = time.monotonic() + _DETECT_SECONDS
        # Read first, and outside of the transaction that writes: ingest waits for that on SQLite.
        with of_one_moment(self._engine).connect() as connection:
            runs = recent_runs(connection, now)
            found = self._detection.look(connection, runs, now, lambda: time.monotonic() < until)
        with self._lease.transaction() as connection:
            reconcile(connection, found.observations, now, clears_after=_CLEARS_AFTER, unread=found.unread)
            self._lease.tell_done(connection, now)

    def _count(self, now: int) -> None:
        until = time.monotonic() + _COUNT_SECONDS
        try:
            with self._lease.transaction() as connection:
                keep_counted(connection, self._indicators, now, lambda: time.monotonic() < until)
        except SQLAlchemyError as error:
            # What is told does not depend on it, only how long telling takes.
            logger.warning("objectives are not counted, trying again: %s", str(error).splitlines()[0])
