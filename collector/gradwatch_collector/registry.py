"""The run registry: which process is which attempt, and how every run stands.

Everything is written inside the caller's transaction and is idempotent, so that a batch that is sent again
changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import ColumnElement, Connection, RowMapping, bindparam, select, text, update

from gradwatch import conventions as c
from gradwatch_collector import schema, telling
from gradwatch_collector.lifecycle import REASON_HEARTBEAT_TIMEOUT, AttemptState, ProcessState, roll_up
from gradwatch_collector.records import Batch, EventRecord, Frame, ProcessKey, Source
from gradwatch_collector.runs import described
from gradwatch_collector.upsert import upsert
from gradwatch_slo.runs import Status

_NANOS = 1_000_000_000
_PROGRESS_COLUMNS = ("last_step", "last_loss", "last_loss_nonfinite")


# Built once: composing a statement costs more than running it.
_process = schema.process.c
_PROCESS = select(schema.process).where(
    _process.run_id == bindparam("run_id"),
    _process.attempt == bindparam("attempt"),
    _process.rank == bindparam("rank"),
    _process.instance == bindparam("instance"),
)
_ATTEMPTS = select(_process.attempt, _process.instance).where(
    _process.run_id == bindparam("run_id"), _process.rank == bindparam("rank")
)

_LOCK_RUN = text("SELECT pg_advisory_xact_lock(hashtextextended(:run_id, 0))")


class Registry:
    """Keeps `process`, `attempt`, `run` and `run_history` true to what arrived."""

    def resolve(self, connection: Connection, source: Source, received_at: int) -> ProcessKey:
        """Return the key of the sending process; any accepted batch is a sign of life.

        An attempt the sender does not know is the order in which its instance was first seen for the
        (run, rank). ``received_at`` in Unix nanoseconds.
        """
        attempt = source.attempt or _attempt_by_order(connection, source)
        key = ProcessKey(source.run_id, attempt, source.rank, source.instance)
        connection.execute(
            # Retried batches arrive late: the newest sign of life stands.
            upsert(connection, schema.process, update=("last_seen_at",), newest="last_seen_at"),
            {
                **_place(key),
                "status": Status.RUNNING,
                "evidence": {},
                "started_at": received_at,
                "last_seen_at": received_at,
                "last_loss_nonfinite": False,
                "is_run": False,
                "resource": dict(source.resource),
            },
        )
        return key

    def apply(self, connection: Connection, key: ProcessKey, batch: Batch, received_at: int) -> None:
        """Let a batch's events and latest scalars change how the process, attempt and run stand."""
        row = connection.execute(_PROCESS, _place(key)).mappings().one()
        run_events = [e for e in batch.events if e.name.startswith(c.RUN_EVENT_PREFIX)]
        if not row["is_run"] and not run_events:
            return
        changes = _progress_changes(batch.frames, row)
        for event in run_events:
            changes |= _event_changes(event, row, received_at)
        corrected = row["status"] == Status.LOST and "status" not in changes
        if corrected:
            # It was only silent: a late sign of life corrects the inference.
            changes |= {"status": Status.RUNNING, "reason": None, "ended_at": None, "evidence": {}}
        connection.execute(update(schema.process).where(_is(key)).values(is_run=True, **changes))
        told = any(event.name != c.RUN_HEARTBEAT.name for event in run_events)
        if told or corrected or not row["is_run"]:
            refresh_run(connection, key.run_id, received_at)
        else:
            _touch_run(connection, key, changes, received_at)
        _note_target(connection, key.run_id, batch.events, received_at)


def _attempt_by_order(connection: Connection, source: Source) -> int:
    seen = connection.execute(_ATTEMPTS, {"run_id": source.run_id, "rank": source.rank}).all()
    known = next((row.attempt for row in seen if row.instance == source.instance), None)
    return known or 1 + max((row.attempt for row in seen), default=0)


