"""NaN or Inf in a loss or gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Final

from sqlalchemy import Connection, and_, select

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_collector.findings.rule import ParametersOf, SceneRule
from gradwatch_collector.runs.clocks import Clock
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.runs.telling import integer, text
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched

_Report = Mapping[str, Any]
# Of a process's bad steps, so many are told one by one.
_TOLD_EACH: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """When it is loud, and when it is over.

    Attributes:
        steps: So many non-finite steps, or more, are repeated, and page,
        window: if they lie within so many steps.
        good_steps: It is resolved after so many steps without one; what comes later is another occurrence.
    """

    steps: int = 3
    window: int = 100
    good_steps: int = 1000


def detect(scene: Scene, parameters_of: ParametersOf) -> Iterable[Observation]:
    """Yield one observation for each attempt with non-finite steps; repeated ones are loud.

    Those of an earlier attempt are over, and so are they after enough good steps.
    """
    runs = {run.run_id: run for run in scene.runs}
    parameters = {run.run_id: known for run in scene.runs if (known := parameters_of(run)) is not None}
    for (run_id, attempt), group in groupby(
        _reports(scene.connection, list(parameters)), key=lambda row: (row["run_id"], row["attempt"])
    ):
        run, events = runs[run_id], _newest(list(group), parameters[run_id])
        first = _first(events)
        attributes = first["attributes"]
        repeated = is_repeated(events, parameters[run_id])
        yield Observation(
            run_id=run_id,
            attempt=attempt,
            rule=c.RULE_NONFINITE,
            severity=Severity.for_tier(run.tier) if repeated else Severity.TICKET,
            first_seen=first["time"],
            last_seen=max(row["time"] for row in events),
            is_over=attempt != run.attempt or _is_over(run, events, parameters[run_id]),
            rank=first["rank"],
            step=integer(attributes.get(c.STEP)),
            layer=text(attributes.get(c.LAYER_NAME)),
            born_in=born_in if (born_in := attributes.get(c.BORN_IN)) in c.BIRTHPLACES else None,
            evidence={
                "nonfinite_steps": max(map(_count, events)),
                "nonfinite_layers": integer(attributes.get(c.NONFINITE_LAYERS)),
                "nonfinite_elements": integer(attributes.get(c.NONFINITE_ELEMENTS)),
                # Where the step is not known.
                "earliest_step": integer(attributes.get(c.NONFINITE_EARLIEST)),
                "latest_step": integer(attributes.get(c.NONFINITE_LATEST)),
                "repeated": repeated,
            },
        )


def _reports(connection: Connection, runs: Sequence[str]) -> Iterator[_Report]:
    """Yield the events, their times by our clock: a sender's may be behind, and old events page nobody."""
    event, process = schema.event.c, schema.process.c
    key = ("run_id", "attempt", "rank", "instance")
    for some in batched(runs):
        rows = connection.execute(
            select(
                event.run_id,
                event.attempt,
                event.rank,
                event.time,
                event.sequence,
                event.received_at,
                event.attributes,
                process.clock,
            )
            .outerjoin(schema.process, and_(*(event[name] == process[name] for name in key)))
            .where(event.name == c.NONFINITE_STEP.name, event.run_id.in_(some))
            .order_by(event.run_id, event.attempt, event.time)
        ).mappings()
        for row in rows:
            clock = Clock() if row["clock"] is None else Clock(**row["clock"])
            yield {**row, "time": clock.ours(row["time"], row["received_at"])}


def is_repeated(events: Sequence[_Report], parameters: Parameters) -> bool:
    """Return whether so many bad steps fell within so many.

    The agent reports each of a process's first ten bad steps, then the hundredth, the thousandth...: between
    two reports the share of bad steps decides.
    """
    for reports in _by_rank(events).values():
        for index, (step, count) in enumerate(reports):
            for later_step, later_count in reports[index + 1 :]:
                steps = later_step - step + 1
                bad = min(later_count - count + 1, steps)
                if bad >= parameters.steps and bad * parameters.window >= parameters.steps * max(
                    steps, parameters.window
                ):
                    return True
    return False


