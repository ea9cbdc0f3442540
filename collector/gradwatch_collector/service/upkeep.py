"""The loop that keeps what is stored compact and bounded: compaction, partitions, retention.

Compaction rearranges and decides nothing, so every collector takes its share of it. What deletes is the work of
the one that holds the lease.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from sqlalchemy import Engine

from gradwatch_collector.service.lease import Lease
from gradwatch_collector.service.loop import Loop
from gradwatch_collector.storage.compaction import compact
from gradwatch_collector.storage.database import size_of, transaction
from gradwatch_collector.storage.database_clock import DatabaseClock
from gradwatch_collector.storage.partitions import maintain_partitions
from gradwatch_collector.storage.retention import Policy, Pruned, prune

logger = logging.getLogger(__name__)

_INTERVAL_SECONDS: Final = 10.0
_COMPACT_SECONDS: Final = 30.0
_PRUNE_EVERY: Final = 600 * 1_000_000_000


class Upkeep:
    """Does the chores every ten seconds, each in short transactions, on a thread of its own."""

    def __init__(self, engine: Engine, lease: Lease, clock: DatabaseClock, policy: Policy) -> None:
        self._engine = engine
        self._lease = lease
        self._clock = clock
        self._policy = policy
        self._pruned_at = 0
        self._compacted = 0
        self._unmade: frozenset[str] = frozenset()
        # Bytes; None before it was first looked at.
        self.database_size: int | None = None
        chores = (self._set_clock, self._compact, self._prepare, self._prune, self._measure)
        self._loop = Loop("upkeep", _INTERVAL_SECONDS, *chores)

    def start(self) -> None:
        """Start the thread."""
        self._loop.start()

    def stop(self) -> None:
        """Stop after the transaction that is under way."""
        self._loop.stop()

    def _set_clock(self) -> None:
        with self._engine.connect() as connection:
            self._clock.set(connection)

    def _compact(self) -> None:
        # However much there is: what prunes and prepares comes next, or the disk fills.
        until = time.monotonic() + _COMPACT_SECONDS
        more = True
        while more and self._loop.goes_on and time.monotonic() < until:
            with transaction(self._engine) as connection:
                done = compact(connection, self._clock.now(), after=self._compacted)
            self._compacted, more = done.after, done.more

    def _prepare(self) -> None:
        if self._lease.is_held:
            with self._lease.transaction() as connection:
                unmade = maintain_partitions(connection, self._clock.now())
            if unmade != self._unmade:
                self._unmade = unmade
                logger.info("partitions that cannot be made yet: %s", ", ".join(sorted(unmade)) or "none")

    def _prune(self) -> None:
        now = self._clock.now()
        if self._lease.is_held and now - self._pruned_at >= _PRUNE_EVERY:
            pruned = prune(self._lease.transaction, self._policy, now, go_on=lambda: self._loop.goes_on)
            self._pruned_at = now
            if pruned != Pruned():
                logger.info("pruned %s", pruned)

    def _measure(self) -> None:
        with self._engine.connect() as connection:
            self.database_size = size_of(connection)
