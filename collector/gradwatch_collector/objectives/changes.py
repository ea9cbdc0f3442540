"""What has to be done again: hours that are to be counted, runs that are to be summarised.

Told by whoever changes a run, in the same transaction. Rows are only added, and whoever has done what they tell
of takes away exactly those that it saw: rows committed after that tell of what it may not have seen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from sqlalchemy import BigInteger, Connection, bindparam, insert, select

from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched
from gradwatch_slo.runs import Status

# Hours are numbered from 1970 in UTC: every time zone's days are made of them, or of them and a part of one.
HOUR: Final = 3600 * 1_000_000_000

_run = schema.run.c
# Built once: ingest does this with every commit.
_TELL_DUE: Final = insert(schema.summary_due).from_select(
    ["run_id", "told_at"],
    select(_run.run_id, bindparam("now", type_=BigInteger)).where(
        _run.run_id.in_(bindparam("runs", expanding=True)), _run.status != Status.RUNNING
    ),
)


def tell_changed(connection: Connection, moments: Iterable[int | None]) -> None:
    """Have the hours of these moments (Unix nanoseconds; None is none) counted again, within a transaction."""
    hours = {at // HOUR for at in moments if at is not None}
    if hours:
        connection.execute(insert(schema.run_change), [{"hour": hour} for hour in sorted(hours)])


def load_changed(connection: Connection) -> list[int]:
    """Return the hours of which something is not as it was counted, in order."""
    return sorted(connection.scalars(select(schema.run_change.c.hour).distinct()))


def tell_due(connection: Connection, runs: Collection[str], now: int) -> None:
    """Have those of these runs that have ended summarised (again), within the transaction that changes them.

    ``now`` in Unix nanoseconds.
    """
    for some in batched(runs):
        connection.execute(_TELL_DUE, {"runs": some, "now": now})
