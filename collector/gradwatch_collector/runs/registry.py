"""The run registry: which process is which attempt, and how every run stands.

Everything is written inside the caller's transaction and is idempotent, so that a batch that is sent again
changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, astuple, replace
from operator import attrgetter, itemgetter
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Connection,
    Double,
    Integer,
    RowMapping,
    bindparam,
    case,
    func,
    select,
    tuple_,
    update,
)

from gradwatch import conventions as c
from gradwatch_collector.objectives.changes import tell_due
from gradwatch_collector.records import NO_RANK, Batch, EventRecord, Frame, ProcessKey, Received, Source
from gradwatch_collector.runs import telling
from gradwatch_collector.runs.clocks import Clock
from gradwatch_collector.runs.lifecycle import heartbeat_of
from gradwatch_collector.runs.refresh import refresh_run
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched
from gradwatch_collector.storage.upsert import insert
from gradwatch_slo.runs import Status

_NANOS = 1_000_000_000
# What decides how the attempt and the run stand.
_STANDING_COLUMNS = ("status", "reason", "evidence", "will_retry", "started_at", "ended_at")
_EVIDENCE = (c.EXIT_CODE, c.EXCEPTION_TYPE, c.EXCEPTION_MESSAGE, c.EVIDENCE)
_MEMORY_RATIOS = (
    (c.DEVICE_MEMORY_PEAK.name, c.DEVICE_MEMORY_LIMIT.name),
    (c.PROCESS_MEMORY.name, c.HOST_MEMORY_LIMIT.name),
)
_MEMORY = {name for pair in _MEMORY_RATIOS for name in pair}
_BACK: dict[str, Any] = {"status": Status.RUNNING, "reason": None, "ended_at": None, "evidence": {}}


# Built once, and each for many processes: composing a statement, and even starting one, costs more than what it
# does.
_process = schema.process.c
_PLACE = (_process.run_id, _process.attempt, _process.rank, _process.instance)
_SEEN = select(*_PLACE).where(tuple_(_process.run_id, _process.rank).in_(bindparam("senders", expanding=True)))
_STANDING = select(*(each for each in _process if each.name != "resource")).where(
    tuple_(*_PLACE).in_(bindparam("processes", expanding=True))
)
# SQLAlchemy keeps the columns' own names for what an UPDATE sets.
_HEARD = (
    update(schema.process)
    .where(
        _process.run_id == bindparam("of_run_id"),
        _process.attempt == bindparam("of_attempt"),
        _process.rank == bindparam("of_rank"),
        _process.instance == bindparam("of_instance"),
    )
    # Retried batches arrive late: the newest moment stands.
    .values(heard_at=case((_process.heard_at < bindparam("now"), bindparam("now")), else_=_process.heard_at))
)
_run = schema.run.c
# A rank may be behind, or tell only now what it kept while nobody heard it.
_IS_AHEAD = _run.last_step.is_(None) | (_run.last_step <= bindparam("step", type_=BigInteger))
_TELLS_LOSS = _IS_AHEAD & bindparam("tells_loss", type_=Boolean)
_TOUCHED = (
    update(schema.run)
    .where(
        _run.run_id == bindparam("of_run_id"),
        _run.attempt == func.coalesce(bindparam("of_attempt", type_=Integer), _run.attempt),
        _run.last_seen_at <= bindparam("received_at"),
    )
    .values(
        last_seen_at=case(
            (_run.last_seen_at < bindparam("seen_at"), bindparam("seen_at")), else_=_run.last_seen_at
        ),
        last_step=case((_IS_AHEAD, bindparam("step", type_=BigInteger)), else_=_run.last_step),
        last_loss=case((_TELLS_LOSS, bindparam("loss", type_=Double)), else_=_run.last_loss),
        last_loss_nonfinite=case(
            (_TELLS_LOSS, bindparam("loss_nonfinite", type_=Boolean)), else_=_run.last_loss_nonfinite
        ),
    )
    .returning(_run.status)
)


class Registry:
    """Keeps `process`, `attempt`, `run` and `run_history` true to what arrived.

    What is older than ``lost_after`` seconds when it arrives, by the sender's corrected clock, was kept on a
    disk: it tells how far the process had come by then, and is no sign that it still lives.
    """

    def __init__(self, lost_after: float = 30.0) -> None:
        self._lost_after = int(lost_after * _NANOS)
        self._heartbeat = heartbeat_of(self._lost_after)

    def resolve(self, connection: Connection, senders: Sequence[tuple[Source, int]]) -> list[ProcessKey]:
        """Return the key of each sending process, and note that it was heard.

        An attempt the sender does not know is the order in which its instance was first seen for the
        (run, rank). Each sender comes with the moment in Unix nanoseconds at which it was heard.
        """
        seen = _seen(connection, {(source.run_id, source.rank) for source, _ in senders})
        keys: list[ProcessKey] = []
        heard: dict[ProcessKey, tuple[Source, int]] = {}
        new: dict[ProcessKey, dict[str, Any]] = {}
        for source, at in senders:
            known = seen[source.run_id, source.rank]
            attempt = source.attempt or _attempt_by_order(source, known)
            key = ProcessKey(source.run_id, attempt, source.rank, source.instance)
            keys.append(key)
            if key in new:
                new[key]["heard_at"] = at
            elif (attempt, source.instance) in known:
                heard[key] = (source, at)
            else:
                new[key] = _new(key, source, at)
                known.append((attempt, source.instance))
        if heard and _hear(connection, {key: at for key, (_, at) in heard.items()}) < len(heard):
            new |= {key: _new(key, *sender) for key, sender in heard.items()}  # some were pruned meanwhile
        if new:
            connection.execute(insert(connection, schema.process).on_conflict_do_nothing(), list(new.values()))
        return keys

    def apply(self, connection: Connection, group: Sequence[Received]) -> None:
        """Let batches' events and latest scalars change how their processes, attempts and runs stand."""
        rows = _rows(connection, {each.key for each in group})
        for each in group:
            row = rows.pop(each.key, None) or _rows(connection, {each.key})[each.key]
            if not self._apply(connection, row, each):
                rows[each.key] = row
        if group:  # an empty request has nothing to tell
            runs = {each.key.run_id for each in group}
            tell_due(connection, runs, max(each.received_at for each in group))

    def _apply(self, connection: Connection, row: RowMapping, received: Received) -> bool:
        """Return whether the process' row is another now."""
        key, batch, received_at = received.key, received.batch, received.received_at
        run_events = [e for e in batch.events if e.name.startswith(c.RUN_EVENT_PREFIX)]
        known = Clock(**row["clock"])
        if not row["is_run"] and not run_events:
            # What makes it a run may arrive later than the target that it reached.
            clock = _reached(known, known, batch.events, received_at)
            if clock != known:
                connection.execute(update(schema.process).where(_is(key)).values(clock=asdict(clock)))
            return clock != known
        run_events = sorted((e for e in run_events if not _is_corrected(e, known)), key=attrgetter("time"))
        oldest, newest = _stretch(batch, received_at)
        changes = _progress_changes(batch.frames, row)
        if known.newest is None or newest >= known.newest:  # not kept on a disk since
            changes |= _memory_changes(batch.frames)
        for event in run_events:
            changes |= _event_changes(event, changes.get("last_step", row["last_step"]))
        clock = _heard(known, run_events, received_at)
        clock = replace(clock, newest=newest if clock.newest is None else max(clock.newest, newest))
        clock = _reached(known, clock, batch.events, received_at)
        changes |= {"clock": asdict(clock), **_moments(known, clock, row, oldest, received_at)}
        lived = clock.ours(newest, received_at)
        alive = received_at - lived <= self._lost_after
        seen = received_at if alive else lived
        changes["last_seen_at"] = max(row["last_seen_at"], seen) if row["is_run"] else seen
        if row["status"] == Status.LOST and "status" not in changes:
            # It was only silent: what arrives late corrects the inference.
            changes |= _BACK if alive else {"ended_at": changes["last_seen_at"]}
        connection.execute(update(schema.process).where(_is(key)).values(is_run=True, **changes))
        stands_otherwise = any(name in changes and changes[name] != row[name] for name in _STANDING_COLUMNS)
        if stands_otherwise or clock.reached_at != known.reached_at or not row["is_run"]:
            refresh_run(connection, key.run_id, received_at, self._heartbeat)
        elif _touch_run(connection, row, changes, received_at) and row["status"] == Status.RUNNING:
            # It goes on, and the run was thought to be over.
            refresh_run(connection, key.run_id, received_at, self._heartbeat)
        return True


