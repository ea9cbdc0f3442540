"""Objectives beside how they stood in the window before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime

from sqlalchemy import Connection

from gradwatch_collector.objectives.evaluation import Counted, count_objectives
from gradwatch_collector.runs.facts import moment, nanos
from gradwatch_slo.counts import Counts
from gradwatch_slo.objective import Objective
from gradwatch_slo.periods import moment_before
from gradwatch_slo.report import ObjectiveReport


def compare_with_previous(
    connection: Connection, objectives: Sequence[Objective], now: int, *, past: bool = False
) -> list[tuple[Objective, ObjectiveReport]]:
    """Evaluate objectives over the windows at ``now`` (Unix nanoseconds), each beside the window before it.

    ``past``: ``now`` has been. The two windows share no moment. A group of which something was counted in one
    of them is reported.
    """
    # Objectives of the same window are looked at together: they share what they count.
    by_moment: dict[datetime, list[Objective]] = {}
    for objective in objectives:
        by_moment.setdefault(moment_before(objective.window.at(moment(now))), []).append(objective)
    previous = {
        counted.objective: counted
        for at, some in by_moment.items()
        for counted in count_objectives(connection, some, nanos(at), past=True)
    }
    current = count_objectives(connection, objectives, now, past=past)
    return [
        (counted.objective, report)
        for counted in current
        for report in _beside(counted, previous[counted.objective])
    ]


def _beside(current: Counted, previous: Counted) -> Iterator[ObjectiveReport]:
    groups = [*current.counts, *(each for each in previous.counts if each not in current.counts)]
    reports, before = (
        replace(each, counts={group: each.counts.get(group, Counts()) for group in groups}).reports()
        for each in (current, previous)
    )
    for report, earlier in zip(reports, before, strict=True):
        yield replace(report, previous=earlier)
