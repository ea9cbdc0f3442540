"""How a run stands, decided from how its processes stand. Pure: no SQL, no clock.

The rules are the run-status contract: an attempt failed if any rank failed and the first to fail is the
cause, whatever its peers report after being terminated; it is lost only if all its ranks fell silent; a run
stands as its latest attempt does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradwatch_slo.runs import Status

REASON_HEARTBEAT_TIMEOUT = "heartbeat_timeout"


@dataclass(frozen=True, slots=True)
class ProcessState:
    """One process of an attempt. Moments in Unix nanoseconds; ``ended_at`` is None while it runs."""

    rank: int
    status: Status
    reason: str | None
    started_at: int
    ended_at: int | None
    last_seen_at: int


@dataclass(frozen=True, slots=True)
class AttemptState:
    """How an attempt stands, and which rank decided that."""

    status: Status
    reason: str | None
    cause_rank: int | None
    rank_count: int
    started_at: int
    ended_at: int | None
    last_seen_at: int


def roll_up(processes: Sequence[ProcessState]) -> AttemptState:
    """Decide how an attempt stands from its processes (at least one).

    A rank that was started again within the attempt stands as its newest process.
    """
    newest: dict[int, ProcessState] = {}
    for process in processes:
        held = newest.get(process.rank)
        if held is None or process.started_at >= held.started_at:
            newest[process.rank] = process
    ranks = list(newest.values())
    status, reason, cause = _verdict(ranks)
    ended_at: int | None = None
    if status is not Status.RUNNING:
        ended_at = (
            _end(cause) if status is Status.FAILED and cause is not None else max(_end(rank) for rank in ranks)
        )
    return AttemptState(
        status=status,
        reason=reason,
        cause_rank=None if cause is None else cause.rank,
        rank_count=len(ranks),
        started_at=min(process.started_at for process in processes),
        ended_at=ended_at,
        last_seen_at=max(process.last_seen_at for process in processes),
    )


def _verdict(ranks: Sequence[ProcessState]) -> tuple[Status, str | None, ProcessState | None]:
    by_status = {status: [rank for rank in ranks if rank.status is status] for status in Status}
    if failed := by_status[Status.FAILED]:
        cause = min(failed, key=_end)
        return Status.FAILED, cause.reason, cause
    if by_status[Status.RUNNING]:
        return Status.RUNNING, None, None
    if lost := by_status[Status.LOST]:
        cause = min(lost, key=_end)
        # Some ranks told how they ended, so the machine did not vanish: the silent one died.
        status = Status.LOST if len(lost) == len(ranks) else Status.FAILED
        return status, cause.reason, cause
    if cancelled := by_status[Status.CANCELLED]:
        cause = min(cancelled, key=_end)
        return Status.CANCELLED, cause.reason, cause
    return Status.SUCCEEDED, None, None


def _end(process: ProcessState) -> int:
    return process.last_seen_at if process.ended_at is None else process.ended_at
