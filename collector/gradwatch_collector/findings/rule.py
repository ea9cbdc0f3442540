"""The shape of a rule: what it is called, how it is found, what it means, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_collector.findings.run_view import RunView
from gradwatch_collector.runs.facts import RunRow

ParametersOf = Callable[[RunRow], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """That one rule sees something wrong with one run now.

    ``since``: when it began, in Unix nanoseconds; None for now. ``severity``: where it is not the rule's.
    ``evidence``: names and numbers, for JSON.
    """

    evidence: Mapping[str, Any]
    step: int | None = None
    layer: str | None = None
    rank: int | None = None
    since: int | None = None
    severity: Severity | None = None


@dataclass(frozen=True, slots=True)
class NoParameters:
    """Of a rule that has none: None would mean that it is off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is the same for all rules.

    ``parameters``: a frozen dataclass whose fields can be set anew for jobs and tiers (`overrides.py`).
    ``severity``: of a production run; Severity.PAGE is a ticket for an experiment. ``clears_after``: for how
    long it must not be seen any more until it is resolved, in seconds.
    """

    name: str
    severity: Severity
    cause: str
    action: str
    parameters: Any = NoParameters()
    clears_after: float = 60.0
    has_birthplace: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRule(Rule):
    """A rule about one run: a function of what was read of it, and of the rule's parameters."""

    detect: Callable[[RunView, Any], Sighting | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneRule(Rule):
    """A rule about all runs that are live or have just ended, by what the database says now.

    ``detect`` gets a function that gives the parameters for a run; None where the rule is off for it.
    ``every``: for how many seconds what it saw is good, where a look takes long.
    """

    detect: Callable[[Scene, ParametersOf], Iterable[Observation]]
    clears_after: float = 0.0
    every: float = 0.0
