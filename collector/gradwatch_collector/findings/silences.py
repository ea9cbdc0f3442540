"""Findings that raise no alert for a while: they are stored and shown all the same."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from sqlalchemy import Connection, insert, select, update

from gradwatch import conventions as c
from gradwatch_collector.service import audit
from gradwatch_collector.storage import schema

# Told of one run, and about others as well: who silences that run does not speak for them.
_OF_ALL_RUNS: Final = (c.RULE_TELEMETRY_OUTAGE, c.RULE_COLLECTIVE_OUTAGE)
_OF_A_JOB: Final = (c.RULE_SWEEP_COST,)
_silence = schema.silence.c


class UnknownSilenceError(LookupError):
    """No silence of that number is in force."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """Which findings: of one run, of jobs (a shell pattern), of a rule; None is any.

    But outages of many runs only by their rule, and what is about a job only by that or by the job.
    """

    single_run: str | None = None
    job: str | None = None
    rule: str | None = None

    def fits(self, run_id: str, job: str, rule: str) -> bool:
        """Return whether it is about a finding of this run, job and rule."""
        if self.rule is None and (rule in _OF_ALL_RUNS or (rule in _OF_A_JOB and self.job is None)):
            return False
        return (
            self.single_run in (None, run_id)
            and (self.job is None or fnmatchcase(job, self.job))
            and self.rule in (None, rule)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """One that is in force ``until`` a moment; moments in Unix nanoseconds."""

    silence_id: int
    about: About
    until: int
    reason: str
    actor: str
    recorded_at: int


def silence(connection: Connection, about: About, until: int, reason: str, *, now: int) -> int:
    """Let findings raise no alert, and write down who said so; return the number of the silence.

    ``until`` and ``now`` in Unix nanoseconds.
    """
    actor = audit.operator()
    values = {**asdict(about), "until": until, "reason": reason}
    number: int = connection.execute(
        insert(schema.silence)
        .values(values | {"actor": actor, "recorded_at": now})
        .returning(_silence.silence_id)
    ).scalar_one()
    audit.record(connection, actor, "finding.silenced", str(number), values, now=now)
    return number


def unsilence(connection: Connection, silence_id: int, *, now: int) -> Silence:
    """End a silence; return what it was. ``now`` in Unix nanoseconds.

    Raises:
        UnknownSilenceError: none of that number is in force.
    """
    found = next((each for each in load_silences(connection, now) if each.silence_id == silence_id), None)
    if found is None:
        raise UnknownSilenceError(f"no silence {silence_id} is in force")
    connection.execute(update(schema.silence).where(_silence.silence_id == silence_id).values(until=now))
    audit.record(connection, audit.operator(), "finding.unsilenced", str(silence_id), now=now)
    return found


def load_silences(connection: Connection, now: int) -> list[Silence]:
    """Return those in force at a moment (Unix nanoseconds), newest first."""
    rows = connection.execute(
        select(schema.silence).where(_silence.until > now).order_by(_silence.silence_id.desc())
    )
    return [_of(row) for row in rows]


def silenced_until(silences: Iterable[Silence], run_id: str, job: str, rule: str) -> int | None:
    """Return until when a finding raises no alert, in Unix nanoseconds; None if it does."""
    return max((each.until for each in silences if each.about.fits(run_id, job, rule)), default=None)


def _of(row: Any) -> Silence:
    return Silence(
        silence_id=row.silence_id,
        about=About(single_run=row.single_run, job=row.job, rule=row.rule),
        until=row.until,
        reason=row.reason,
        actor=row.actor,
        recorded_at=row.recorded_at,
    )
