"""How a run stands, as far as objectives care."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

REASON_PREEMPTED: Final = "preempted"


class Status(StrEnum):
    """How a run stands. Only ``running`` is not an ending."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
