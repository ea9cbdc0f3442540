"""The loop that looks at what was stored: silence, findings, objectives, compaction.

One tick is one short transaction; everything it learns is published as one immutable :class:`Snapshot`, which
``/metrics`` and the API read without touching the database.
"""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from opentelemetry.trace import NoOpTracer, Tracer
from sqlalchemy import ColumnElement, Connection, Engine, Row, select
from sqlalchemy.exc import SQLAlchemyError

from gradwatch_collector import schema
from gradwatch_collector.compaction import compact
from gradwatch_collector.database import size_of, transaction
from gradwatch_collector.findings import DETECTORS, Observation, Scene, reconcile
from gradwatch_collector.live import LiveRuns
from gradwatch_collector.partitions import maintain_partitions
from gradwatch_collector.presence import Presence
from gradwatch_collector.runs import JobLabels, RunRow, load_facts, load_runs, moment, nanos
from gradwatch_collector.silence import mark_silent
from gradwatch_slo.objective import Objective
from gradwatch_slo.report import ObjectiveReport, evaluate
from gradwatch_slo.runs import Status

logger = logging.getLogger(__name__)

_NANOS = 1_000_000_000
# What ended is looked at for another hour: a run may live and end, and its NaNs arrive, between two ticks. So
# is what ended before and became known only now, from a disk or by a clock that is behind.
_RECENT = 3600 * _NANOS
_SLOS_EVERY = 15 * _NANOS
_UPKEEP_EVERY = 10 * _NANOS
_TIME_TO_TARGET_RUNS = 20
# Jobs that `/metrics` has counters for: those that ran last.
_MAX_JOBS = 1_000
_HEALTH = {Status.FAILED: 0, Status.LOST: 0, Status.RUNNING: 1, Status.CANCELLED: 2, Status.SUCCEEDED: 2}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the last tick knew. ``runs``: live, or of an ending of the last hour, the sickest first."""

    evaluated_at: int
    runs: Sequence[RunRow] = ()
    findings: Sequence[tuple[RunRow, Observation]] = ()
    ended: Counter[tuple[JobLabels, Status]] = field(default_factory=Counter)
    opened: Counter[tuple[JobLabels, str]] = field(default_factory=Counter)
    jobs: Sequence[JobLabels] = ()
    time_to_target: dict[JobLabels, float] = field(default_factory=dict)
    objectives: Sequence[ObjectiveReport] = ()
    slos_at: int = 0
    # Newest entry of run_history that is counted; None before the first tick.
    history_id: int | None = None


class Evaluator:
    """Runs :meth:`tick` every ``interval`` seconds on a thread of its own."""

    def __init__(
        self,
        engine: Engine,
        live: LiveRuns,
        objectives: Sequence[Objective],
        *,
        lost_after: float,
        interval: float = 1.0,
        now: Callable[[], int] = time.time_ns,
        tracer: Tracer | None = None,
    ) -> None:
        self._engine = engine
        self._tracer = tracer or NoOpTracer()
        self._live = live
        self._objectives = objectives
        self._lost_after = int(lost_after * _NANOS)
        self._interval = interval
        self._now = now
        started_at = now()
        self._presence = Presence(started_at, started_at)
        self._failed = False
        self._upkept_at = 0
        self.snapshot = Snapshot(evaluated_at=0)
        # Bytes; None before it was first looked at.
        self.database_size: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gradwatch-evaluator", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the tick that is under way."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                with self._tracer.start_as_current_span("gradwatch.evaluate"):
                    self.tick()
            except SQLAlchemyError as error:
                # The database may be away for a while; the alert on the age of the evaluation tells.
                logger.warning("no evaluation, trying again: %s", str(error).splitlines()[0])
            except Exception:
                logger.exception("evaluation failed, trying again")

    def tick(self) -> Snapshot:
        """Evaluate once and publish what was found."""
        now = self._now()
        presence = self._presence.tick(now, self._lost_after, failed=self._failed)
        self._failed = True
        with transaction(self._engine) as connection:
            mark_silent(connection, now, self._lost_after, presence.up_since)
        self._presence, self._failed = presence, False
        with transaction(self._engine) as connection:
            runs = _recent_runs(connection, now)
            scene = Scene(connection, now, runs, self._live)
            observations = [found for detect in DETECTORS for found in detect(scene)]
            opened = reconcile(connection, observations, now)
            snapshot = self._count(connection, runs, observations, opened, now)
            if now - snapshot.slos_at >= _SLOS_EVERY or snapshot.ended != self.snapshot.ended:
                snapshot = replace(
                    snapshot,
                    slos_at=now,
                    objectives=evaluate_objectives(connection, self._objectives, now),
                    time_to_target=_time_to_target(connection),
                )
        self.snapshot = snapshot
        self._live.forget({run.run_id for run in runs})
        if now - self._upkept_at >= _UPKEEP_EVERY:
            self._upkept_at = now
            self._upkeep(now)
        return snapshot

    def _upkeep(self, now: int) -> None:
        # Short transactions one after the other: ingest gets its turn in between.
        more = True
        while more and not self._stop.is_set():
            with transaction(self._engine) as connection:
                more = compact(connection, now).more
        with transaction(self._engine) as connection:
            maintain_partitions(connection, now)
            self.database_size = size_of(connection)

    def _count(
        self,
        connection: Connection,
        runs: Sequence[RunRow],
        observations: Sequence[Observation],
        opened: Sequence[Observation],
        now: int,
    ) -> Snapshot:
        before = self.snapshot
        by_id = {run.run_id: run for run in runs}
        ended, counted = before.ended.copy(), before.opened.copy()
        jobs = dict.fromkeys(before.jobs)
        history = _history_since(connection, before.history_id)
        for row in history if before.history_id is not None else ():
            run = by_id.get(row.run_id) or next(
                iter(load_runs(connection, schema.run.c.run_id == row.run_id)), None
            )
            if run is not None:
                _move_to_end(jobs, run.job_labels)
                if row.status != Status.RUNNING:
                    ended[run.job_labels, Status(row.status)] += 1
        for run in runs:
            _move_to_end(jobs, run.job_labels)
        for found in opened:
            counted[by_id[found.run_id].job_labels, found.rule] += 1
        return replace(
            before,
            evaluated_at=now,
            runs=runs,
            findings=[(by_id[found.run_id], found) for found in observations],
            ended=ended,
            opened=counted,
            jobs=list(jobs)[-_MAX_JOBS:],
            history_id=history[-1].history_id if history else before.history_id or 0,
        )


def _history_since(connection: Connection, known: int | None) -> Sequence[Row[int, str, str]]:
    """Return the entries after ``known``; without it only the newest, to know where to go on."""
    history = schema.run_history.c
    columns = select(history.history_id, history.run_id, history.status)
    if known is None:
        return connection.execute(columns.order_by(history.history_id.desc()).limit(1)).all()
    return connection.execute(columns.where(history.history_id > known).order_by(history.history_id)).all()


def _move_to_end(jobs: dict[JobLabels, None], job: JobLabels) -> None:
    jobs.pop(job, None)
    jobs[job] = None


def evaluate_objectives(
    connection: Connection, objectives: Sequence[Objective], now: int, *conditions: ColumnElement[bool]
) -> Sequence[ObjectiveReport]:
    """Evaluate objectives over the stored runs that meet all conditions (over ``schema.run``).

    ``now`` in Unix nanoseconds.
    """
    at = moment(now)
    since = min((objective.window.at(at).start for objective in objectives), default=at)
    return evaluate(objectives, load_facts(connection, nanos(since), *conditions), at)


def _recent_runs(connection: Connection, now: int) -> list[RunRow]:
    run, history, since = schema.run.c, schema.run_history.c, now - _RECENT
    told = select(history.run_id).where(history.recorded_at >= since)
    recent = (run.status == Status.RUNNING) | (run.ended_at >= since) | run.run_id.in_(told)
    runs = load_runs(connection, recent)
    return sorted(runs, key=lambda r: (_HEALTH[r.status], -r.started_at))


def _time_to_target(connection: Connection) -> dict[JobLabels, float]:
    run = schema.run.c
    reached = load_runs(connection, run.target_reached_at.is_not(None), limit=1000)
    by_job: dict[JobLabels, list[float]] = {}
    for row in reached:
        seconds = by_job.setdefault(row.job_labels, [])
        if row.target_reached_at is not None and len(seconds) < _TIME_TO_TARGET_RUNS:
            seconds.append(max(0.0, (row.target_reached_at - row.started_at) / _NANOS))
    return {job: statistics.median(seconds) for job, seconds in by_job.items()}
