"""The values detectors take and give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection

from gradwatch import conventions as c
from gradwatch_collector.runs.facts import RunRow


class Severity(StrEnum):
    """How loud a finding is, the loudest first. Only production pages; an experiment's worst is a ticket."""

    PAGE = "page"
    TICKET = "ticket"
    INFO = "info"

    @classmethod
    def for_tier(cls, tier: str) -> Severity:
        """Return the loudest severity a run of this tier may have."""
        return cls.PAGE if tier == c.TIER_PRODUCTION else cls.TICKET


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One thing that is wrong with one attempt of one run now. Moments in Unix nanoseconds.

    ``as_of``: of which moment it tells, where that is not ``last_seen``: what waited on a disk for long wakes
    nobody, though it is seen only now. ``is_over``: it is kept as resolved, for those who ask what happened.
    """

    run_id: str
    attempt: int
    rule: str
    severity: Severity
    first_seen: int
    last_seen: int
    rank: int | None = None
    step: int | None = None
    layer: str | None = None
    born_in: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    as_of: int | None = None
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """What detectors look at: runs that are live or whose ending is of the last hour, and their numbers."""

    connection: Connection
    now: int
    runs: Sequence[RunRow]