_Senders = dict[tuple[str, int], list[tuple[int, str]]]


def _seen(connection: Connection, senders: Collection[tuple[str, int]]) -> _Senders:
    """Return attempt and instance of all processes known for each run and rank."""
    found: _Senders = {sender: [] for sender in senders}
    for some in batched(senders, 2):
        for run_id, attempt, rank, instance in connection.execute(_SEEN, {"senders": some}):
            found[run_id, rank].append((attempt, instance))
    return found


def _rows(connection: Connection, keys: Collection[ProcessKey]) -> dict[ProcessKey, RowMapping]:
    return {
        ProcessKey(row["run_id"], row["attempt"], row["rank"], row["instance"]): row
        for some in batched([astuple(key) for key in keys], len(_PLACE))
        for row in connection.execute(_STANDING, {"processes": some}).mappings()
    }


def _hear(connection: Connection, heard: Mapping[ProcessKey, int]) -> int:
    """Note when processes were heard, and return how many there are."""
    # In the order of the key, so that two writers cannot wait for each other.
    moments = [
        {
            "of_run_id": key.run_id,
            "of_attempt": key.attempt,
            "of_rank": key.rank,
            "of_instance": key.instance,
            "now": at,
        }
        for key, at in sorted(heard.items(), key=lambda item: astuple(item[0]))
    ]
    return connection.execute(_HEARD, moments).rowcount


