"""How a run stood at a moment, so that yesterday's report can be made again today."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from gradwatch_slo.runs import RunFacts, Status


@dataclass(frozen=True, slots=True)
class Standing:
    """A run as of a moment: what had happened by then, and no more.

    ``ended`` is None while the run goes on: running, about to be retried, or ended after the moment. Moments
    are clamped to [started, received], so that no host's wrong clock moves a run into another window.
    """

    run: RunFacts
    status: Status
    started: datetime
    ended: datetime | None
    reached: datetime | None


def standings(runs: Iterable[RunFacts], now: datetime, as_of: datetime) -> list[Standing]:
    """Return how the runs that had started by ``as_of`` stood then, by what is known at ``now``."""
    return [
        standing for run in runs if (standing := _standing(run, now, as_of)) is not None and not run.excluded
    ]


def _standing(run: RunFacts, now: datetime, as_of: datetime) -> Standing | None:
    received = run.received_at or now
    started = min(run.started_at, received)
    if started > as_of:
        return None

    def by_then(moment: datetime | None) -> datetime | None:
        if moment is None:
            return None
        moment = min(max(moment, started), received)
        return moment if moment <= as_of else None

    over = run.status is not Status.RUNNING and not run.will_retry
    ended = by_then(run.ended_at) if over else None
    return Standing(
        run=run,
        status=Status.RUNNING if ended is None else run.status,
        started=started,
        ended=ended,
        reached=by_then(run.target_reached_at),
    )
