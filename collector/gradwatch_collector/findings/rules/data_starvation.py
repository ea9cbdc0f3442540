"""A device that idles because training waits for its data."""

from __future__ import annotations

from dataclasses import dataclass

from gradwatch import conventions as c
from gradwatch_collector.findings.figures import SECOND, by_rank, rounded, total
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import Number, RunView
from gradwatch_slo.runs import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Starved is who waits for more than ``share`` of the time, and for ``least`` seconds a step.

    That must be so in both halves of the newest ``seconds``, in which there must be ``steps``.
    """

    share: float = 0.4
    least: float = 0.002
    seconds: float = 4.0
    steps: int = 20


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a live run of which a rank waits for its data for much of its time; of several the worst."""
    if view.run.status is not Status.RUNNING:
        return None
    waits, found = by_rank(view.every(c.DATA_WAIT)), list[tuple[float, float, float, int]]()
    for rank, durations in by_rank(view.every(c.STEP_DURATION)).items():
        if rank in waits and len(waits[rank].recent) and len(durations.recent):
            halves = _halves(durations, waits[rank], parameters)
            if halves is not None:
                found.append((*halves, rank))
    if not found:
        return None
    share, wait, step, rank = max(found)
    since = int(waits[rank].recent.times[-1]) - int(parameters.seconds * SECOND)
    return Sighting(
        rank=rank,
        step=view.step_at(int(waits[rank].recent.times[-1])),
        since=max(since, view.run.started_at),
        evidence={
            "share": rounded(share),
            "wait_seconds": rounded(wait),
            "step_seconds": rounded(step),
        },
    )


def _halves(durations: Number, waits: Number, parameters: Parameters) -> tuple[float, float, float] | None:
    """Return share, wait and step of the better half; None where one of them is not starved."""
    until = int(durations.recent.times[-1])
    half = int(parameters.seconds * SECOND / 2)
    found: list[tuple[float, float, float]] = []
    for window in ((until - 2 * half, until - half), (until - half, until)):
        lasted, steps = total(durations, *window)
        waited, _ = total(waits, *window)
        if steps < parameters.steps / 2 or not lasted > 0:
            return None
        share, wait = waited / lasted, waited / steps
        if share < parameters.share or wait < parameters.least:
            return None
        found.append((share, wait, lasted / steps))
    return min(found)


RULE = RunRule(
    name=c.RULE_DATA_STARVATION,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="Batches come more slowly than training takes them: too few loader workers, work that could be done "
    "once and kept, a slow or remote disk.",
    action="Raise `num_workers` and `prefetch_factor` of the DataLoader, set `pin_memory` and "
    "`persistent_workers`, move decoding out of the loop, or put the data on a local disk.",
)
