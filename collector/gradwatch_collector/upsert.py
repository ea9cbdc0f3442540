"""``INSERT ... ON CONFLICT``, which SQLite and PostgreSQL spell alike and SQLAlchemy does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table
from sqlalchemy.dialects import postgresql, sqlite


def insert(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """Return the dialect's INSERT, which knows ``on_conflict_do_nothing`` and ``on_conflict_do_update``."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


def upsert(
    connection: Connection,
    table: Table,
    values: Mapping[str, Any],
    *,
    update: Mapping[str, Any],
    where: ColumnElement[bool] | None = None,
) -> sqlite.Insert | postgresql.Insert:
    """Insert a row, or where its primary key exists already (and ``where`` holds) set ``update``."""
    return (
        insert(connection, table)
        .values(**values)
        .on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=dict(update), where=where)
    )
