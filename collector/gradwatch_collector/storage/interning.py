"""Rows that stand for what they say: found by that or made, and known by a small integer from then on."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Connection, Row, Table, UniqueConstraint

from gradwatch_collector.storage.database import batched, placeholders
from gradwatch_collector.storage.upsert import insert

# The values of the columns that no two rows of the table share, in the order of its unique constraint.
Natural = tuple[Any, ...]
_AT_ONCE: Final = 500


def intern(
    connection: Connection, table: Table, rows: Mapping[Natural, Mapping[str, Any]]
) -> dict[Natural, int]:
    """Return the id, the primary key, of each row; what is missing is made, with its other columns as given.

    Where others make rows of the table at the same time, they come in the order of their keys, so that nobody
    waits for somebody who waits.
    """
    natural = _natural(table)
    found = _find(connection, table, natural, rows)
    missing = [
        {**dict(zip(natural, row, strict=True)), **rest} for row, rest in rows.items() if row not in found
    ]
    if missing:
        made = insert(connection, table).on_conflict_do_nothing()
        returned = made.returning(*table.primary_key, *(table.c[name] for name in natural))
        found |= _ids(connection.execute(returned, missing))
        # Another writer was faster; its rows are committed, or the insert would still be waiting for them.
        found |= _find(connection, table, natural, rows.keys() - found.keys())
    return found


def _natural(table: Table) -> list[str]:
    (unique,) = (each for each in table.constraints if isinstance(each, UniqueConstraint))
    return unique.columns.keys()


def _find(
    connection: Connection, table: Table, natural: Sequence[str], rows: Collection[Natural]
) -> dict[Natural, int]:
    found: dict[Natural, int] = {}
    (identity,) = table.primary_key.columns.keys()
    row = f"({', '.join('?' * len(natural))})"
    same = " AND ".join(f"{table.name}.{name} = wanted.{name}" for name in natural)
    for some in batched(rows, most=_AT_ONCE):
        # A join, because SQLite uses no index for `(a, b) IN (...)`; as text, because composing it takes longer
        # than all the rest.
        statement = (
            f"WITH wanted ({', '.join(natural)}) AS (VALUES {', '.join([row] * len(some))}) "  # noqa: S608 - our names
            f"SELECT {table.name}.{identity}, wanted.* FROM wanted JOIN {table.name} ON {same}"
        )
        parameters = tuple(itertools.chain.from_iterable(some))
        found |= _ids(connection.exec_driver_sql(placeholders(connection, statement), parameters))
    return found


def _ids(rows: Iterable[Row[Any]]) -> dict[Natural, int]:
    return {tuple(row[1:]): row[0] for row in rows}