def mark_silent(connection: Connection, now: int, lost_after: int, up_since: int) -> list[str]:
    """Mark processes lost that have been silent for longer than ``lost_after``; return their runs.

    All in Unix nanoseconds. Silence counts only from ``up_since``: nobody could be heard before.
    """
    process = schema.process.c
    silent = connection.execute(
        select(process.run_id, process.attempt, process.rank, process.instance, process.last_seen_at).where(
            process.is_run, process.status == Status.RUNNING, process.last_seen_at < now - lost_after
        )
    ).all()
    runs: list[str] = []
    for row in silent:
        if now - max(row.last_seen_at, up_since) <= lost_after:
            continue
        key = ProcessKey(row.run_id, row.attempt, row.rank, row.instance)
        connection.execute(
            update(schema.process)
            # A batch committed since the select is a sign of life: it wins.
            .where(_is(key), process.last_seen_at == row.last_seen_at)
            .values(
                status=Status.LOST,
                reason=REASON_HEARTBEAT_TIMEOUT,
                ended_at=row.last_seen_at,
                evidence={"silent_seconds": round((now - row.last_seen_at) / _NANOS, 1)},
            )
        )
        runs.append(row.run_id)
    for run_id in dict.fromkeys(runs):
        refresh_run(connection, run_id, now)
    return runs


def _touch_run(connection: Connection, key: ProcessKey, changes: dict[str, Any], received_at: int) -> None:
    # The common case, a heartbeat or an export of a run that stands as before: one statement.
    progress = {name: changes[name] for name in _PROGRESS_COLUMNS if name in changes}
    run = schema.run.c
    connection.execute(
        update(schema.run)
        .where(run.run_id == key.run_id, run.attempt == key.attempt, run.last_seen_at <= received_at)
        .values(last_seen_at=received_at, **progress)
    )


def _note_target(connection: Connection, run_id: str, events: Sequence[EventRecord], received_at: int) -> None:
    for event in events:
        if event.name == c.TARGET_REACHED.name:
            at = min(event.time, received_at)
            run = schema.run.c
            connection.execute(
                update(schema.run)
                .where(run.run_id == run_id, run.target_reached_at.is_(None) | (run.target_reached_at > at))
                .values(target_reached_at=at)
            )


def refresh_run(connection: Connection, run_id: str, now: int) -> None:
    """Recompute the attempts and the run from the processes; append to the history what changed."""
    _take_turns(connection, run_id)
    process = schema.process.c
    rows = (
        connection.execute(
            select(schema.process)
            .where(process.run_id == run_id, process.is_run)
            .order_by(process.attempt, process.rank, process.started_at)
        )
        .mappings()
        .all()
    )
    attempts: dict[int, list[RowMapping]] = {}
    for row in rows:
        attempts.setdefault(row["attempt"], []).append(row)
    for number, members in attempts.items():
        _write_attempt(connection, run_id, number, roll_up([_state(row) for row in members]))
    _write_run(connection, run_id, attempts, now)


def _take_turns(connection: Connection, run_id: str) -> None:
    # Two collectors that each end one rank must not both still see the other running. SQLite has one writer.
    if connection.dialect.name == "postgresql":
        connection.execute(_LOCK_RUN, {"run_id": run_id})


def _write_attempt(connection: Connection, run_id: str, number: int, state: AttemptState) -> None:
    values = {
        "status": state.status,
        "reason": state.reason,
        "cause_rank": state.cause_rank,
        "rank_count": state.rank_count,
        "started_at": state.started_at,
        "ended_at": state.ended_at,
    }
    connection.execute(
        upsert(connection, schema.attempt, update=values.keys()),
        {"run_id": run_id, "attempt": number, "will_retry": False, **values},
    )


