"""The risk of running out of memory, before it happens."""

from __future__ import annotations

from collections.abc import Iterable

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_collector.runs.facts import load_headroom
from gradwatch_slo.runs import Status

MINIMUM_HEADROOM = 0.10


def detect(scene: Scene) -> Iterable[Observation]:
    """Yield every live run whose peak leaves less than 10 % of its tightest device."""
    left = load_headroom(scene.connection, scene.now)
    for run in scene.runs:
        if run.status is not Status.RUNNING:
            continue
        headroom = left.get(run.run_id)
        if headroom is not None and headroom < MINIMUM_HEADROOM:
            yield Observation(
                run_id=run.run_id,
                attempt=run.attempt,
                rule=c.RULE_MEMORY_HEADROOM,
                severity=Severity.TICKET,
                first_seen=scene.now,
                last_seen=scene.now,
                step=run.last_step,
                evidence={"headroom": round(headroom, 4), "minimum": MINIMUM_HEADROOM},
            )
