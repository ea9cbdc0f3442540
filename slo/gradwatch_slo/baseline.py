"""What is usual for a job: the time-to-convergence threshold of runs that bring none.

A run's threshold is frozen at its start: 1.5 x the median time to target of the runs of the same job, model
and dataset that had reached their target and ended ``succeeded`` by then. Later runs cannot move it. Whether
an earlier run met its own threshold does not matter: otherwise the first five runs, which have none, could
never found a baseline, and a job that became slower for good would be measured by its past for ever.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from operator import itemgetter
from typing import Final

from gradwatch_slo.runs import Status
from gradwatch_slo.standing import Standing

FEWEST_RUNS: Final = 5


def baseline_thresholds(standings: Iterable[Standing]) -> Mapping[str, timedelta]:
    """Return 1.5 x p50 by run id, for the runs with at least five earlier good ones. O(n log n)."""
    # One sweep over time. At the same moment a run that ends comes before one that starts, as jobs are run
    # back to back; but a run that took no time must not be its own baseline.
    moments: list[tuple[datetime, int, Standing]] = []
    for standing in standings:
        moments.append((standing.started, 1, standing))
        if standing.ended is not None and standing.status is Status.SUCCEEDED and standing.reached is not None:
            moments.append((standing.ended, 0 if standing.started < standing.ended else 2, standing))
    moments.sort(key=itemgetter(0, 1))
    medians: dict[tuple[str, str | None, str | None], _RunningMedian] = {}
    thresholds: dict[str, timedelta] = {}
    for _, kind, standing in moments:
        run = standing.run
        median = medians.setdefault((run.job, run.model, run.dataset), _RunningMedian())
        if kind != 1:
            assert standing.reached is not None  # chosen so above
            median.add(standing.reached - standing.started)
        elif len(median) >= FEWEST_RUNS:
            thresholds[run.run_id] = median.doubled() * 3 / 4
    return thresholds


class _RunningMedian:
    """The median of what was added so far, in two heaps."""

    def __init__(self) -> None:
        self._low: list[timedelta] = []  # negated: heapq keeps the smallest on top
        self._high: list[timedelta] = []

    def __len__(self) -> int:
        return len(self._low) + len(self._high)

    def add(self, value: timedelta) -> None:
        heapq.heappush(self._high, -heapq.heappushpop(self._low, -value))
        if len(self._high) > len(self._low):
            heapq.heappush(self._low, -heapq.heappop(self._high))

    def doubled(self) -> timedelta:
        """Return twice the median: the mean of the two in the middle needs no rounding then."""
        return -2 * self._low[0] if len(self._low) > len(self._high) else self._high[0] - self._low[0]
