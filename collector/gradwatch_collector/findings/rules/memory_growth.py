"""Memory that keeps growing, and that will run out before long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.figures import SECOND, export_seconds, finite, newest
from gradwatch_collector.findings.levels import rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Doubles, Number, RunView
from gradwatch_slo.runs import Status

_PARTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Memory grows if it does so all the time, at a pace that reaches the limit before long.

    Attributes:
        intervals: For so many export intervals at least.
        warm_up: Without the first so many of the run: libraries are loaded and allocators fill their caches.
        horizon: How far ahead the limit may be, in seconds.
        lookahead: The same, as a multiple of the time for which it has grown: a minute says little about a day.
        rise: How much must have been added, as a share of the limit.
        even: What the slowest part of the time must have added, as a share of the mean.
    """

    intervals: float = 12.0
    warm_up: float = 12.0
    horizon: float = 86_400.0
    lookahead: float = 10.0
    rise: float = limited(0.05, most=1.0)
    even: float = limited(0.4, most=1.0)


@dataclass(frozen=True, slots=True)
class _Growth:
    """Of one place: what is held and how much is the most, in bytes; growth in bytes a second."""

    rank: int
    evidence: dict[str, Any]
    since: int
    seconds_left: float


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a live run of which a process or a device will be full within the horizon."""
    if view.run.status is not Status.RUNNING:
        return None
    growing = [found for place in _places(view) if (found := _growth(view, *place, parameters)) is not None]
    if not growing:
        return None
    worst = min(growing, key=lambda each: each.seconds_left)
    return Sighting(rank=worst.rank, step=view.step_at(worst.since), since=worst.since, evidence=worst.evidence)


def _places(view: RunView) -> Iterator[tuple[str, Number, float]]:
    """Yield name, memory in use and limit of each device and process."""
    limits = {(each.rank, _device(each)): newest(each) for each in view.every(c.DEVICE_MEMORY_LIMIT)}
    for each in view.every(c.DEVICE_MEMORY_ALLOCATED):
        limit = limits.get((each.rank, _device(each)))
        if limit is not None:
            yield _device(each), each, limit
    hosts = {each.rank: newest(each) for each in view.every(c.HOST_MEMORY_LIMIT)}
    for each in view.every(c.PROCESS_MEMORY):
        limit = hosts.get(each.rank)
        if limit is not None:
            yield "process", each, limit


def _device(number: Number) -> str:
    return str(number.attributes.get(c.DEVICE, ""))


def _growth(view: RunView, name: str, used: Number, limit: float, p: Parameters) -> _Growth | None:
    """Return how it grows in the newest half of the time, or in a newer part; the longest that shows it."""
    known, held = used.course.least[used.course.finite > 0], newest(used)
    if held is None or not 0 < limit < np.inf or held - float(np.min(known)) < p.rise * limit:
        return None
    interval, until = export_seconds(view), int(used.recent.times[-1])
    first = int(used.course.times[0]) + int(p.warm_up * interval * SECOND)
    lasted = (until - first) / SECOND / 2
    while lasted >= p.intervals * interval:
        since = until - int(lasted * SECOND)
        floors = _floors(used, since, until)
        left = None if floors is None else _seconds_left(*floors, limit, p)
        if floors is not None and left is not None:
            evidence = {
                "where": name,
                "bytes": round(held),
                "limit_bytes": round(limit),
                "headroom": rounded(max(limit - held, 0.0) / limit),
                "bytes_per_hour": round(_pace(*floors) * 3600),
                "grew_for_seconds": round(lasted),
                "full_in_seconds": round(left),
                **_allocator(view, used),
            }
            return _Growth(used.rank, evidence, since, left)
        lasted /= 2
    return None


def _floors(used: Number, since: int, until: int) -> tuple[Doubles, Doubles] | None:
    """Return when, in seconds, the least of each quarter of the time was held, and how much that was.

    None where the last is not more than was ever held before.
    """
    recent, course = finite(used.recent), used.course
    if len(recent) and (recent.times[0] <= since or course.width == 1):
        times, least = recent.times, recent.values
    else:
        whole = course.finite > 0
        times, least = course.times[whole], course.least[whole]
    edges = np.searchsorted(times, np.linspace(since, until, _PARTS + 1).astype(np.int64), side="right")
    if np.any(np.diff(edges) < 2):
        return None
    places = [start + int(np.argmin(least[start:end])) for start, end in pairwise(edges.tolist())]
    before = course.most[(course.finite > 0) & (course.times <= since)]
    # What is held and freed again and again comes back to where it was.
    if least[places[-1]] <= np.max(before, initial=-np.inf):
        return None
    return (times[places] - since) / SECOND, least[places]


def _pace(times: Doubles, floors: Doubles) -> float:
    """Return bytes a second."""
    return float(floors[-1] - floors[0]) / float(times[-1] - times[0])


def _seconds_left(times: Doubles, floors: Doubles, limit: float, p: Parameters) -> float | None:
    """Return when the limit will be reached; None where there is no lasting growth, or that is far away."""
    paces, pace = np.diff(floors) / np.diff(times), _pace(times, floors)
    if floors[-1] - floors[0] < p.rise * limit or not float(np.min(paces)) > max(p.even, 0.0) * pace:
        return None
    # What slows down by the same share from quarter to quarter, as a cache that fills, comes to an end.
    slowing, quarter = float(paces[-1] / paces[0]) ** 0.5, float(times[-1] - times[0]) / len(paces)
    if slowing < 1 and floors[-1] + paces[-1] * quarter * slowing / (1 - slowing) < limit:
        return None
    left = max(limit - float(floors[-1]), 0.0) / pace
    return left if left <= min(p.horizon, p.lookahead * (float(times[-1]) + quarter)) else None


def _allocator(view: RunView, used: Number) -> dict[str, float]:
    """Return what torch's allocator says of the device: its peak, and what it holds in vain."""
    found: dict[str, float] = {}
    for name, metric in (
        ("peak_bytes", c.DEVICE_MEMORY_PEAK),
        ("fragmentation", c.DEVICE_MEMORY_FRAGMENTATION),
    ):
        for each in view.every(metric):
            if (each.rank, _device(each)) == (used.rank, _device(used)) and (value := newest(each)) is not None:
                found[name] = value
    return found


RULE = RunRule(
    name=c.RULE_MEMORY_GROWTH,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="Something is kept in every step that should be freed: a loss with its graph in a list or a running "
    "sum, a cache without a bound, a data loader that collects what it has read.",
    action="Keep `loss.item()` in place of `loss`, and look for what grows with "
    "`torch.cuda.memory_snapshot()` or `tracemalloc`; save a checkpoint before the time of the finding is "
    "over.",
)
