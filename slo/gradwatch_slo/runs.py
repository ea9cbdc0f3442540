"""The facts about a run that service-level indicators are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """One run, as far as objectives care. All moments are timezone-aware UTC.

    ``ended_at`` of a lost run is its last sign of life. ``target_reached_at`` is the first moment the run's
    target held. ``deadline`` is the run's own time-to-convergence threshold, counted from ``started_at``.
    ``will_retry``: the latest attempt failed and will be tried again, so the run is not over.
    ``received_at``: when the collector last heard of the run; no clock of a training host can move a moment
    past it.
    """

    run_id: str
    job: str
    model: str | None
    dataset: str | None
    team: str | None
    tier: str
    status: Status
    reason: str | None
    started_at: datetime
    ended_at: datetime | None
    target: str | None = None
    deadline: timedelta | None = None
    target_reached_at: datetime | None = None
    will_retry: bool = False
    excluded: bool = False
    received_at: datetime | None = None
