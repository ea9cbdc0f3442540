"""Memory that ran out, whether or not training went on."""

from __future__ import annotations

from dataclasses import dataclass

from gradwatch import conventions as c
from gradwatch_collector.findings.figures import SECOND, newest, step_ends
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import EventSeen, RunView
from gradwatch_collector.runs.telling import integer, text
from gradwatch_slo.runs import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """``remembered``: for how long a run that goes on is said to have run out of memory, in seconds."""

    remembered: float = 3600.0


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a run that ran out of memory a short while ago, or that ended after it."""
    told = view.events_named(c.OUT_OF_MEMORY)
    if not told:
        return None
    first, last = told[0], told[-1]
    ends = step_ends(view)
    recovered = ends.get(last.rank, last.time) > last.time or view.run.status is Status.SUCCEEDED
    # By the sender's own clock, where that is known to go on.
    if recovered and max(ends.values(), default=0) - last.time > parameters.remembered * SECOND:
        return None
    device = text(last.attributes.get(c.DEVICE))
    return Sighting(
        rank=first.rank,
        step=first.step,
        since=first.time,
        evidence={
            "device": device,
            "during": text(last.attributes.get(c.OOM_DURING)),
            "requested_bytes": integer(last.attributes.get(c.OOM_REQUESTED)),
            "times": len(told),
            "recovered": recovered,
            "fragmentation": _fragmentation(view, last),
        },
    )


def _fragmentation(view: RunView, event: EventSeen) -> float | None:
    """Return what torch's allocator held in vain of the device, as a share of all that it held."""
    for each in view.every(c.DEVICE_MEMORY_FRAGMENTATION):
        if each.rank == event.rank and each.attributes.get(c.DEVICE) == event.attributes.get(c.DEVICE):
            return newest(each)
    return None


RULE = RunRule(
    name=c.RULE_OUT_OF_MEMORY,
    severity=Severity.TICKET,
    detect=detect,
    parameters=Parameters(),
    cause="More memory was asked for than the device or the process has: a batch that is longer than others, "
    "a leak, or free memory in pieces that are too small (fragmentation).",
    action="Lower the batch size or checkpoint activations; where fragmentation is high, set "
    "`PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`; where memory grew before, look for the leak.",
)
