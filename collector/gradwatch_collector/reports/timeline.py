"""What happened to a run, in the order in which it did, by the collector's clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from sqlalchemy import Connection, RowMapping, func, select

from gradwatch import conventions as c
from gradwatch_collector.records import NO_RANK
from gradwatch_collector.reports import wording
from gradwatch_collector.runs import telling
from gradwatch_collector.runs.checkpoints import CORRUPT, FAILED, SAVED
from gradwatch_collector.runs.clocks import Clock
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.storage import schema
from gradwatch_slo.runs import Status

T = TypeVar("T")
_Process = tuple[int, int, str]

# Of each kind only the first few: a run may stall a hundred times. After the first NaN all is NaN.
_EVENTS_SHOWN: Final = 3
_SHOWN_OF: Final = {c.NONFINITE_STEP.name: 1}
_ATTEMPTS_SHOWN: Final = 20
_CHECKPOINTS_SHOWN: Final = 3
_FAILURES_SHOWN: Final = 5
_FINDINGS_SHOWN: Final = 50
_EVENTS: Final[Mapping[str, tuple[str, tuple[tuple[str, str], ...]]]] = {
    c.NONFINITE_STEP.name: ("NaN or Inf", ((c.LAYER_NAME, "in"), (c.BORN_IN, "born in"))),
    c.STALLED.name: ("no step ends any more", ()),
    c.OUT_OF_MEMORY.name: ("memory ran out", ((c.OOM_DURING, "in"), (c.DEVICE, "on"))),
    c.INSTRUMENTATION_MISSING.name: ("cannot be seen properly", ((c.MISSING_REASON, "because"),)),
    c.FLIGHT_RECORD.name: ("black box sent", ((c.FLIGHT_TRIGGER, "for"),)),
    c.BUNDLE_SAVED.name: ("reproduction bundle written", ((c.BUNDLE_PATH, "to"),)),
    c.TARGET_REACHED.name: ("target reached", ((c.TARGET, ""), (c.TARGET_VALUE, "with"))),
}
_BAD: Final = frozenset({c.NONFINITE_STEP.name, c.STALLED.name, c.OUT_OF_MEMORY.name})


@dataclass(frozen=True, slots=True)
class Milestone:
    """One thing that happened: ``at`` in Unix nanoseconds. ``tone``: `good`, `bad` or nothing."""

    at: int
    what: str
    tone: str = ""


def timeline(connection: Connection, run: RunRow) -> list[Milestone]:
    """Return what happened, oldest first; of what happened often the first, and how often."""
    clocks = _clocks(connection, run.run_id)
    told = [
        *_attempts(connection, run),
        *_events(connection, run.run_id, clocks),
        *_checkpoints(connection, run.run_id, clocks),
        *_findings(connection, run.run_id),
    ]
    return sorted(told, key=lambda milestone: milestone.at)


def attempt_ending(row: RowMapping) -> str:
    """Return in words how a row of `attempt` ended."""
    where = "" if row["cause_rank"] is None else f"rank {row['cause_rank']}"
    message = telling.text(row["evidence"].get(c.EXCEPTION_MESSAGE)) or telling.text(
        row["evidence"].get(c.EVIDENCE)
    )
    retry = "will be tried again" if row["will_retry"] else None
    facts = ", ".join(filter(None, (row["reason"], where, retry)))
    return f"{row['status']}{f' ({facts})' if facts else ''}{f': {message}' if message else ''}"


def _clocks(connection: Connection, run_id: str) -> dict[_Process, Clock]:
    process = schema.process.c
    rows = connection.execute(
        select(process.attempt, process.rank, process.instance, process.clock).where(process.run_id == run_id)
    )
    return {(row.attempt, row.rank, row.instance): Clock(**row.clock) for row in rows}


def _attempts(connection: Connection, run: RunRow) -> Iterator[Milestone]:
    attempt = schema.attempt.c
    rows = connection.execute(
        select(schema.attempt).where(attempt.run_id == run.run_id).order_by(attempt.started_at, attempt.attempt)
    ).mappings()
    shown, skipped = _ends(list(rows), 1, _ATTEMPTS_SHOWN)
    for index, row in enumerate(shown):
        ranks = f", {row['rank_count']} ranks" if row["rank_count"] > 1 else ""
        after = f"; {skipped} attempts before it are not shown" if skipped and index == 1 else ""
        yield Milestone(row["started_at"], f"attempt {row['attempt']} started{ranks}{after}")
        if row["ended_at"] is not None:
            tone = {Status.SUCCEEDED: "good", Status.CANCELLED: ""}.get(Status(row["status"]), "bad")
            yield Milestone(row["ended_at"], f"attempt {row['attempt']} {attempt_ending(row)}", tone)


def _events(connection: Connection, run_id: str, clocks: Mapping[_Process, Clock]) -> Iterator[Milestone]:
    event = schema.event.c
    for name, (what, facts) in _EVENTS.items():
        most = _SHOWN_OF.get(name, _EVENTS_SHOWN)
        of_name = (event.run_id == run_id, event.name == name)
        count = connection.scalar(select(func.count()).select_from(schema.event).where(*of_name)) or 0
        rows = connection.execute(
            select(schema.event).where(*of_name).order_by(event.time, event.sequence).limit(most)
        ).mappings()
        for index, row in enumerate(rows):
            clock = clocks.get((row["attempt"], row["rank"], row["instance"]), Clock())
            words = [what, *_event_facts(row, facts)]
            if index == most - 1 and count > most:
                words.append(f"(and {count - most} more)")
            tone = "bad" if name in _BAD else "good" if name == c.TARGET_REACHED.name else ""
            yield Milestone(clock.ours(row["time"], row["received_at"]), " ".join(words), tone)


def _event_facts(row: RowMapping, facts: Sequence[tuple[str, str]]) -> Iterator[str]:
    attributes = row["attributes"]
    step = telling.integer(attributes.get(c.STEP))
    if step is not None:
        yield f"at step {step}"
    for name, before in facts:
        value = attributes.get(name)
        if value is not None:
            told = wording.number(value) if isinstance(value, float) else str(value)
            yield f"{before} {told}".lstrip()
    if row["rank"] not in (0, NO_RANK):
        yield f"on rank {row['rank']}"


def _checkpoints(connection: Connection, run_id: str, clocks: Mapping[_Process, Clock]) -> Iterator[Milestone]:
    checkpoint = schema.checkpoint.c
    rows = connection.execute(
        select(schema.checkpoint)
        .where(checkpoint.run_id == run_id)
        .order_by(checkpoint.time, checkpoint.sequence)
    ).mappings()
    # Every rank tells of its part of a checkpoint.
    told: dict[tuple[object, ...], RowMapping] = {}
    for row in rows:
        told.setdefault(tuple(row[name] for name in ("attempt", "state", "name", "step")), row)
    for state, became, most in (
        (SAVED, "saved", _CHECKPOINTS_SHOWN),
        (FAILED, "not saved", _FAILURES_SHOWN),
        (CORRUPT, "found corrupt", _FAILURES_SHOWN),
    ):
        shown, skipped = _ends([row for row in told.values() if row["state"] == state], 1, most)
        for index, row in enumerate(shown):
            clock = clocks.get((row["attempt"], row["rank"], row["instance"]), Clock())
            words = ["checkpoint", row["name"] or "", became]
            words += [] if row["step"] is None else [f"at step {row['step']}"]
            words += [f"({row['error']})"] if row["error"] else []
            words += [f"({skipped} before it are not shown)"] if skipped and index == 1 else []
            # One that is ahead was corrected when it was received.
            at = row["time"] - min(clock.offset, 0)
            yield Milestone(at, " ".join(filter(None, words)), "" if state == SAVED else "bad")


def _findings(connection: Connection, run_id: str) -> Iterator[Milestone]:
    finding = schema.finding.c
    rows = connection.execute(
        select(schema.finding)
        .where(finding.run_id == run_id)
        .order_by(finding.first_seen, finding.finding_id)
        .limit(_FINDINGS_SHOWN)
    ).mappings()
    for row in rows:
        yield Milestone(row["first_seen"], f"finding {row['rule']} ({row['severity']})", "bad")
        if row["resolved_at"] is not None:
            yield Milestone(row["resolved_at"], f"finding {row['rule']} resolved")


def _ends(items: Sequence[T], first: int, last: int) -> tuple[list[T], int]:
    """Return the first and the last of them, and how many between are left out."""
    skipped = max(0, len(items) - first - last)
    return [*items[:first], *items[first + skipped :]], skipped
