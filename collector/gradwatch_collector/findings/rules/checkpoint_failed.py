"""A checkpoint that could not be saved."""

from __future__ import annotations

from dataclasses import dataclass

from gradwatch import conventions as c
from gradwatch_collector.findings.figures import SECOND, step_ends
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import RunView
from gradwatch_collector.runs.checkpoints import FAILED, SAVED


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """``remembered``: for how long a failure is told of that a good checkpoint has followed, in seconds."""

    remembered: float = 600.0


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a run that failed to save a checkpoint, until it has saved another one and some time has passed."""
    attempts = [each for each in view.checkpoints if each.state in (FAILED, SAVED)]
    failures = [each for each in attempts if each.state == FAILED]
    if not failures:
        return None
    last = failures[-1]
    saved_since = any(each.state == SAVED and each.time > last.time for each in attempts)
    # By what the sender's own clock showed at the end of a step: a stalled run forgets nothing.
    if saved_since and step_ends(view).get(last.rank, 0) - last.time > parameters.remembered * SECOND:
        return None
    return Sighting(
        rank=last.rank,
        step=last.step,
        since=failures[0].time,
        evidence={
            "failed": len(failures),
            "attempted": len(attempts),
            "checkpoint": last.name,
            "error": last.error,
            "saved_since": saved_since,
        },
    )


RULE = RunRule(
    name=c.RULE_CHECKPOINT_FAILED,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="The saver raised an exception: a full disk or quota, a file system that is away, or a state that "
    "cannot be pickled.",
    action="Read the error of the finding; make room or mend the path. The checkpoint before is as it was: "
    "see `gradwatch checkpoint verify PATH`.",
)