def _attempt_by_order(source: Source, known: Sequence[tuple[int, str]]) -> int:
    if source.rank == NO_RANK:
        return 1
    mine = [attempt for attempt, instance in known if instance == source.instance]
    return max(mine) if mine else 1 + max((attempt for attempt, _ in known), default=0)


def _touch_run(connection: Connection, row: RowMapping, changes: dict[str, Any], received_at: int) -> bool:
    """Note a heartbeat or an export of a run that stands as before; return whether it stands as over."""
    now = {**row, **changes}
    status = connection.scalar(
        _TOUCHED,
        {
            "of_run_id": row["run_id"],
            # A supervisor speaks for the attempts that its command begins by itself, too.
            "of_attempt": None if row["rank"] == NO_RANK else row["attempt"],
            "received_at": received_at,
            "seen_at": now["last_seen_at"],
            "step": now["last_step"],
            "tells_loss": "last_loss_at" in changes,
            "loss": now["last_loss"],
            "loss_nonfinite": now["last_loss_nonfinite"],
        },
    )
    return status not in (None, Status.RUNNING)


def _is_corrected(event: EventRecord, known: Clock) -> bool:
    """Return whether it is an ending that is sent again after the sender's later word."""
    return event.name == c.RUN_ENDED.name and known.ended is not None and event.time < known.ended


def _heard(clock: Clock, run_events: Sequence[EventRecord], received_at: int) -> Clock:
    """Return what is known of the sender's clock after its events, and the moments that it told."""
    if run_events:
        clock = clock.hear(max(event.time for event in run_events), received_at)
    for event in run_events:
        if event.name == c.RUN_STARTED.name:
            clock = replace(clock, started=event.time)
        elif event.name == c.RUN_ENDED.name:
            # The same word again, after a retry, was told when it first came.
            told_at = clock.told_at if clock.ended == event.time else received_at
            clock = replace(clock, ended=event.time, told_at=told_at)
    return clock


def _reached(known: Clock, clock: Clock, events: Sequence[EventRecord], received_at: int) -> Clock:
    """Return the clock with when the target first held, by ours as it is known now."""
    first = min((event.time for event in events if event.name == c.TARGET_REACHED.name), default=None)
    if first is not None and (clock.reached is None or first < clock.reached):
        clock = replace(clock, reached=first, reached_told_at=received_at)
    if clock.reached is not None and not (known.settled and clock.reached == known.reached):
        assert clock.reached_told_at is not None
        clock = replace(clock, reached_at=clock.ours(clock.reached, clock.reached_told_at))
    return clock


