"""Recomputing how the attempts of a run and the run itself stand, from its processes as stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, RowMapping, select

from gradwatch import conventions as c
from gradwatch_collector.objectives.baselines import baseline
from gradwatch_collector.objectives.changes import tell_changed
from gradwatch_collector.records import NO_RANK
from gradwatch_collector.runs import telling
from gradwatch_collector.runs.clocks import Clock
from gradwatch_collector.runs.facts import described
from gradwatch_collector.runs.lifecycle import (
    HEARTBEAT_NANOS,
    AttemptState,
    ProcessState,
    latest_of,
    roll_up,
    spoken_for,
    stands,
)
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.upsert import upsert
from gradwatch_slo.runs import Status

# What objectives count a run by.
_COUNTED = (
    "status",
    "reason",
    "started_at",
    "ended_at",
    "job",
    "model",
    "dataset",
    "team",
    "tier",
    "target",
    "target_reached_at",
    "deadline_seconds",
)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Rows of an attempt's processes, each by start."""

    ranks: list[RowMapping] = field(default_factory=list)
    supervisors: list[RowMapping] = field(default_factory=list)

    @property
    def rows(self) -> Sequence[RowMapping]:
        return self.ranks or self.supervisors

    @property
    def is_numbered(self) -> bool:
        """Whether its processes knew which attempt they were in, and did not leave the counting to us."""
        return all(row["resource"].get(c.RUN_ATTEMPT) is not None for row in self.rows)

    def state(self, heartbeat: int) -> AttemptState:
        supervisors = [_state(row) for row in self.supervisors]
        return roll_up([_state(row) for row in self.ranks], supervisors, heartbeat=heartbeat)


def refresh_run(connection: Connection, run_id: str, now: int, heartbeat: int = HEARTBEAT_NANOS) -> None:
    """Recompute the attempts and the run; append to the history what changed.

    ``now`` in Unix nanoseconds, ``heartbeat`` in nanoseconds between two. It is the caller's turn
    (:mod:`gradwatch_collector.runs.turns`).
    """
    attempts = _load(connection, run_id)
    states = {number: attempt.state(heartbeat) for number, attempt in attempts.items()}
    for number, state in states.items():
        _write_attempt(connection, run_id, number, state)
    numbered = all(attempt.is_numbered for attempt in attempts.values())
    latest = latest_of({number: state.started_at for number, state in states.items()}, numbered=numbered)
    started_at = min(state.started_at for state in states.values())
    reached_at = _reached_at(row for attempt in attempts.values() for row in attempt.rows)
    _write_run(connection, run_id, latest, attempts[latest].rows, states[latest], started_at, reached_at, now)


def _load(connection: Connection, run_id: str) -> dict[int, _Attempt]:
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
    ranks: dict[int, list[RowMapping]] = {}
    supervisors: dict[int, list[RowMapping]] = {}
    # A supervisor whose command begins attempts by itself, as torchrun does, goes on in the last of them.
    now_in = {row["instance"]: row["attempt"] for row in rows if row["rank"] == NO_RANK}
    for row in rows:
        members = supervisors if row["rank"] == NO_RANK else ranks
        if members is supervisors and row["attempt"] != now_in[row["instance"]]:
            continue
        members.setdefault(row["attempt"], []).append(row)
    retried = {number: any(row["will_retry"] for row in each) for number, each in supervisors.items()}
    speakers = spoken_for(ranks, retried)
    return {
        number: _Attempt(ranks.get(number, []), supervisors[speakers[number]] if number in speakers else [])
        for number in {*ranks, *speakers}
    }


def _write_attempt(connection: Connection, run_id: str, number: int, state: AttemptState) -> None:
    values = {
        "status": state.status,
        "reason": state.reason,
        "cause_rank": state.cause_rank,
        "rank_count": state.rank_count,
        "will_retry": state.will_retry,
        "started_at": state.started_at,
        "ended_at": state.ended_at,
        "evidence": dict(state.evidence),
    }
    connection.execute(
        upsert(connection, schema.attempt, update=values.keys()),
        {"run_id": run_id, "attempt": number, **values},
    )


