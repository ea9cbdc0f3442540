"""The risk of running out of memory, before it happens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_collector.findings.rule import ParametersOf, SceneRule, limited
from gradwatch_collector.runs.facts import load_headroom
from gradwatch_slo.runs import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """``minimum``: what the peak should leave of the tightest device (or host), as a share of its limit."""

    minimum: float = limited(0.10, most=1.0)


def detect(scene: Scene, parameters_of: ParametersOf) -> Iterable[Observation]:
    """Yield every live run whose peak leaves less than that of its tightest device."""
    left = load_headroom(scene.connection, scene.now)
    for run in scene.runs:
        if run.status is not Status.RUNNING:
            continue
        headroom, parameters = left.get(run.run_id), parameters_of(run)
        if headroom is not None and parameters is not None and headroom < parameters.minimum:
            yield Observation(
                run_id=run.run_id,
                attempt=run.attempt,
                rule=c.RULE_MEMORY_HEADROOM,
                severity=Severity.TICKET,
                first_seen=scene.now,
                last_seen=scene.now,
                step=run.last_step,
                evidence={"headroom": round(headroom, 4), "minimum": parameters.minimum},
            )


RULE = SceneRule(
    name=c.RULE_MEMORY_HEADROOM,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="Peak memory is close to the device's limit.",
    action="Lower the batch size or checkpoint activations before a longer batch runs out of memory.",
)
