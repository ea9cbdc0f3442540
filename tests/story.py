"""A registry over one database, told batches and silences in order."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, select

from gradwatch_collector import schema
from gradwatch_collector.database import transaction
from gradwatch_collector.records import Batch, ProcessKey
from gradwatch_collector.registry import Registry
from gradwatch_collector.silence import mark_silent
from tests.batches import SECOND, at


class Story:
    """A registry over one database, told batches in order."""

    def __init__(self, database: Engine) -> None:
        self.database = database
        self.registry = Registry()

    def receive(self, received: Batch, seconds: float) -> ProcessKey:
        with transaction(self.database) as connection:
            key = self.registry.resolve(connection, received.source, at(seconds))
            self.registry.apply(connection, key, received, at(seconds))
        return key

    def wait(self, seconds: float, *, lost_after: float = 30, up_since: float = 0) -> list[str]:
        with transaction(self.database) as connection:
            return mark_silent(connection, at(seconds), int(lost_after * SECOND), at(up_since))

    def rows(self, table: Any) -> list[Any]:
        with self.database.connect() as connection:
            return list(connection.execute(select(table).order_by(*table.primary_key.columns)).mappings())

    def run(self) -> Any:
        (row,) = self.rows(schema.run)
        return row

    def history(self) -> list[tuple[int, str, str | None]]:
        return [(row["attempt"], row["status"], row["reason"]) for row in self.rows(schema.run_history)]
