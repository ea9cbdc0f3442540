"""The same failure again and again: trying once more will not help."""

from __future__ import annotations

from dataclasses import dataclass

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.predecessors import signature
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import RunView


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """How often the same error must have ended attempts.

    Attributes:
        times: Of this run and of its predecessors.
        attempts: Of this run alone: there nothing was changed in between.
    """

    times: int = 3
    attempts: int = 2


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a run whose last error is one of which attempts of it, or of its predecessors, ended before."""
    if not view.errors:
        return None
    last = view.errors[-1]
    same = signature(last)
    own = sum(signature(error) == same for error in view.errors)
    before = [sum(signature(error) == same for error in each.errors) for each in view.predecessors]
    if own < parameters.attempts and own + sum(before) < parameters.times:
        return None
    return Sighting(
        step=view.run.last_step,
        evidence={
            "error": last,
            "times": own + sum(before),
            "attempts_of_this_run": own,
            "runs": 1 + sum(count > 0 for count in before),
        },
    )


RULE = RunRule(
    name=c.RULE_REPEATED_FAILURE,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="A bug, a setting or an input that is wrong in every attempt: no accident that another attempt gets "
    "past.",
    action="Stop retrying; read the error and what changed before the first of these runs (`gradwatch runs "
    "compare`).",
)
