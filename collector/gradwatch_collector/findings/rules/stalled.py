"""A run that hangs: no step ends any more, though its processes live."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from gradwatch import conventions as c
from gradwatch_collector.findings.figures import SECOND, step_ends
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import NoParameters, RunRule, Sighting
from gradwatch_collector.findings.run_view import EventSeen, RunView
from gradwatch_collector.runs.telling import text
from gradwatch_slo.runs import Status

_MOST_NAMED: Final = 16
_MOST_STACK: Final = 1 << 16
_FRAME: Final = re.compile(r'File "([^"]{1,500})", line (\d+), in (\S{1,200})')
# Where a rank waits for others: in a collective that it called, or in a backward, in which DDP's are hidden.
_WAITING: Final = re.compile(r"distributed_c10d\.py|_functional_collectives\.py|in _engine_run_backward\b")


def detect(view: RunView, _: NoParameters) -> Sighting | None:
    """See a live run of which a rank said that it hangs, and no step of that rank ended since."""
    if view.run.status is not Status.RUNNING:
        return None
    ends = step_ends(view)
    hanging = {
        event.rank: event
        for event in view.events_named(c.STALLED)
        if ends.get(event.rank, event.time) <= event.time
    }
    if not hanging:
        return None
    stacks = {rank: _main_stack(event) for rank, event in hanging.items()}
    waiting = sorted(rank for rank, stack in stacks.items() if _WAITING.search(stack))
    first = min(hanging.values(), key=lambda event: (event.time, event.rank))
    lags = _lagging(hanging, ends, waiting) if len(ends.keys() | hanging.keys()) > 1 else first.rank
    told = first if lags is None else hanging.get(lags, first)
    since = ends.get(told.rank)
    return Sighting(
        rank=lags,
        step=told.step,
        since=first.time,
        evidence={
            "seconds_without_a_step": None if since is None else round((told.time - since) / SECOND, 1),
            "ranks_hanging": sorted(hanging)[:_MOST_NAMED],
            "ranks_in_a_collective": waiting[:_MOST_NAMED],
            "at": _innermost(stacks[told.rank]) if lags is None or lags in stacks else None,
        },
    )


def _lagging(hanging: Mapping[int, EventSeen], ends: Mapping[int, int], waiting: Sequence[int]) -> int | None:
    """Return the rank that the others wait for; None if nothing tells it.

    It is the only one that does not wait in a collective itself (one that reads a loss waits elsewhere too); or
    that did the fewest steps; or that says nothing at all any more.
    """
    own = sorted(hanging.keys() - set(waiting))
    if len(own) == 1 and waiting:
        return own[0]
    steps = {rank: event.step for rank, event in hanging.items() if event.step is not None}
    least = [rank for rank, step in steps.items() if step == min(steps.values())]
    if len(least) == 1 and len(steps) > 1:
        return least[0]
    silent = sorted(ends.keys() - hanging.keys(), key=lambda rank: (ends[rank], rank))
    return silent[0] if silent and waiting else own[0] if len(own) == 1 else None


def _main_stack(event: EventSeen) -> str:
    """Return the stack of the main thread, which comes first; paragraphs are apart by an empty line."""
    return (text(event.attributes.get(c.STACKS), _MOST_STACK) or "").partition("\n\n")[0]


def _innermost(stack: str) -> str | None:
    frames = _FRAME.findall(stack)
    return "{}:{} in {}".format(*frames[-1]) if frames else None


RULE = RunRule(
    name=c.RULE_STALLED,
    severity=Severity.PAGE,
    detect=detect,
    cause="One rank does not come to a collective operation that all others wait in: it hangs in its data, in "
    "a lock or on its device, or took another branch. Without other ranks: a data loader or a file system "
    "hangs.",
    action="Look at the rank of the finding and at its stack with `gradwatch runs show RUN`; if it does not "
    "come back, end the run and resume from the last good checkpoint, without that rank's host.",
)
