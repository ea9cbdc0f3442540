"""Many runs whose collective operations hang or are slow at once: the network between hosts, not the runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import select

from gradwatch import conventions as c
from gradwatch_collector.findings.figures import SECOND
from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_collector.findings.rule import ParametersOf, SceneRule, limited
from gradwatch_collector.findings.store import OPEN
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.storage import schema
from gradwatch_slo.runs import Status

_MEMBERS: Final = (c.RULE_STALLED, c.RULE_SLOW_COLLECTIVE)
_MOST_NAMED: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """An outage is of ``runs`` or more, and of more than ``share`` of the live ones of several ranks.

    They hang or are slow since moments that lie within ``seconds``.
    """

    runs: int = 5
    share: float = limited(0.2, most=1.0)
    seconds: float = 600.0


def detect(scene: Scene, parameters_of: ParametersOf) -> Iterator[Observation]:
    """Yield one observation while the open findings of so many live runs say so.

    It is told of one of the runs, of tier production once there is one, and of the same one while it lasts.
    """
    live = {run.run_id: run for run in scene.runs if run.status is Status.RUNNING and run.rank_count > 1}
    since, told_before = _open(scene, live)
    affected = sorted((live[run_id] for run_id in since), key=lambda run: _order(run, since))
    if not affected:
        return
    parameters: Parameters | None = parameters_of(affected[0])
    if parameters is None:
        return
    together = _together(affected, since, parameters.seconds)
    if len(together) < parameters.runs or len(together) <= parameters.share * len(live):
        return
    told = next((run for run in scene.runs if run.run_id in told_before), together[0])
    if together[0].tier == c.TIER_PRODUCTION != told.tier:  # one that pages has joined
        told = together[0]
    yield Observation(
        run_id=told.run_id,
        attempt=told.attempt,
        rule=c.RULE_COLLECTIVE_OUTAGE,
        severity=Severity.for_tier(told.tier),
        first_seen=min(since[run.run_id] for run in together),
        last_seen=scene.now,
        as_of=max(run.last_seen_at for run in together),
        evidence={
            "count": len(together),
            "live": len(live),
            "runs": [run.run_id for run in together[:_MOST_NAMED]],
        },
    )


def _open(scene: Scene, live: Mapping[str, RunRow]) -> tuple[dict[str, int], set[str]]:
    """Return since when each run hangs or is slow, and of which run an outage is told that is open."""
    finding = schema.finding.c
    rows = scene.connection.execute(
        select(finding.run_id, finding.attempt, finding.rule, finding.first_seen).where(
            finding.state == OPEN, finding.rule.in_((*_MEMBERS, c.RULE_COLLECTIVE_OUTAGE))
        )
    )
    since, told = dict[str, int](), set[str]()
    for row in rows:
        if row.rule == c.RULE_COLLECTIVE_OUTAGE:
            told.add(row.run_id)
        elif row.run_id in live and live[row.run_id].attempt == row.attempt:
            since[row.run_id] = min(row.first_seen, since.get(row.run_id, row.first_seen))
    return since, told


def _together(affected: Sequence[RunRow], since: Mapping[str, int], seconds: float) -> Sequence[RunRow]:
    """Return the most of them that began within so many seconds of each other, in their order."""
    moments = sorted(since.values())
    best = max(
        moments, key=lambda start: (sum(0 <= each - start <= seconds * SECOND for each in moments), start)
    )
    return [run for run in affected if 0 <= since[run.run_id] - best <= seconds * SECOND]


def _order(run: RunRow, since: Mapping[str, int]) -> tuple[bool, int, str]:
    return run.tier != c.TIER_PRODUCTION, since[run.run_id], run.run_id


RULE = SceneRule(
    name=c.RULE_COLLECTIVE_OUTAGE,
    severity=Severity.PAGE,
    detect=detect,
    parameters=Parameters(),
    # Runs come back one by one.
    clears_after=60.0,
    cause="The network between the hosts is broken or congested: a switch, a fabric manager or a subnet "
    "manager failed. The runs are its victims.",
    action="Mend the network; leave the runs until it is clear which of them do not come back, and resume "
    "those from their last good checkpoints.",
)