def _newest(events: Sequence[_Report], parameters: Parameters) -> Sequence[_Report]:
    """Return what came after the last time that all was good for long."""
    ranks = _by_rank(events).values()
    steps = sorted({step for reports in ranks for step, _ in reports})
    for before, after in reversed(list(pairwise(steps))):
        if after - before > parameters.good_steps and all(_is_good(each, before, after) for each in ranks):
            return [row for row in events if _step(row) >= after]
    return events


def _is_good(reports: Sequence[tuple[int, int]], before: int, after: int) -> bool:
    """Return whether a rank had no bad step between two that it, or another, told."""
    earlier = [count for step, count in reports if step <= before]
    later = [count for step, count in reports if step >= after]
    if not earlier:
        return True
    return later[0] - earlier[-1] <= 1 if later else earlier[-1] < _TOLD_EACH


def _is_over(run: RunRow, events: Sequence[_Report], parameters: Parameters) -> bool:
    """Return whether the run has taken so many good steps since.

    The first ten are told one by one. After that ten times as many may have come before the next is told.
    """
    if run.last_loss_nonfinite or run.last_step is None:
        return False
    for reports in _by_rank(events).values():
        (first, _), (last, count) = reports[0], reports[-1]
        quiet = parameters.good_steps if count < _TOLD_EACH else 10 * (last - first + 1)
        if run.last_step - last < max(quiet, parameters.good_steps):
            return False
    return True


def _by_rank(events: Iterable[_Report]) -> Mapping[int, Sequence[tuple[int, int]]]:
    """Return step and number of the reports of each rank, in order."""
    by_rank: dict[int, list[tuple[int, int]]] = {}
    for row in events:
        by_rank.setdefault(row["rank"], []).append((_step(row), _count(row)))
    return {rank: sorted(reports) for rank, reports in by_rank.items()}


def _first(events: Sequence[_Report]) -> _Report:
    """Return the event that tells best where it began: the first one of some rank.

    What else a rank says of the same step (two optimizers, a loss after the parameters) is a consequence.
    """
    firsts: dict[int, _Report] = {}
    for row in sorted(events, key=lambda row: (_step(row), row["time"], row["sequence"])):
        firsts.setdefault(row["rank"], row)
    return min(firsts.values(), key=lambda row: (_step(row), _standing(row), row["time"]))


def _standing(row: _Report) -> int:
    """Which of several ranks' events of one step to believe, the lowest first.

    First a rank that saw itself where it began: mean gradients make one rank's NaN every rank's. That
    parameters were bad already tells nothing beside an event that says since when they may be.
    """
    born_in = text(row["attributes"].get(c.BORN_IN))
    if born_in in c.BIRTHPLACES and born_in not in ("backward", "parameters"):
        return 0
    if row["attributes"].get(c.NONFINITE_LATEST) is not None:
        return 1
    return 2 if born_in == "parameters" else 3


def _step(row: _Report) -> int:
    """Step of an event, the last one it may be where that is not known."""
    attributes = row["attributes"]
    return integer(attributes.get(c.STEP)) or integer(attributes.get(c.NONFINITE_LATEST)) or 0


def _count(row: _Report) -> int:
    return integer(row["attributes"].get(c.NONFINITE_STEPS)) or 1


RULE = SceneRule(
    name=c.RULE_NONFINITE,
    severity=Severity.PAGE,
    detect=detect,
    parameters=Parameters(),
    has_birthplace=True,
    cause="A loss or gradient became NaN or Inf: a division by zero or log of zero, an overflow, a learning "
    "rate that is too high, or a corrupt batch.",
    action="Start at the step and layer of the finding; stop the run if the steps after it are non-finite too.",
)
