"""What one tick knew: runs, findings, objectives and counters, read from the database as they stand."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from sqlalchemy import ColumnElement, Connection, Row, func, select

from gradwatch_collector.findings import Finding, Observation, Severity, load_findings
from gradwatch_collector.findings.silences import load_silences, silenced_until
from gradwatch_collector.objectives.burn_rates import BurnRate, burn_rates
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_collector.runs.facts import (
    JobLabels,
    RunRow,
    load_headroom,
    load_runs,
    recent,
)
from gradwatch_collector.service.lease import last_done
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched
from gradwatch_slo.objective import Objective
from gradwatch_slo.report import ObjectiveReport
from gradwatch_slo.runs import Status

_NANOS: Final = 1_000_000_000
_SLOS_EVERY: Final = 15 * _NANOS
# Entries are numbered before they are committed: one may show after another with a higher number, but not for
# longer than this.
_SETTLES_AFTER: Final = 60 * _NANOS
_TIME_TO_TARGET_RUNS: Final = 20
# Jobs that `/metrics` has counters for: those that ran last.
_MAX_JOBS: Final = 1_000
_LOUDNESS: Final = tuple(Severity)
_HEALTH: Final = {
    Status.FAILED: 0,
    Status.LOST: 0,
    Status.RUNNING: 1,
    Status.CANCELLED: 2,
    Status.SUCCEEDED: 2,
}

_Entry = Row[int, str, str, int]  # history_id, run_id, status, recorded_at


@dataclass(frozen=True, slots=True)
class Counted:
    """What was counted: entries of ``run_history`` up to ``settled`` and some ``later`` ones, and findings."""

    settled: int
    finding_id: int
    open_findings: frozenset[int]
    later: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the last tick knew. ``runs``: live, or of an ending of the last hour, the sickest first.

    ``evaluated_at``: when whichever collector judges last did, so that all tell if none does.

    ``findings``: those that are open and not silenced, the loudest first. ``ended`` and ``opened`` count from
    when this collector started. ``headroom``: by run, as a share.
    """

    evaluated_at: int
    runs: Sequence[RunRow] = ()
    headroom: Mapping[str, float] = field(default_factory=dict)
    findings: Sequence[tuple[RunRow, Observation]] = ()
    ended: Counter[tuple[JobLabels, Status]] = field(default_factory=Counter)
    opened: Counter[tuple[JobLabels, str]] = field(default_factory=Counter)
    jobs: Sequence[JobLabels] = ()
    time_to_target: dict[JobLabels, float] = field(default_factory=dict)
    objectives: Sequence[ObjectiveReport] = ()
    burn_rates: Sequence[BurnRate] = ()
    slos_at: int = 0
    # None before the first tick, which counts nothing.
    counted: Counted | None = None


def look(connection: Connection, before: Snapshot, objectives: Sequence[Objective], now: int) -> Snapshot:
    """Return what stands now, the counters moved on by what has happened since ``before``.

    ``now`` in Unix nanoseconds. Objectives are evaluated again every 15 s, and when a run ended.
    """
    runs = recent_runs(connection, now)
    known = before.counted
    history = _history_since(connection, None if known is None else known.settled)
    stored = load_findings(connection, None if known is None else known.finding_id)
    shown = [found.told for found in stored if found.is_open]
    about = [*runs, *_others(connection, runs, shown)]
    place = {run.run_id: index for index, run in enumerate(about)}
    silences = load_silences(connection, now)
    snapshot = replace(
        before,
        evaluated_at=last_done(connection),
        runs=runs,
        headroom=load_headroom(connection, now),
        findings=[
            (run, o)
            for o in sorted(
                (o for o in shown if o.run_id in place),
                key=lambda o: (_LOUDNESS.index(o.severity), place[o.run_id]),
            )
            if silenced_until(silences, o.run_id, (run := about[place[o.run_id]]).job, o.rule) is None
        ],
        counted=_counted(known, history, stored, now) if known else _from_here(connection, history, stored),
    )
    if known is not None:
        history = [row for row in history if row.history_id not in known.later]
        snapshot = _count(connection, snapshot, history, _opened(stored, known))
    snapshot = _of_newest_jobs(snapshot)
    if now - before.slos_at >= _SLOS_EVERY or snapshot.ended != before.ended:
        snapshot = replace(
            snapshot,
            slos_at=now,
            objectives=evaluate_objectives(connection, objectives, now, quickly=True),
            burn_rates=burn_rates(connection, objectives, now),
            time_to_target=_time_to_target(connection),
        )
    return snapshot


