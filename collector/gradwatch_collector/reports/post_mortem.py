"""What became of a run and why, gathered for people: the same for Markdown and for a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, select

from gradwatch import conventions as c
from gradwatch_collector.api.findings import findings_of_run
from gradwatch_collector.api.shapes import Json
from gradwatch_collector.findings.store import RESOLVED
from gradwatch_collector.reports import wording
from gradwatch_collector.reports.timeline import Milestone, attempt_ending, timeline
from gradwatch_collector.runs import checkpoints
from gradwatch_collector.runs.black_box import LastSteps, last_steps
from gradwatch_collector.runs.comparison import Comparison, compare, last_good_run
from gradwatch_collector.runs.cost import run_cost
from gradwatch_collector.runs.effective_time import effective_time
from gradwatch_collector.runs.facts import RunRow, load_runs
from gradwatch_collector.runs.telling import integer
from gradwatch_collector.storage import schema
from gradwatch_slo.cost import PriceTable
from gradwatch_slo.runs import Status

_NANOS: Final = 1_000_000_000
_MOST_BAD_STEPS: Final = 10_000
_LONGEST_TEXT: Final = 600


@dataclass(frozen=True, slots=True)
class FindingTold:
    """One finding in words."""

    title: str
    evidence: str
    cause: str
    action: str
    runbook_url: str
    is_resolved: bool


@dataclass(frozen=True, slots=True)
class PostMortem:
    """All that the report of a run says. Texts are telemetry's own, and not escaped.

    ``first_bad_step``: which, where and how, None if all were finite. ``bad_steps``: those that were told to
    have had a NaN or Inf. ``comparison``: with the last good run, None if there is none.
    """

    run: RunRow
    summary: str
    timeline: tuple[Milestone, ...]
    first_bad_step: str | None
    findings: tuple[FindingTold, ...]
    checkpoint: str
    last_steps: LastSteps | None
    effective_time: str
    cost: str
    comparison: Comparison | None
    bad_steps: tuple[int, ...]

    def after(self, milestone: Milestone) -> str:
        """Return how long after the run's start something happened."""
        return wording.duration(max(0, milestone.at - self.run.started_at) / _NANOS)


def post_mortem(connection: Connection, run: RunRow, prices: PriceTable | None) -> PostMortem:
    """Gather what is known of a run."""
    findings = findings_of_run(connection, run.run_id)
    first_bad_step = _first_bad_step(run, findings)
    return PostMortem(
        run=run,
        summary=" ".join(_summary(connection, run, findings, first_bad_step)),
        timeline=tuple(timeline(connection, run)),
        first_bad_step=first_bad_step,
        findings=tuple(map(_finding, findings)),
        checkpoint=_checkpoint(connection, run),
        last_steps=last_steps(connection, run.run_id),
        effective_time=_effective_time(connection, run),
        cost=wording.cost(run_cost(connection, run.run_id, prices)),
        comparison=_with_last_good(connection, run, prices),
        bad_steps=_bad_steps(connection, run.run_id),
    )


def shortened(text: str) -> str:
    """Return a text of a length that people read."""
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"


def _with_last_good(connection: Connection, run: RunRow, prices: PriceTable | None) -> Comparison | None:
    found = last_good_run(connection, run)
    reference = load_runs(connection, schema.run.c.run_id == found) if found is not None else []
    return compare(connection, [*reference, run], prices) if reference else None


def _summary(
    connection: Connection, run: RunRow, findings: Sequence[Json], first_bad_step: str | None
) -> Iterator[str]:
    named = (("model", run.model), ("dataset", run.dataset), ("team", run.team))
    what = ", ".join([*(f"{name} {value}" for name, value in named if value), f"tier {run.tier}"])
    host = f" on {run.host}" if run.host else ""
    ranks = f" with {run.rank_count} ranks" if run.rank_count > 1 else ""
    yield f"Run {run.run_id} of job {run.job} ({what}) started on"
    yield f"{wording.clock_time(run.started_at)} UTC{host}{ranks}"
    yield _ending(connection, run)
    if run.last_loss_nonfinite:
        yield "Its last loss was NaN or infinite."
    elif run.last_loss is not None:
        yield f"Its last loss was {wording.number(run.last_loss)}."
    if first_bad_step is not None:
        yield f"The first step with a NaN or Inf was {first_bad_step}."
    if run.target is not None and run.target_reached_at is None:
        verb = "has not reached" if run.status is Status.RUNNING else "did not reach"
        yield f"It {verb} its target {run.target}."
    elif run.target is not None and run.target_reached_at is not None:
        took = wording.duration(max(0, run.target_reached_at - run.started_at) / _NANOS)
        yield f"It reached its target {run.target} after {took}."
    rules = sorted({finding["rule"] for finding in findings})
    yield f"Findings: {', '.join(rules)}." if rules else "There are no findings."


