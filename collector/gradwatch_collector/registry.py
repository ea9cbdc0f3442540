"""The run registry: which process is which attempt, and how every run stands."""

from __future__ import annotations

from sqlalchemy import Connection

from gradwatch_collector.records import Batch, ProcessKey, Source


class Registry:
    """Keeps `process`, `attempt`, `run` and `run_history` true to what arrived."""

    def resolve(self, connection: Connection, source: Source, received_at: int) -> ProcessKey:
        """Return the key of the sending process, recording it on first sight.

        An attempt the sender does not know is the order in which its instance was first seen for the
        (run, rank). ``received_at`` in Unix nanoseconds.
        """
        raise NotImplementedError

    def apply(self, connection: Connection, key: ProcessKey, batch: Batch, received_at: int) -> None:
        """Let a batch's events and latest scalars change how the process, attempt and run stand.

        Idempotent. Called once for each batch inside the transaction that stores it.
        """
        raise NotImplementedError