def _write_run(
    connection: Connection,
    run_id: str,
    latest: int,
    rows: Sequence[RowMapping],
    state: AttemptState,
    started_at: int,
    reached_at: int | None,
    now: int,
) -> None:
    before = (
        connection.execute(select(schema.run).where(schema.run.c.run_id == run_id)).mappings().one_or_none()
    )
    status = stands(state, now)
    over = status is not Status.RUNNING
    reason = state.reason if over else None
    values: dict[str, Any] = {
        "status": status,
        "reason": reason,
        "attempt": latest,
        "rank_count": state.rank_count,
        "started_at": started_at,
        "ended_at": state.ended_at if over else None,
        "last_seen_at": state.last_seen_at,
        **_progress(rows),
        "host": telling.text(rows[0]["resource"].get(c.HOST_NAME)),
        "commit": telling.text(rows[0]["resource"].get(c.GIT_COMMIT)),
        **described(rows[0]["resource"]),
    }
    if reached_at is not None:  # older runs know it whose processes do not
        values["target_reached_at"] = reached_at
    # A start moves once a clock is known, and then other runs had ended before it.
    begins = before is None or before["target"] is None or before["started_at"] != started_at
    if values["target"] is not None and begins:
        values["baseline"] = baseline(
            connection, values["job"], values["model"], values["dataset"], values["started_at"]
        )
    connection.execute(upsert(connection, schema.run, update=values.keys()), {"run_id": run_id, **values})
    if before is None or any(name in values and before[name] != values[name] for name in _COUNTED):
        tell_changed(connection, [values["ended_at"], None if before is None else before["ended_at"]])
    if before is None or any(before[name] != values[name] for name in ("status", "reason", "attempt")):
        connection.execute(
            schema.run_history.insert().values(
                run_id=run_id,
                attempt=latest,
                recorded_at=now,
                status=status,
                reason=reason,
                evidence={"rank": state.cause_rank, **state.evidence},
            )
        )


def _reached_at(rows: Iterable[RowMapping]) -> int | None:
    """Return when the first process reached the target; none did before it started."""
    told = ((row["started_at"], Clock(**row["clock"]).reached_at) for row in rows)
    return min((max(started, reached) for started, reached in told if reached is not None), default=None)


def _progress(rows: Sequence[RowMapping]) -> dict[str, Any]:
    losses = [row for row in rows if row["last_loss"] is not None or row["last_loss_nonfinite"]]
    newest_loss = max(losses, key=lambda row: row["last_step"] or 0, default=None)
    return {
        "last_step": max((row["last_step"] for row in rows if row["last_step"] is not None), default=None),
        "last_loss": None if newest_loss is None else newest_loss["last_loss"],
        "last_loss_nonfinite": newest_loss is not None and newest_loss["last_loss_nonfinite"],
    }


def _state(row: RowMapping) -> ProcessState:
    clock, resource = Clock(**row["clock"]), row["resource"]
    return ProcessState(
        rank=row["rank"],
        status=Status(row["status"]),
        reason=row["reason"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        last_seen_at=row["last_seen_at"],
        told_at=clock.told_at,
        clock_known=clock.sure,
        active_at=None if clock.newest is None else clock.ours(clock.newest, row["last_seen_at"]),
        host=telling.text(resource.get(c.HOST_NAME)),
        instance=row["instance"],
        supervisor=telling.text(resource.get(c.SUPERVISOR_INSTANCE)),
        pid=telling.integer(resource.get(c.PROCESS_PID)),
        parent_pid=telling.integer(resource.get(c.PARENT_PID)),
        will_retry=row["will_retry"],
        evidence=row["evidence"],
    )