def _ending(connection: Connection, run: RunRow) -> str:
    """Return the end of the sentence that begins with the run's start."""
    until = run.last_seen_at if run.ended_at is None else run.ended_at
    took = wording.duration(max(0, until - run.started_at) / _NANOS)
    done = "" if run.last_step is None else f" and {_counted(run.last_step + 1, 'step')}"
    tried = f", in attempt {run.attempt}" if run.attempt > 1 else ""
    if run.status is Status.RUNNING:
        return f"and is running; it was last heard of after {took}{done}{tried}."
    attempt = schema.attempt.c
    row = connection.execute(
        select(schema.attempt).where(attempt.run_id == run.run_id, attempt.attempt == run.attempt)
    ).mappings()
    how = attempt_ending(row.one())
    if run.status is Status.LOST:
        how = "was lost: nothing more was heard of it"
    elif run.status is Status.CANCELLED:
        how = f"was {how}"
    return f"and, after {took}{done}{tried}, {how.rstrip('.')}."


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _first_bad_step(run: RunRow, findings: Sequence[Json]) -> str | None:
    # Newest first; the first bad step is that of the first attempt that had one.
    found = min(
        (finding for finding in findings if finding["rule"] == c.RULE_NONFINITE),
        key=lambda finding: finding["attempt"],
        default=None,
    )
    if found is None:
        return None
    earliest, latest = (integer(found["evidence"].get(f"{name}_step")) for name in ("earliest", "latest"))
    if found["step"] is not None:
        when = f"step {found['step']}"
    elif earliest is not None and latest is not None:
        when = f"between steps {earliest} and {latest}"
    else:
        when = "one that is not known"
    places = [
        ("layer", "in layer"),
        ("born_in", "born in"),
        *([("rank", "on rank")] if run.rank_count > 1 else []),
    ]
    where = [f"{words} {found[name]}" for name, words in places if found[name] is not None]
    return ", ".join([when, *where])


def _finding(finding: Json) -> FindingTold:
    places = ("attempt", "step", "layer", "rank", "born_in")
    where = ", ".join(f"{name} {finding[name]}" for name in places if finding.get(name) is not None)
    return FindingTold(
        title=f"{finding['rule']} ({finding['severity']}, {finding['state']}): {where}",
        evidence=shortened(
            ", ".join(f"{name} {value}" for name, value in finding["evidence"].items() if value is not None)
        ),
        cause=finding["cause"],
        action=finding["action"],
        runbook_url=finding["runbook_url"],
        is_resolved=finding["state"] == RESOLVED,
    )


def _checkpoint(connection: Connection, run: RunRow) -> str:
    record = checkpoints.record_of(connection, run.run_id)
    attempted = record.saved + record.failed
    if not attempted:
        return "No checkpoint was told of."
    saved = f"{record.saved} of {attempted} checkpoints were saved."
    age = record.age_seconds(run.last_seen_at if run.ended_at is None else run.ended_at)
    if age is None or record.last_good_at is None:
        return f"{saved} There is none to resume from."
    step = "" if record.last_good_step is None else f", to go on with step {record.last_good_step}"
    last = f"The last good one is of {wording.clock_time(record.last_good_at)} UTC{step}"
    return f"{saved} {last}; the run went on for {wording.duration(age)} after it."


def _effective_time(connection: Connection, run: RunRow) -> str:
    spent = effective_time(connection, run)
    if spent is None or spent.ratio is None:
        return "Unknown: no steps were told of, or not all of them are kept any more."
    productive, waiting, lost, wall = (
        wording.duration(each) for each in (spent.productive, spent.waiting, spent.lost, spent.wall)
    )
    return (
        f"{wording.share(spent.ratio)} of {wall}: {productive} in steps that count, {waiting} waiting for "
        f"data, {lost} in steps that were done again."
    )


def _bad_steps(connection: Connection, run_id: str) -> tuple[int, ...]:
    event = schema.event.c
    told = connection.scalars(
        select(event.attributes)
        .where(event.run_id == run_id, event.name == c.NONFINITE_STEP.name)
        .limit(_MOST_BAD_STEPS)
    )
    steps = {integer(attributes.get(c.STEP)) for attributes in told}
    return tuple(sorted(step for step in steps if step is not None))
