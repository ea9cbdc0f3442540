"""A checkpoint that is not what was saved any more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, func, select

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_collector.findings.rule import ParametersOf, SceneRule
from gradwatch_collector.records import NO_RANK
from gradwatch_collector.runs.checkpoints import CORRUPT, SAVED, VERIFIED, Record, record_of
from gradwatch_collector.runs.clocks import Clock
from gradwatch_collector.runs.facts import RunRow, load_runs
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched
from gradwatch_slo.runs import Status

# What is over is looked into as well, by `gradwatch checkpoint verify` every night, say.
_REMEMBERED: Final = 30 * 86_400 * 1_000_000_000
_MOST_NAMED: Final = 16
_KEY: Final = ("run_id", "attempt", "rank", "instance")


@dataclass(frozen=True, slots=True)
class _Word:
    """What was told of a checkpoint, from where, and when, by our clock: a sender's may be behind."""

    row: RowMapping
    host: str | None
    at: int

    @property
    def name(self) -> str | None:
        name: str | None = self.row["name"]
        return name

    def is_of_the_file_of(self, other: _Word) -> bool:
        """Every rank and every host may have a file of that name; who looks from outside has no rank."""
        ranks, hosts = {self.row["rank"], other.row["rank"]}, {self.host, other.host}
        return self.name == other.name and (len(ranks) == 1 or NO_RANK in ranks) and len(hosts - {None}) < 2


def detect(scene: Scene, parameters_of: ParametersOf) -> Iterator[Observation]:
    """Yield every attempt with a checkpoint that was found corrupt: if it is over, within the last 30 days.

    Not once that file was saved again or found good, or the run has saved another one since; nor, where the run
    is over and nothing of that can come, once somebody has acknowledged what is found.
    """
    bad = list(_corrupt(scene))
    runs = _runs(scene.connection, sorted({word.row["run_id"] for word in bad}))
    seen = _acknowledged(scene.connection)
    for run_id, told in groupby(bad, key=lambda word: str(word.row["run_id"])):
        run = runs.get(run_id)
        if run is None or parameters_of(run) is None:
            continue
        record = record_of(scene.connection, run_id)
        still = list(_still_bad(scene.connection, run_id, list(told), record))
        for attempt, group in groupby(still, key=lambda word: int(word.row["attempt"])):
            words = list(group)
            if run.status is not Status.RUNNING:
                known = {word.name for word in words if word.at <= seen.get((run_id, attempt), 0)}
                words = [word for word in words if word.name not in known]
            if words:
                yield _observation(run, attempt, words, record)


def _observation(run: RunRow, attempt: int, words: Sequence[_Word], record: Record) -> Observation:
    words = sorted(words, key=lambda word: word.at)
    last = words[-1]
    return Observation(
        run_id=run.run_id,
        attempt=attempt,
        rule=c.RULE_CHECKPOINT_CORRUPT,
        severity=Severity.for_tier(run.tier),
        first_seen=words[0].at,
        last_seen=last.at,
        rank=None if last.row["rank"] == NO_RANK else last.row["rank"],
        step=last.row["step"],
        evidence={
            "checkpoint": last.name,
            "fault": last.row["error"],
            "bytes": last.row["size"],
            "corrupt": list(dict.fromkeys(word.name for word in words))[:_MOST_NAMED],
            "last_good_step": record.last_good_step,
            # When the corrupt one was found: what changes with each tick is no evidence.
            "last_good_age_seconds": record.age_seconds(last.at),
        },
    )


def _still_bad(connection: Connection, run_id: str, bad: Sequence[_Word], record: Record) -> Iterator[_Word]:
    checkpoint = schema.checkpoint.c
    good = [
        word
        for names in batched(sorted({word.name for word in bad if word.name is not None}))
        for word in _words(
            connection,
            checkpoint.run_id == run_id,
            checkpoint.name.in_(names),
            checkpoint.state.in_((SAVED, VERIFIED)),
        )
    ]
    for word in bad:
        again = any(other.at > word.at and other.is_of_the_file_of(word) for other in good)
        if not again and not record.has_good_after(word.at, word.name, word.row["step"]):
            yield word


def _corrupt(scene: Scene) -> Iterator[_Word]:
    checkpoint, run = schema.checkpoint.c, schema.run.c
    live = select(run.run_id).where(run.status == Status.RUNNING)
    recent = checkpoint.time >= scene.now - _REMEMBERED
    return _words(scene.connection, checkpoint.state == CORRUPT, recent | checkpoint.run_id.in_(live))


def _words(connection: Connection, *conditions: ColumnElement[bool]) -> Iterator[_Word]:
    checkpoint, process, event = schema.checkpoint.c, schema.process, schema.event
    query = (
        select(
            schema.checkpoint,
            process.c.clock,
            process.c.resource[c.HOST_NAME].as_string().label("host"),
            # Events are not kept for as long.
            func.coalesce(event.c.time, checkpoint.time).label("told_at"),
            func.coalesce(event.c.received_at, checkpoint.time).label("received_at"),
        )
        .join(process, and_(*(process.c[name] == checkpoint[name] for name in _KEY)), isouter=True)
        .join(event, and_(*(event.c[name] == checkpoint[name] for name in (*_KEY, "sequence"))), isouter=True)
        .where(*conditions)
        .order_by(checkpoint.run_id, checkpoint.attempt, checkpoint.time, checkpoint.sequence)
    )
    for row in connection.execute(query).mappings():
        clock = Clock() if row["clock"] is None else Clock(**row["clock"])
        yield _Word(row, row["host"], clock.ours(row["told_at"], row["received_at"]))


def _runs(connection: Connection, ids: Sequence[str]) -> Mapping[str, RunRow]:
    return {
        run.run_id: run for some in batched(ids) for run in load_runs(connection, schema.run.c.run_id.in_(some))
    }


def _acknowledged(connection: Connection) -> Mapping[tuple[str, int], int]:
    """Return when what was found of an attempt was acknowledged."""
    finding = schema.finding.c
    rows = connection.execute(
        select(finding.run_id, finding.attempt, finding.acknowledged_at).where(
            finding.rule == c.RULE_CHECKPOINT_CORRUPT, finding.acknowledged_at.is_not(None)
        )
    )
    return {(row.run_id, row.attempt): row.acknowledged_at for row in rows}


RULE = SceneRule(
    name=c.RULE_CHECKPOINT_CORRUPT,
    severity=Severity.PAGE,
    detect=detect,
    cause="The checkpoint was cut or changed after it had been saved: a full or failing disk, a copy that "
    "broke off, or another program that wrote to it.",
    action="Resume from the last good one, which `gradwatch.latest_checkpoint` returns; find out with "
    "`gradwatch checkpoint verify PATH` which others are bad, and look at the disk before more is saved to "
    "it. Of a run that is over, say that you have seen it: `gradwatch findings ack ID`.",
)
