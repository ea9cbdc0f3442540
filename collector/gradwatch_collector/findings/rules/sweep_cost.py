"""A job whose runs have come to cost much more than they did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import func, select

from gradwatch import conventions as c
from gradwatch_collector.findings.figures import SECOND
from gradwatch_collector.findings.levels import median, rounded
from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_collector.findings.rule import ParametersOf, SceneRule
from gradwatch_collector.findings.store import OPEN
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched

_HOUR: Final = 3600 * SECOND
_DAY: Final = 24 * _HOUR
_DAYS_BEFORE: Final = 7
_LEAST_DAYS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What is too much of the last 24 hours, against the seven days before.

    Attributes:
        step_cost: What 1 000 steps may cost, as a multiple of what they usually cost.
        runs: Of how many runs that must be known.
        hours: How many device-hours the job's runs may take, as a multiple of a usual day's.
        device_hours: With fewer than these it is told, and raises no alert.
    """

    step_cost: float = 1.2
    runs: int = 3
    hours: float = 3.0
    device_hours: float = 8.0


@dataclass(slots=True)
class _Job:
    """By day, 0 being the last 24 hours: device-hours; and of that day, how many runs there were, and costs."""

    hours: dict[int, float] = field(default_factory=dict)
    runs: int = 0
    priced: int = 0
    cost_ratio: float | None = None


def detect(scene: Scene, parameters_of: ParametersOf) -> Iterator[Observation]:
    """Yield one observation a job that is live or was within the last hour, told of one of its runs."""
    by_job: dict[str, list[RunRow]] = {}
    for run in scene.runs:
        by_job.setdefault(run.job, []).append(run)
    spent = _spent(scene, list(by_job))
    told_before = _told_before(scene)
    for job, runs in by_job.items():
        oldest = min(runs, key=lambda run: (run.started_at, run.run_id))
        # The run that the open finding is told of may have been over for long.
        run_id, attempt = told_before.get(job, (oldest.run_id, oldest.attempt))
        parameters = parameters_of(oldest)
        evidence = None if parameters is None else _evidence(spent.get(job, _Job()), parameters)
        if evidence is not None:
            is_small = evidence["device_hours"] < parameters.device_hours
            yield Observation(
                run_id=run_id,
                attempt=attempt,
                rule=c.RULE_SWEEP_COST,
                severity=Severity.INFO if is_small else Severity.TICKET,
                first_seen=scene.now,
                last_seen=scene.now,
                evidence=evidence,
            )


def _evidence(job: _Job, parameters: Parameters) -> dict[str, Any] | None:
    """Return what is too much; None if nothing is."""
    today = job.hours.get(0, 0.0)
    before = [hours for day, hours in job.hours.items() if day > 0]
    usual = median(before) if len(before) >= _LEAST_DAYS else None
    dear = (
        job.cost_ratio is not None and job.priced >= parameters.runs and job.cost_ratio >= parameters.step_cost
    )
    many = usual is not None and usual > 0 and today >= parameters.hours * usual
    if not dear and not many:
        return None
    return {
        "device_hours": rounded(today),
        "usual_device_hours_a_day": None if usual is None else rounded(usual),
        "runs": job.runs,
        "step_cost_ratio": rounded(job.cost_ratio) if dear and job.cost_ratio is not None else None,
    }


def _spent(scene: Scene, jobs: Sequence[str]) -> Mapping[str, _Job]:
    run, summary, found = schema.run.c, schema.run_summary.c, dict[str, _Job]()
    day = (scene.now - run.started_at) // _DAY
    ended = func.coalesce(run.ended_at, scene.now)
    for some in batched(jobs):
        rows = scene.connection.execute(
            select(
                run.job,
                day.label("day"),
                func.count().label("runs"),
                func.sum((ended - run.started_at) * 1.0 * run.rank_count).label("held"),
                func.count(summary.step_cost_ratio).label("priced"),
                func.avg(summary.step_cost_ratio).label("ratio"),
            )
            .join(schema.run_summary, summary.run_id == run.run_id, isouter=True)
            .where(
                run.job.in_(some),
                run.started_at > scene.now - (1 + _DAYS_BEFORE) * _DAY,
                run.started_at <= scene.now,
            )
            .group_by(run.job, day)
        )
        for row in rows:
            job = found.setdefault(row.job, _Job())
            job.hours[int(row.day)] = float(row.held) / _HOUR
            if row.day == 0:
                job.runs, job.priced = int(row.runs), int(row.priced)
                job.cost_ratio = None if row.ratio is None else float(row.ratio)
    return found


def _told_before(scene: Scene) -> Mapping[str, tuple[str, int]]:
    """Return run and attempt of which the open finding of each job is told."""
    finding, run = schema.finding.c, schema.run.c
    query = (
        select(run.job, finding.run_id, finding.attempt)
        .join(schema.run, run.run_id == finding.run_id)
        .where(finding.state == OPEN, finding.rule == c.RULE_SWEEP_COST)
        .order_by(finding.finding_id.desc())
    )
    return {row.job: (row.run_id, row.attempt) for row in scene.connection.execute(query)}


RULE = SceneRule(
    name=c.RULE_SWEEP_COST,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    clears_after=3600.0,
    every=60.0,  # adding up a job's runs of a week takes a while, and what it says moves slowly
    cause="A sweep grew, was started twice, or tries configurations that cost more a step than those before.",
    action="See with `gradwatch runs list` what the job started in the last day, and with `gradwatch runs "
    "compare` what a step costs in each; end the runs that nobody waits for, and give the sweep a limit.",
)
