"""Many runs that fell silent at once: the way to the collector is broken, not the runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_collector.findings.rule import ParametersOf, SceneRule
from gradwatch_collector.runs.facts import RunRow

_MOST_NAMED: Final = 100


def detect(scene: Scene, _: ParametersOf) -> Iterable[Observation]:
    """Yield one observation while any run of the outage is silent.

    It is told of one of the runs, of tier production if there is one, and always the same: who is back stays in
    the outage until all are.
    """
    members = sorted((run for run in scene.runs if run.outage_at is not None), key=_order)
    silent = [run.run_id for run in members if run.silent_in_outage]
    if silent:
        told = members[0]
        yield Observation(
            run_id=told.run_id,
            attempt=told.attempt,
            rule=c.RULE_TELEMETRY_OUTAGE,
            severity=Severity.for_tier(told.tier),
            first_seen=told.outage_at or scene.now,
            last_seen=scene.now,
            evidence={
                "count": len(members),
                "silent": len(silent),
                "runs": [run.run_id for run in members[:_MOST_NAMED]],
            },
        )


def _order(run: RunRow) -> tuple[bool, int, str]:
    return run.tier != c.TIER_PRODUCTION, run.outage_at or 0, run.run_id


RULE = SceneRule(
    name=c.RULE_TELEMETRY_OUTAGE,
    severity=Severity.PAGE,
    detect=detect,
    cause="Many runs fell silent within seconds: the network to the collector, a proxy, a shared host or its "
    "power failed. The runs may well be training.",
    action="Restore the way to the collector; leave the runs alone until it is clear that they are dead.",
)
