"""A run that failed, or that fell silent."""

from __future__ import annotations

from collections.abc import Iterable

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_slo.runs import Status

_RULES = {Status.FAILED: c.RULE_RUN_FAILED, Status.LOST: c.RULE_RUN_LOST}


def detect(scene: Scene) -> Iterable[Observation]:
    """Yield every failed or lost run; one that will be retried is not over and wakes nobody."""
    for run in scene.runs:
        rule = _RULES.get(run.status)
        if rule is None or run.ended_at is None or run.will_retry:
            continue
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
        )
