"""One rank that all others wait for, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from gradwatch import conventions as c
from gradwatch_collector.findings.figures import SECOND, between, by_rank, export_seconds, finite, total
from gradwatch_collector.findings.levels import median, rounded
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting, limited
from gradwatch_collector.findings.run_view import Number, RunView
from gradwatch_slo.runs import Status

_COLLECTIVE: Final = c.COLLECTIVE_DURATION.name
_PHASE: Final = c.PHASE_DURATION.name
_PARTS: Final = 3
_EACH_PHASE: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """A rank lags if the others wait longer than it does.

    Attributes:
        share: By this share of a step.
        least: And by so many seconds.
        intervals: In each third of so many export intervals.
        values: In which there must be so many measured values of each rank; else they are as many more.
    """

    share: float = limited(0.3, most=1.0)
    least: float = 0.005
    intervals: float = 3.0
    values: int = 12


_Window = tuple[int, int]
# Of one rank: mean waiting time of a step in a window, and of how many values.
_Wait = Callable[[_Window], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class _Lag:
    rank: int
    seconds: float
    least: float
    others: float


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a live run with a rank that lags.

    All steps of a group that waits for each other take equally long. Whoever waits least is who is waited for.
    """
    durations = by_rank(view.every(c.STEP_DURATION))
    if len(durations) < 2 or view.run.status is not Status.RUNNING:
        return None
    told = [finite(each.recent) for each in durations.values()]
    if not all(map(len, told)):
        return None
    until = min(int(each.times[-1]) for each in told)
    step = max(median(each.values[-64:]) for each in told)
    # Of phases there are at most ten values a second. Twice as many as are wanted: no step is like the next.
    seconds = max(parameters.intervals * export_seconds(view), 2 * parameters.values * max(step, _EACH_PHASE))
    for source, waits in _sources(view, durations):
        lags = [_lag(waits, window, parameters) for window in _windows(until, seconds)]
        known = [lag for lag in lags if lag is not None]
        if len(known) < _PARTS:
            continue
        if len({lag.rank for lag in known}) > 1 or not step > 0:
            return None
        if any(lag.seconds < max(parameters.least, parameters.share * step) for lag in known):
            return None
        rank = known[0].rank
        return Sighting(
            rank=rank,
            step=view.step_at(until),
            evidence={
                "others_wait_seconds": rounded(median([lag.others for lag in known])),
                "it_waits_seconds": rounded(median([lag.least for lag in known])),
                "share_of_step": rounded(median([lag.seconds for lag in known]) / step),
                "step_seconds": rounded(step),
                "by": source,
                **_data_wait(view, rank, (until - int(seconds * SECOND), until)),
            },
        )
    return None


def _windows(until: int, seconds: float) -> Sequence[_Window]:
    edges = [until - int(seconds * SECOND * part / _PARTS) for part in range(_PARTS, -1, -1)]
    return list(pairwise(edges))


def _lag(waits: Mapping[int, _Wait], window: _Window, parameters: Parameters) -> _Lag | None:
    """Return by how much the others wait longer than the one that waits least."""
    measured = {rank: wait(window) for rank, wait in waits.items()}
    if any(_PARTS * count < parameters.values for _, count in measured.values()):
        return None
    rank = min(measured, key=lambda each: (measured[each][0], each))
    least = measured[rank][0]
    others = median([wait for each, (wait, _) in measured.items() if each != rank])
    return _Lag(rank, others - least, least, others)


def _sources(view: RunView, durations: Mapping[int, Number]) -> Iterator[tuple[str, Mapping[int, _Wait]]]:
    """Yield what may tell how long each rank waits: what tells most of it first."""
    called: dict[int, list[Number]] = {}
    for each in view.numbers.get(f"{_COLLECTIVE} sum", ()):
        if each.rank in durations and each.attributes.get(c.COLLECTIVE) not in (
            c.DDP_ALL_REDUCE,
            c.DDP_EXPOSED,
        ):
            called.setdefault(each.rank, []).append(each)
    if len(called) > 1:
        yield (
            "collective operations",
            {rank: _per_step(totals, durations[rank]) for rank, totals in called.items()},
        )
    backward = by_rank(
        each for each in view.numbers.get(_PHASE, ()) if each.attributes.get(c.PHASE) == "backward"
    )
    if len(backward) > 1:
        yield "backward", {rank: _per_value(each) for rank, each in backward.items()}
    reduced = _of_ddp(view, "sum"), _of_ddp(view, "count")
    ranks = reduced[0].keys() & reduced[1].keys()
    if len(ranks) > 1:
        yield "all-reduce", {rank: _per_count(reduced[0][rank], reduced[1][rank]) for rank in ranks}


def _of_ddp(view: RunView, field: str) -> Mapping[int, Number]:
    told = view.numbers.get(f"{_COLLECTIVE} {field}", ())
    return by_rank(each for each in told if each.attributes.get(c.COLLECTIVE) == c.DDP_ALL_REDUCE)


def _per_step(totals: Sequence[Number], steps: Number) -> _Wait:
    def wait(window: _Window) -> tuple[float, float]:
        _, count = total(steps, *window)
        waited = sum(total(each, *window)[0] for each in totals)
        return (waited / count, count) if count else (0.0, 0.0)

    return wait


def _per_value(number: Number) -> _Wait:
    def wait(window: _Window) -> tuple[float, float]:
        known = finite(between(number.recent, *window))
        # A median: one long backward is no lasting lag.
        return (median(known.values), float(len(known))) if len(known) else (0.0, 0.0)

    return wait


def _per_count(waited: Number, counted: Number) -> _Wait:
    def wait(window: _Window) -> tuple[float, float]:
        count, _ = total(counted, *window)
        return (total(waited, *window)[0] / count, count) if count > 0 else (0.0, 0.0)

    return wait


def _mean(number: Number, window: _Window) -> float:
    summed, count = total(number, *window)
    return summed / count if count else 0.0


def _data_wait(view: RunView, rank: int, window: _Window) -> dict[str, float | None]:
    """Return how long the rank waits for its data in a step, if that is known: it may be why."""
    told = by_rank(view.every(c.DATA_WAIT)).get(rank)
    return {} if told is None else {"data_wait_seconds": rounded(_mean(told, window))}


RULE = RunRule(
    name=c.RULE_STRAGGLER,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    # What is a window of slow steps: one that cannot be told from chance is no all-clear.
    clears_after=600.0,
    cause="One rank takes longer than the others for its own part of a step, and all wait for it: a device "
    "that is hot or shared, a slow host or disk, or more work than the others have.",
    action="Look at the rank's host: clocks and temperature of its device (`nvidia-smi -q -d PERFORMANCE`), "
    "other processes, its disk; where its data wait is long, at its data loader. Replace the host if it stays "
    "slow.",
)
