"""Alembic's entry point, called by `gradwatch_collector.storage.database` within a transaction of its own."""

from __future__ import annotations

import re
from typing import Any

from alembic import context

from gradwatch_collector.storage import schema


def include_name(name: str | None, kind: str, _parents: Any) -> bool:
    """Leave out partitions: code makes and drops them daily."""
    return not (kind == "table" and name is not None and re.match("(frame|block|rollup)_d", name))


connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=schema.metadata,
    include_name=include_name,
    render_as_batch=connection.dialect.name == "sqlite",
    compare_type=True,
)
context.run_migrations()
