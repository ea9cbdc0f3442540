"""What became of a planned run: the truth beside what was found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from gym.faults import KINDS
from gym.plan import PlannedRun

TRUTH = "truth.json"


@dataclass(frozen=True, slots=True)
class Injection:
    """When a fault came, in Unix seconds, and where its NaN is born; null where null is the truth."""

    step: int
    time: float
    born_in: str | None = None
    layer: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A finding as it was stored, and when it was first seen open, in Unix seconds; None if it never was."""

    run_id: str
    attempt: int
    rule: str
    severity: str
    state: str
    step: int | None
    layer: str | None
    born_in: str | None
    seen: float | None
    evidence: dict[str, object]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run and what was found of it. ``exit_codes``: of its processes, in order of their starts."""

    planned: PlannedRun
    exit_codes: tuple[int, ...]
    injection: Injection | None
    findings: tuple[Found, ...]


def save(outcomes: Iterable[Outcome], path: Path) -> None:
    """Write outcomes as JSON; what is expected of each fault is written beside it."""
    path.write_text(json.dumps([_to_json(each) for each in outcomes], indent=1) + "\n")


def load(path: Path) -> list[Outcome]:
    """Read what `save` wrote."""
    return [
        Outcome(
            PlannedRun(**each["planned"]),
            tuple(each["exit_codes"]),
            Injection(**each["injection"]) if each["injection"] else None,
            tuple(Found(**found) for found in each["findings"]),
        )
        for each in json.loads(path.read_text())
    ]


def _to_json(outcome: Outcome) -> dict[str, object]:

    kind = KINDS[outcome.planned.fault] if outcome.planned.fault else None
    return {
        **asdict(outcome),
        "run_ids": outcome.planned.run_ids,
        "expected": sorted(kind.expected) if kind else [],
        "companions": sorted(kind.companions) if kind else [],
    }
