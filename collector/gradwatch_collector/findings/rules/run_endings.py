"""A run that failed, or that fell silent."""

from __future__ import annotations

from collections.abc import Iterator

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_collector.findings.rule import ParametersOf, SceneRule
from gradwatch_slo.runs import Status


def _ended(scene: Scene, rule: str, status: Status) -> Iterator[Observation]:
    for run in scene.runs:
        # One that will be retried is not over, and wakes nobody.
        if run.status is status and run.ended_at is not None and not run.will_retry:
            yield Observation(
                run_id=run.run_id,
                attempt=run.attempt,
                rule=rule,
                severity=Severity.for_tier(run.tier),
                first_seen=run.ended_at,
                last_seen=run.ended_at,
                rank=run.cause_rank,
                step=run.last_step,
                evidence={"reason": run.reason},
                concluded=status is Status.LOST,
            )


def detect_failed(scene: Scene, _: ParametersOf) -> Iterator[Observation]:
    """Yield every run whose last attempt failed."""
    return _ended(scene, c.RULE_RUN_FAILED, Status.FAILED)


def detect_lost(scene: Scene, _: ParametersOf) -> Iterator[Observation]:
    """Yield every run that fell silent."""
    return _ended(scene, c.RULE_RUN_LOST, Status.LOST)


FAILED = SceneRule(
    name=c.RULE_RUN_FAILED,
    severity=Severity.PAGE,
    detect=detect_failed,
    cause="The training process ended with an error.",
    action="Read the reason and the last events with `gradwatch runs show RUN`, fix, start again.",
)
LOST = SceneRule(
    name=c.RULE_RUN_LOST,
    severity=Severity.PAGE,
    detect=detect_lost,
    cause="The process was killed (SIGKILL, out of memory) or its machine vanished: heartbeats stopped without "
    "a word.",
    action="Look at the host's kernel log for the OOM killer, then resume from the last checkpoint.",
)
