"""A registry over one database, told batches and silences in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Engine, select

from gradwatch_collector.records import Batch, ProcessKey, Received
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.runs.silence import mark_silent
from gradwatch_collector.runs.turns import take_turns
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from tests.batches import SECOND, at


class Story:
    """A registry over one database, told batches in order."""

    def __init__(self, database: Engine) -> None:
        self.database = database
        self.registry = Registry()

    def receive(self, received: Batch, seconds: float) -> ProcessKey:
        (key,) = self.receive_group([(received, seconds)])
        return key

    def receive_group(self, group: Sequence[tuple[Batch, float]]) -> list[ProcessKey]:
        """In one transaction, as the ingest thread does."""
        with transaction(self.database) as connection:
            take_turns(connection, {each.source.run_id for each, _ in group})
            keys = self.registry.resolve(connection, [(each.source, at(seconds)) for each, seconds in group])
            received = [
                Received(key, each, at(seconds)) for key, (each, seconds) in zip(keys, group, strict=True)
            ]
            self.registry.apply(connection, received)
        return keys

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
