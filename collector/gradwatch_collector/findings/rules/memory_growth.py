"""Memory that keeps growing, and that will run out before long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradwatch import conventions as c
from gradwatch_collector.findings.figures import SECOND, finite, newest, rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import Doubles, Number, RunView
from gradwatch_collector.records import Times
from gradwatch_slo.runs import Status

_PARTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Memory grows if it does so all the time, at a pace that reaches the limit before long.

    Attributes:
        seconds: How long the growth must have gone on at least, the first ``warm_up`` seconds of the run left
            out: allocators fill their caches in them.
        warm_up: In seconds.
        horizon: How far ahead the limit may be, in seconds.
        lookahead: The same, as a multiple of the time that was looked at: a minute says little about a day.
        rise: How much must have been added, as a share of what was held and of what is left.
        even: What the slowest quarter of the time must have added, as a share of an even quarter. What grows by
            steps that become rare, as a cache does, is no leak.
    """

    seconds: float = 20.0
    warm_up: float = 5.0
    horizon: float = 86_400.0
    lookahead: float = 20.0
    rise: float = 0.05
    even: float = 0.4


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
    times, floors = _floors(used)
    if len(times) < 2 * _PARTS:
        return None
    began = max(int(times[0]), view.run.started_at) + int(p.warm_up * SECOND)
    # The newer half, once that is long enough: what a run takes at its start says little of its later pace.
    began = max(began, min((int(times[0]) + int(times[-1])) // 2, int(times[-1]) - int(p.seconds * SECOND)))
    late = times >= began
    times, floors = times[late], floors[late]
    if len(times) < 2 * _PARTS:
        return None
    lasted, added = (int(times[-1]) - int(times[0])) / SECOND, float(floors[-1] - floors[0])
    now, room = float(floors[-1]), limit - float(floors[-1])
    if lasted < 0.9 * p.seconds or added <= 0 or not now > 0 or not np.isfinite(limit):
        return None
    left = max(room, 0.0) * lasted / added
    if (
        left > min(p.horizon, p.lookahead * lasted)
        or added < p.rise * min(float(floors[0]), max(room, 0.0) + added)
        or _slowest(times, floors) < p.even * added / _PARTS
    ):
        return None
    evidence = {
        "where": name,
        "bytes": round(now),
        "limit_bytes": round(limit),
        "headroom": rounded(max(room, 0.0) / limit),
        "bytes_per_hour": round(added / lasted * 3600),
        "grew_for_seconds": round(lasted),
        "full_in_seconds": round(left),
        **_allocator(view, used),
    }
    return _Growth(used.rank, evidence, int(times[0]), left)


def _floors(used: Number) -> tuple[Times, Doubles]:
    """Return what was held at least from then on, of the whole run."""
    course = used.course
    if course.width > 1:
        known = course.finite > 0
        times, least = course.times[known], course.least[known]
    else:
        recent = finite(used.recent)
        times, least = recent.times, recent.values
    # What is freed again was no leak: from the end, the least so far.
    return times, np.minimum.accumulate(least[::-1])[::-1]


def _slowest(times: Times, floors: Doubles) -> float:
    edges = np.linspace(float(times[0]), float(times[-1]), _PARTS + 1)
    return float(np.min(np.diff(np.interp(edges, times.astype(np.float64), floors))))


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
