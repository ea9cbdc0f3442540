"""How the tables spread over the nodes of Citus (https://docs.citusdata.com), from the schema itself.

What belongs to a run is placed by the run, numbers by their series (each series is on one node, and a run's
series on many); what all of them share is copied to every node. Citus can only keep a key unique that holds the
column by which the table is placed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from sqlalchemy import PrimaryKeyConstraint, Table, UniqueConstraint

from gradwatch_collector.storage import schema

_PLACED_BY: Final = ("run_id", "series_id")


def statements() -> Iterator[str]:
    """Yield the SQL statements that spread a migrated database, in order."""
    tables = schema.metadata.sorted_tables
    yield "CREATE EXTENSION IF NOT EXISTS citus;"
    # What others refer to comes first.
    for table in tables:
        if placed_by(table) is None:
            yield f"SELECT create_reference_table('{table.name}');"
    for table in tables:
        column = placed_by(table)
        if column is not None:
            yield from _keys(table, column)
            first = next(other for other in tables if placed_by(other) == column)
            together = "" if table is first else f", colocate_with => '{first.name}'"
            yield f"SELECT create_distributed_table('{table.name}', '{column}'{together});"


def placed_by(table: Table) -> str | None:
    """Return the column by whose value a table's rows are placed; None if every node has all of them."""
    return next((name for name in _PLACED_BY if name in table.c), None)


def _keys(table: Table, column: str) -> Iterator[str]:
    for constraint in table.constraints:
        held = [each.name for each in getattr(constraint, "columns", ())]
        if isinstance(constraint, PrimaryKeyConstraint) and column not in held:
            name = f"{table.name}_pkey"
            yield (
                f"ALTER TABLE {table.name} DROP CONSTRAINT {name}, "
                f"ADD CONSTRAINT {name} PRIMARY KEY ({', '.join([column, *held])});"
            )
        # A unique key that does not hold the column would have to be given up, not widened: there is none.
        assert not isinstance(constraint, UniqueConstraint) or column in held, constraint