def _others(connection: Connection, runs: Sequence[RunRow], shown: Sequence[Observation]) -> Iterator[RunRow]:
    """Yield runs that have been over for long, and of which something is found only now."""
    missing = sorted({each.run_id for each in shown} - {run.run_id for run in runs})
    for some in batched(missing):
        yield from load_runs(connection, schema.run.c.run_id.in_(some))


def recent_runs(connection: Connection, now: int) -> list[RunRow]:
    """Read the runs that are live, or of an ending of the last hour, the sickest first."""
    return sorted(load_runs(connection, recent(now)), key=lambda r: (_HEALTH[r.status], -r.started_at))


def _count(
    connection: Connection,
    snapshot: Snapshot,
    history: Sequence[_Entry],
    new: Sequence[Finding],
) -> Snapshot:
    """Count entries and findings that were not counted before."""
    ended, opened = snapshot.ended.copy(), snapshot.opened.copy()
    jobs = dict.fromkeys(snapshot.jobs)
    labels = {run.run_id: run.job_labels for run in snapshot.runs}

    def labels_of(run_id: str) -> JobLabels | None:
        if run_id not in labels:
            labels.update((run.run_id, run.job_labels) for run in load_runs(connection, _is(run_id)))
        return labels.get(run_id)

    for row in history:
        if job := labels_of(row.run_id):
            _move_to_end(jobs, job)
            if row.status != Status.RUNNING:
                ended[job, Status(row.status)] += 1
    for found in new:
        if job := labels_of(found.told.run_id):
            opened[job, found.told.rule] += 1
    return replace(snapshot, ended=ended, opened=opened, jobs=list(jobs))


def _of_newest_jobs(snapshot: Snapshot) -> Snapshot:
    """Leave out what was counted of jobs that have not run for long. If one runs again, it counts from zero."""
    jobs = dict.fromkeys(snapshot.jobs)
    for run in snapshot.runs:
        _move_to_end(jobs, run.job_labels)
    newest = dict.fromkeys(list(jobs)[-_MAX_JOBS:])
    return replace(
        snapshot,
        jobs=list(newest),
        ended=Counter({key: n for key, n in snapshot.ended.items() if key[0] in newest}),
        opened=Counter({key: n for key, n in snapshot.opened.items() if key[0] in newest}),
    )


def _is(run_id: str) -> ColumnElement[bool]:
    return schema.run.c.run_id == run_id


def _opened(stored: Sequence[Finding], known: Counted) -> list[Finding]:
    """Return the findings that are new, or open again."""
    return [
        found
        for found in stored
        if found.finding_id > known.finding_id
        or (found.is_open and found.finding_id not in known.open_findings)
    ]


def _counted(known: Counted, history: Sequence[_Entry], stored: Sequence[Finding], now: int) -> Counted:
    later = {row.history_id for row in history if row.recorded_at >= now - _SETTLES_AFTER}
    return Counted(
        settled=max([known.settled, *(row.history_id for row in history if row.history_id not in later)]),
        later=frozenset(later),
        finding_id=max([known.finding_id, *(found.finding_id for found in stored)]),
        open_findings=_open_ids(stored),
    )


def _from_here(connection: Connection, history: Sequence[_Entry], stored: Sequence[Finding]) -> Counted:
    return Counted(
        settled=max((row.history_id for row in history), default=0),
        finding_id=connection.scalar(select(func.max(schema.finding.c.finding_id))) or 0,
        open_findings=_open_ids(stored),
    )


def _open_ids(stored: Sequence[Finding]) -> frozenset[int]:
    return frozenset(found.finding_id for found in stored if found.is_open)


def _history_since(connection: Connection, settled: int | None) -> Sequence[_Entry]:
    """Return the entries after ``settled``; without it only the newest, to know where to go on."""
    history = schema.run_history.c
    columns = select(history.history_id, history.run_id, history.status, history.recorded_at)
    if settled is None:
        return connection.execute(columns.order_by(history.history_id.desc()).limit(1)).all()
    return connection.execute(columns.where(history.history_id > settled).order_by(history.history_id)).all()


def _move_to_end(jobs: dict[JobLabels, None], job: JobLabels) -> None:
    jobs.pop(job, None)
    jobs[job] = None


def _time_to_target(connection: Connection) -> dict[JobLabels, float]:
    run = schema.run.c
    reached = load_runs(connection, run.target_reached_at.is_not(None), limit=1000)
    by_job: dict[JobLabels, list[float]] = {}
    for row in reached:
        seconds = by_job.setdefault(row.job_labels, [])
        if row.target_reached_at is not None and len(seconds) < _TIME_TO_TARGET_RUNS:
            seconds.append(max(0.0, (row.target_reached_at - row.started_at) / _NANOS))
    return {job: statistics.median(seconds) for job, seconds in by_job.items()}
