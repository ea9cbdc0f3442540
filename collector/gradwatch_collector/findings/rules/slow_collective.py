"""Collective operations that take longer than they did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.levels import median, rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Doubles, Number, RunView
from gradwatch_collector.records import Times
from gradwatch_collector.runs.telling import number
from gradwatch_slo.runs import Status

_NAME: Final = c.COLLECTIVE_DURATION.name
_LEAST_PREDECESSORS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Slow is ``ratio`` times what it was, and ``seconds`` more, in each of the newest ``intervals``.

    What it was is the run's own first ``start`` intervals, and the 95th percentile of its predecessors.
    """

    ratio: float = limited(3.0, least=1.0)
    seconds: float = 0.01
    intervals: int = 3
    start: int = 5


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a live run with an operation that is slow for every rank that tells of it.

    Where one rank comes late, the others wait for it; but the operation is as fast for the late one as it was.
    """
    if view.run.status is not Status.RUNNING:
        return None
    for operation, ranks in _by_operation(view).items():
        # The rank for which it is fastest has waited for no other.
        rank, (times, means) = min(ranks.items(), key=lambda each: _newest(each[1][1], parameters))
        if len(means) < parameters.intervals:
            continue
        late = means[-parameters.intervals :]
        for against, usual in _usual(view, means, parameters):
            if np.all(late > max(parameters.ratio * usual, usual + parameters.seconds)):
                return Sighting(
                    rank=rank if len(ranks) == 1 else None,
                    step=view.step_at(int(times[-parameters.intervals])),
                    since=int(times[-parameters.intervals]),
                    evidence={
                        "operation": operation,
                        "seconds": rounded(median(late)),
                        "usual_seconds": rounded(usual),
                        "against": against,
                        "ratio": rounded(median(late) / usual) if usual else None,
                        "ranks": len(ranks),
                    },
                )
    return None


def _by_operation(view: RunView) -> Mapping[str, Mapping[int, tuple[Times, Doubles]]]:
    """Return the mean of each interval, by operation and rank."""
    counts = {_place(each): each for each in view.numbers.get(f"{_NAME} count", ())}
    found: dict[str, dict[int, tuple[Times, Doubles]]] = {}
    for total in view.numbers.get(f"{_NAME} sum", ()):
        operation, count = str(total.attributes.get(c.COLLECTIVE)), counts.get(_place(total))
        if count is not None and operation != c.DDP_EXPOSED:
            means = interval_means(total, count)
            if len(means[0]):
                found.setdefault(operation, {})[total.rank] = means
    return found


def interval_means(total: Number, count: Number) -> tuple[Times, Doubles]:
    """Return when each of the newest intervals ended, and the mean of what was measured in it."""
    times, sums, counts = total.recent.times, total.recent.values, count.recent.values
    if not np.array_equal(times, count.recent.times):
        return times[:0], sums[:0]
    known = np.isfinite(sums) & np.isfinite(counts) & (counts >= 1)
    return times[known], sums[known] / counts[known]


def _place(each: Number) -> tuple[int, str]:
    return each.rank, str(each.attributes.get(c.COLLECTIVE))


def _newest(means: Doubles, parameters: Parameters) -> float:
    return median(means[-parameters.intervals :])


def _usual(view: RunView, means: Doubles, parameters: Parameters) -> Iterator[tuple[str, float]]:
    # The very first are of connections being made.
    start = means[1 : parameters.start + 1]
    if len(means) >= parameters.start + 1 + parameters.intervals:
        yield "the start of the run", median(start)
    told = [number(each.summary.get("collective_p95")) for each in view.predecessors]
    known = [each for each in told if each is not None and each > 0]
    if len(known) >= _LEAST_PREDECESSORS:
        yield "the 95th percentile of predecessors", median(known)


RULE = RunRule(
    name=c.RULE_SLOW_COLLECTIVE,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="The network between the ranks is slower than it was: congestion, a link that fell back to a lower "
    "rate, or traffic that goes another way (TCP where it was InfiniBand or NVLink).",
    action="Compare with other runs on the same hosts; look at link rates and error counters, and at what "
    "`NCCL_DEBUG=INFO` says of the transport.",
)
