"""How often training is interrupted, and how soon that is noticed and made good (M12). Reported, and no SLI.

*Mean time to interrupt*: time in which attempts ran, over the number of interruptions in it. Attempts that go
on, or end well, count with the time they ran: leaving them out would make a reliable fleet look as bad as the
few attempts that failed. Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning Research
Clusters" (2024), estimate the mean time to failure of training jobs so.

*Mean time to detect*: from an interruption until it was recorded. Of an attempt that fell silent it begins with
its last sign of life, and ends when it is missed, or the next attempt of the run is heard of before that.

*Mean time to recover*: from an interruption until the next attempt of the same run watches its training. Steps
that are done again after that are no part of it (effective training time has them); and runs that nobody
continued are counted apart, as nothing is known of how long theirs would have taken.

An interruption is an attempt that failed, was lost, or was preempted, whether it was tried again or not. One
that a person cancelled, or that ended well, is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradwatch_slo.runs import REASON_PREEMPTED, Status


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFacts:
    """One attempt of a run. Moments in Unix nanoseconds.

    ``ended_at``: None while it runs; of a lost one the last sign of life. ``detected_at``: when its ending was
    recorded, None if that is not known. ``resumed_at``: when the next attempt of the run began, if one did.
    """

    status: Status
    reason: str | None
    started_at: int
    ended_at: int | None
    detected_at: int | None
    resumed_at: int | None

    @property
    def is_interruption(self) -> bool:
        """Whether it ended otherwise than by itself or by somebody's wish."""
        return self.status in (Status.FAILED, Status.LOST) or (
            self.status is Status.CANCELLED and self.reason == REASON_PREEMPTED
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruptions:
    """Of attempts within a window. Nanoseconds; means are None where there is nothing to take them of.

    ``running``: time in which attempts ran. ``detected`` and ``recovered``: of how many interruptions that is
    known, which is what the mean is of.
    """

    attempts: int
    interruptions: int
    running: int
    detected: int
    recovered: int
    mean_time_to_interrupt: float | None
    mean_time_to_detect: float | None
    mean_time_to_recover: float | None


def interruptions(attempts: Iterable[AttemptFacts], start: int, end: int) -> Interruptions:
    """Return how attempts fared from ``start`` (inclusive) to ``end`` (exclusive), Unix nanoseconds.

    Of an attempt the part within the window counts as running; an interruption belongs to the window that it
    happened in, also if it is detected or made good after it.
    """
    within = [each for each in attempts if each.started_at < end and _until(each, end) >= start]
    running = sum(max(0, min(_until(each, end), end) - max(each.started_at, start)) for each in within)
    broken = [
        (each, each.ended_at)
        for each in within
        if each.is_interruption and each.ended_at is not None and start <= each.ended_at < end
    ]
    detect = [max(0, each.detected_at - at) for each, at in broken if each.detected_at is not None]
    recover = [max(0, each.resumed_at - at) for each, at in broken if each.resumed_at is not None]
    return Interruptions(
        attempts=len(within),
        interruptions=len(broken),
        running=running,
        detected=len(detect),
        recovered=len(recover),
        mean_time_to_interrupt=running / len(broken) if broken else None,
        mean_time_to_detect=_mean(detect),
        mean_time_to_recover=_mean(recover),
    )


def _until(attempt: AttemptFacts, end: int) -> int:
    return end if attempt.ended_at is None else attempt.ended_at


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if values else None