def _write_run(connection: Connection, run_id: str, attempts: dict[int, list[RowMapping]], now: int) -> None:
    latest = max(attempts)
    state = roll_up([_state(row) for row in attempts[latest]])
    before = connection.execute(
        select(schema.run.c.status, schema.run.c.reason, schema.run.c.attempt).where(
            schema.run.c.run_id == run_id
        )
    ).one_or_none()
    lead = attempts[latest][0]
    steps = [row for row in attempts[latest] if row["last_step"] is not None]
    losses = [row for row in attempts[latest] if row["last_loss"] is not None or row["last_loss_nonfinite"]]
    newest_loss = max(losses, key=lambda row: row["last_step"] or 0, default=None)
    values: dict[str, Any] = {
        "status": state.status,
        "reason": state.reason,
        "attempt": latest,
        "rank_count": state.rank_count,
        "started_at": min(row["started_at"] for members in attempts.values() for row in members),
        "ended_at": state.ended_at,
        "last_seen_at": state.last_seen_at,
        "last_step": max((row["last_step"] for row in steps), default=None),
        "last_loss": None if newest_loss is None else newest_loss["last_loss"],
        "last_loss_nonfinite": newest_loss is not None and newest_loss["last_loss_nonfinite"],
        "host": telling.text(lead["resource"].get(c.HOST_NAME)),
        "commit": telling.text(lead["resource"].get(c.GIT_COMMIT)),
    }
    values |= described(lead["resource"])
    connection.execute(upsert(connection, schema.run, update=values.keys()), {"run_id": run_id, **values})
    if before is None or (before.status, before.reason, before.attempt) != (
        state.status,
        state.reason,
        latest,
    ):
        cause = next((row for row in attempts[latest] if row["rank"] == state.cause_rank), lead)
        connection.execute(
            schema.run_history.insert().values(
                run_id=run_id,
                attempt=latest,
                recorded_at=now,
                status=state.status,
                reason=state.reason,
                evidence={"rank": state.cause_rank, **cause["evidence"]},
            )
        )


def _event_changes(event: EventRecord, row: RowMapping, received_at: int) -> dict[str, Any]:
    # A sender's clock may be ahead of ours; nothing happened after it was received.
    at = min(event.time, received_at)
    step = telling.integer(event.attributes.get(c.STEP))
    changes: dict[str, Any] = {}
    if step is not None and (row["last_step"] is None or step > row["last_step"]):
        changes["last_step"] = step
    if event.name == c.RUN_STARTED.name:
        changes["started_at"] = at
    elif event.name == c.RUN_ENDED.name:
        changes |= {
            "status": _ending(event.attributes.get(c.STATUS)),
            "reason": telling.text(event.attributes.get(c.REASON)),
            "exit_code": telling.integer(event.attributes.get(c.EXIT_CODE)),
            "ended_at": max(at, row["started_at"]),
            "evidence": {
                name: event.attributes[name]
                for name in (c.EXIT_CODE, c.EXCEPTION_TYPE, c.EXCEPTION_MESSAGE)
                if name in event.attributes
            },
        }
    return changes


def _ending(value: object) -> Status:
    try:
        status = Status(str(value))
    except ValueError:
        return Status.FAILED
    return Status.FAILED if status is Status.RUNNING else status


def _progress_changes(frames: Sequence[Frame], row: RowMapping) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    told = _newest(frames, c.STEP_INDEX.name)
    step = None if told is None else telling.integer(told[1])
    if step is not None and (row["last_step"] is None or step > row["last_step"]):
        changes["last_step"] = step
    told = _newest(frames, c.LOSS.name)
    # What was kept while the collector was away arrives after what is newer.
    if told is not None and (row["last_loss_at"] is None or told[0] >= row["last_loss_at"]):
        at, loss = told
        finite = math.isfinite(loss)
        changes |= {
            "last_loss": loss if finite else None,
            "last_loss_nonfinite": not finite,
            "last_loss_at": at,
        }
    return changes


def _newest(frames: Sequence[Frame], metric: str) -> tuple[int, float] | None:
    """Return the newest time and value of a metric."""
    points = [
        (int(frame.times[-1]), float(frame.values[0, -1]))
        for frame in frames
        if frame.metric.name == metric and frame.values is not None
    ]
    return max(points, key=itemgetter(0), default=None)


def _state(row: RowMapping) -> ProcessState:
    return ProcessState(
        row["rank"],
        Status(row["status"]),
        row["reason"],
        row["started_at"],
        row["ended_at"],
        row["last_seen_at"],
    )


def _place(key: ProcessKey) -> dict[str, Any]:
    return {"run_id": key.run_id, "attempt": key.attempt, "rank": key.rank, "instance": key.instance}


def _is(key: ProcessKey) -> ColumnElement[bool]:
    process = schema.process.c
    return (
        (process.run_id == key.run_id)
        & (process.attempt == key.attempt)
        & (process.rank == key.rank)
        & (process.instance == key.instance)
    )