def _moments(known: Clock, clock: Clock, row: RowMapping, oldest: int, received_at: int) -> dict[str, int]:
    """Return start and end by our clock, if they are told or more may be known of the sender's clock.

    ``oldest``: the oldest moment that is told of now.
    """
    changes: dict[str, int] = {}
    started_at: int = row["started_at"]
    if clock.started is None:
        # An ending goes ahead of everything else that was kept, its own start included.
        started_at = changes["started_at"] = min(started_at, clock.ours(oldest, received_at))
    elif not (known.settled and clock.started == known.started):
        started_at = changes["started_at"] = clock.ours(clock.started, received_at)
    if clock.ended is not None and not (known.settled and clock.ended == known.ended):
        assert clock.told_at is not None
        changes["ended_at"] = max(clock.ours(clock.ended, clock.told_at), started_at)
    return changes


def _stretch(batch: Batch, received_at: int) -> tuple[int, int]:
    """Return the oldest and the newest moment in a batch, by its sender's clock."""
    moments = [int(time) for frame in batch.frames for time in (frame.times[0], frame.times[-1])]
    moments += [event.time for event in batch.events]
    moments += [time for span in batch.spans for time in (span.start, span.end)]
    return min(moments, default=received_at), max(moments, default=received_at)


def _event_changes(event: EventRecord, last_step: int | None) -> dict[str, Any]:
    step = telling.integer(event.attributes.get(c.STEP))
    changes: dict[str, Any] = {}
    if step is not None and (last_step is None or step > last_step):
        changes["last_step"] = step
    if event.name == c.RUN_ENDED.name:
        changes |= {
            "status": _ending(event.attributes.get(c.STATUS)),
            "reason": telling.text(event.attributes.get(c.REASON)),
            "exit_code": telling.integer(event.attributes.get(c.EXIT_CODE)),
            "will_retry": event.attributes.get(c.WILL_RETRY) is True,
            "evidence": {name: event.attributes[name] for name in _EVIDENCE if name in event.attributes},
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


def _memory_changes(frames: Sequence[Frame]) -> dict[str, Any]:
    """What the tightest device has left; the host, for a process without devices."""
    newest = {
        frame.metric.name: frame.values[:, -1]
        for frame in frames
        if frame.metric.name in _MEMORY and frame.values is not None
    }
    for used, limit in _MEMORY_RATIOS:
        # Senders tell both at once, for the same devices in the same order.
        if used in newest and limit in newest and len(newest[used]) == len(newest[limit]):
            pairs = zip(newest[used].tolist(), newest[limit].tolist(), strict=True)
            # What cannot be measured is told by nobody but a sender gone wrong.
            left = [ratio for u, total in pairs if total > 0 and math.isfinite(ratio := 1 - u / total)]
            if left:
                return {"memory_headroom": min(left)}
    return {}


def _newest(frames: Sequence[Frame], metric: str) -> tuple[int, float] | None:
    """Return the newest time and value of a metric."""
    points = [
        (int(frame.times[-1]), float(frame.values[0, -1]))
        for frame in frames
        if frame.metric.name == metric and frame.values is not None
    ]
    return max(points, key=itemgetter(0), default=None)


def _new(key: ProcessKey, source: Source, received_at: int) -> dict[str, Any]:
    return {
        **asdict(key),
        "status": Status.RUNNING,
        "evidence": {},
        "started_at": received_at,
        "last_seen_at": received_at,
        "heard_at": received_at,
        "clock": asdict(Clock()),
        "will_retry": False,
        "last_loss_nonfinite": False,
        "is_run": False,
        "resource": dict(source.resource),
    }


def _is(key: ProcessKey) -> ColumnElement[bool]:
    process = schema.process.c
    return (
        (process.run_id == key.run_id)
        & (process.attempt == key.attempt)
        & (process.rank == key.rank)
        & (process.instance == key.instance)
    )
