"""A training loop that cannot be seen properly: silence about it must not pass for health."""

from __future__ import annotations

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import RunView
from gradwatch_collector.runs.telling import text


def detect(view: RunView, _: None) -> Sighting | None:
    """See a run whose agent said what it cannot see."""
    told = view.events_named(c.INSTRUMENTATION_MISSING)
    if not told:
        return None
    first = told[0]
    reasons = dict.fromkeys(filter(None, (text(event.attributes.get(c.MISSING_REASON)) for event in told)))
    return Sighting(rank=first.rank, step=first.step, since=first.time, evidence={"reasons": list(reasons)})


RULE = RunRule(
    name=c.RULE_MISSING_INSTRUMENTATION,
    severity=Severity.TICKET,
    detect=detect,
    parameters=None,
    cause="The training loop does what the agent cannot see: DeepSpeed, for one, keeps gradients of its own.",
    action="Read the reason; report what matters by `watch.log`, or measure by hand (docs/agent.md).",
)
