"""Whose turn it is to write about runs, where several collectors share a PostgreSQL. SQLite has one writer.

Two collectors that each end one rank must not both still see the other running, nor both count the next
attempt. Whoever writes takes its turn before it locks any row: row by row, in the order in which things
arrived, two writers would sooner or later wait for each other.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from sqlalchemy import Connection, text

# "gradruns"
_EVERYTHING: Final = 0x6772_6164_7275_6E73
_WITH_OTHERS = text("SELECT pg_advisory_xact_lock_shared(:everything)")
_ALONE = text("SELECT pg_advisory_xact_lock(:everything)")
_RUNS = text(
    "SELECT pg_advisory_xact_lock(key) FROM (SELECT DISTINCT hashtextextended(run_id, 0) AS key "
    "FROM unnest(CAST(:runs AS text[])) AS run_id ORDER BY key) AS sorted"
)
# The server has room for some six thousand locks, and all collectors share it.
_MOST_RUNS: Final = 500


def take_turns(connection: Connection, runs: Collection[str]) -> None:
    """Wait until no other transaction writes about these runs, and let none until this one ends.

    All runs of a transaction at once, before anything else in it.
    """
    if connection.dialect.name != "postgresql":
        return
    if len(runs) > _MOST_RUNS:
        take_all_turns(connection)
        return
    connection.execute(_WITH_OTHERS, {"everything": _EVERYTHING})
    connection.execute(_RUNS, {"runs": list(runs)})


def take_all_turns(connection: Connection) -> None:
    """The same for all runs there are."""
    if connection.dialect.name == "postgresql":
        connection.execute(_ALONE, {"everything": _EVERYTHING})
