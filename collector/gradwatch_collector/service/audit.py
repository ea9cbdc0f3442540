"""The audit log: who did what to the service, and when. Rows are only ever added."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, insert, select

from gradwatch_collector.storage import schema


@dataclass(frozen=True, slots=True)
class Entry:
    """One act. ``action`` is a dotted verb such as ``token.created``; ``recorded_at`` in Unix nanoseconds."""

    recorded_at: int
    actor: str
    action: str
    subject: str
    details: Mapping[str, Any] = field(default_factory=dict)


def record(
    connection: Connection,
    actor: str,
    action: str,
    subject: str,
    details: Mapping[str, Any] | None = None,
    *,
    now: int,
) -> None:
    """Write an act down, in the transaction that does it. ``details`` go into JSON and hold no secrets.

    ``actor``: :func:`operator`. ``now`` in Unix nanoseconds.
    """
    connection.execute(
        insert(schema.audit).values(
            recorded_at=now, actor=actor, action=action, subject=subject, details=dict(details or {})
        )
    )


def entries(connection: Connection, limit: int) -> Sequence[Entry]:
    """Return the newest acts, newest first."""
    audit = schema.audit.c
    rows = connection.execute(select(schema.audit).order_by(audit.audit_id.desc()).limit(limit)).mappings()
    return [
        Entry(row["recorded_at"], row["actor"], row["action"], row["subject"], row["details"]) for row in rows
    ]


def operator() -> str:
    """Return who runs this command, as ``USER@HOST``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"
