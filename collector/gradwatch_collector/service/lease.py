"""What only one of many collectors may do: a lease row, and a term that fences off whoever held it before.

The row is the truth, and the database's clock decides when it expires. Whoever writes as the holder does so
in a transaction that locks the row first and finds in it the term it was given, not expired: until that
transaction ends nobody else can take the lease, and a process that was suspended and wakes up cannot write.
On SQLite the lock on the row is the lock on the file.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from typing import Final

from sqlalchemy import Connection, Engine, Row, select, update

from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.database_clock import database_now

# How long nobody evaluates after a holder has died. It is renewed every second.
LEASE_SECONDS: Final = 10.0
EVALUATOR: Final = "evaluator"
_NANOS: Final = 1_000_000_000
_lease = schema.lease.c


class LeaseLostError(Exception):
    """The lease is somebody else's by now, or nobody's."""


def last_done(connection: Connection, name: str = EVALUATOR) -> int:
    """Return when any holder last did what a lease is for, in Unix nanoseconds; 0 if nobody ever did."""
    return connection.scalar(select(_lease.done_at).where(_lease.name == name)) or 0


class Lease:
    """One collector's claim to a lease. Thread-safe as far as one thread acquires and others only use it."""

    def __init__(self, engine: Engine, name: str = EVALUATOR, *, seconds: float = LEASE_SECONDS) -> None:
        self._engine = engine
        self._name = name
        self._nanos = int(seconds * _NANOS)
        # Who holds it is for people to read; the random part makes it one of a kind.
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._term: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether it was ours when last acquired. Only `transaction` knows for sure."""
        return self._term is not None

    def acquire(self) -> bool:
        """Renew the lease, or take it if nobody holds it; return whether it is ours."""
        with transaction(self._engine) as connection:
            # Who does not hold it need not wait for who does. The holder waits for its own other thread.
            row = self._locked(connection, skip=self._term is None)
            term = None if row is None else self._next_term(row, database_now(connection))
            if term is not None:
                connection.execute(
                    update(schema.lease)
                    .where(_lease.name == self._name)
                    .values(holder=self._holder, term=term, expires_at=database_now(connection) + self._nanos)
                )
        self._term = term
        return term is not None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Begin a transaction that writes as the holder.

        Raises:
            LeaseLostError: the lease is not ours any more; nothing was written.
        """
        with transaction(self._engine) as connection:
            row = self._locked(connection, skip=False)
            if row is None or not self._is_ours(row, database_now(connection)):
                raise LeaseLostError(f"the lease {self._name!r} is not held any more")
            yield connection

    def tell_done(self, connection: Connection, now: int) -> None:
        """Let every collector know that what the lease is for was done, within one of its transactions."""
        connection.execute(update(schema.lease).where(_lease.name == self._name).values(done_at=now))

    def release(self) -> None:
        """Let somebody else take the lease at once."""
        if self._term is not None:
            with transaction(self._engine) as connection:
                connection.execute(
                    update(schema.lease)
                    .where(_lease.name == self._name, _lease.holder == self._holder, _lease.term == self._term)
                    .values(expires_at=0)
                )
            self._term = None

    def _locked(self, connection: Connection, *, skip: bool) -> Row[str, int, int] | None:
        # SQLite has no FOR UPDATE and needs none: the transaction has locked the file.
        return connection.execute(
            select(_lease.holder, _lease.term, _lease.expires_at)
            .where(_lease.name == self._name)
            .with_for_update(skip_locked=skip)
        ).one_or_none()

    def _is_ours(self, row: Row[str, int, int], now: int) -> bool:
        return bool(row.holder == self._holder and row.term == self._term and row.expires_at > now)

    def _next_term(self, row: Row[str, int, int], now: int) -> int | None:
        """Return the term under which the lease is ours from now on; None if it is somebody else's."""
        if self._is_ours(row, now):
            return int(row.term)
        return int(row.term) + 1 if row.expires_at <= now else None
