"""A run that failed, or that fell silent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqlalchemy import Connection, func, select

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_collector.findings.rule import ParametersOf, SceneRule
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import batched
from gradwatch_slo.runs import Status


def detect_failed(scene: Scene, parameters_of: ParametersOf) -> Iterator[Observation]:
    """Yield every run whose last attempt failed."""
    for run, ended_at in _ended(scene, parameters_of, Status.FAILED):
        yield _observation(run, ended_at, c.RULE_RUN_FAILED, ended_at)


def detect_lost(scene: Scene, parameters_of: ParametersOf) -> Iterator[Observation]:
    """Yield every run that fell silent.

    That is of now, however long ago its last sign of life was, if it was heard when it lived. Else all that is
    known of it was kept on a disk.
    """
    lost = list(_ended(scene, parameters_of, Status.LOST))
    known_since = _known_since(scene.connection, [run.run_id for run, _ in lost])
    for run, ended_at in lost:
        was_heard = known_since.get(run.run_id, ended_at) <= run.last_seen_at
        yield _observation(run, ended_at, c.RULE_RUN_LOST, scene.now if was_heard else ended_at)


def _ended(scene: Scene, parameters_of: ParametersOf, status: Status) -> Iterator[tuple[RunRow, int]]:
    for run in scene.runs:
        # One that will be retried is not over, and wakes nobody.
        is_over = run.status is status and not run.will_retry
        if is_over and run.ended_at is not None and parameters_of(run) is not None:
            yield run, run.ended_at


def _known_since(connection: Connection, runs: Sequence[str]) -> dict[str, int]:
    """Return when each was first heard, by our clock, in Unix nanoseconds."""
    history = schema.run_history.c
    return {
        run_id: recorded_at
        for some in batched(runs)
        for run_id, recorded_at in connection.execute(
            select(history.run_id, func.min(history.recorded_at))
            .where(history.run_id.in_(some))
            .group_by(history.run_id)
        )
    }


def _observation(run: RunRow, ended_at: int, rule: str, as_of: int) -> Observation:
    return Observation(
        run_id=run.run_id,
        attempt=run.attempt,
        rule=rule,
        severity=Severity.for_tier(run.tier),
        first_seen=ended_at,
        last_seen=ended_at,
        as_of=as_of,
        rank=run.cause_rank,
        step=run.last_step,
        evidence={"reason": run.reason},
    )


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
    cause="The process was killed (SIGKILL, out of memory) or its machine vanished: heartbeats stopped "
    "without a word.",
    action="Look at the host's kernel log for the OOM killer, then resume from the last checkpoint.",
)
