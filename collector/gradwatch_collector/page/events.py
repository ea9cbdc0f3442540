"""What changes, told as it does: server-sent events that make pages live.

They tell what the evaluator's tick found, once a second, whichever collector took it in. A page reads the rest
from the API.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from gradwatch_collector.api.run_list import run_json
from gradwatch_collector.api.shapes import Json
from gradwatch_collector.auth import grant_of
from gradwatch_collector.findings import Observation
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.service.evaluator import Evaluator
from gradwatch_collector.service.snapshot import Snapshot

PATH: Final = "/events"
_TYPE: Final = "text/event-stream"
# Each is a connection.
_MOST_LISTENERS: Final = 256
# A page shows 50.
_MOST_TOLD: Final = 100
_LOOK_SECONDS: Final = 0.5
# So that proxies see that somebody is there.
_SILENCE_SECONDS: Final = 15.0
# After that the browser asks again, and must show its token again.
_LONGEST_SECONDS: Final = 300.0


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs between two ticks: ``runs`` as they stand now, and whose ``findings`` did."""

    runs: tuple[RunRow, ...]
    findings: tuple[RunRow, ...]
    objectives: bool

    def json(self, team: str | None, run_id: str | None) -> Json | None:
        """Return what is told of it to a team (None sees all), of one run if asked; None for nothing."""

        def is_told(run: RunRow) -> bool:
            return (team is None or run.team == team) and (run_id is None or run.run_id == run_id)

        runs = [run for run in self.runs if is_told(run)]
        findings = [run.run_id for run in self.findings if is_told(run)]
        if not runs and not findings and not self.objectives:
            return None
        return {
            "runs": [run_json(run) for run in runs[:_MOST_TOLD]],
            "findings": findings[:_MOST_TOLD],
            "objectives": self.objectives,
            # There is more than this: read the list anew.
            "more": max(len(runs), len(findings)) > _MOST_TOLD,
        }


def changes(before: Snapshot, after: Snapshot) -> Changes:
    """Return what differs between two ticks."""
    known = {run.run_id: run for run in before.runs}
    had, has = _findings(before), _findings(after)
    about = {run.run_id: run for run, _ in (*before.findings, *after.findings)}
    return Changes(
        runs=tuple(run for run in after.runs if known.get(run.run_id) != run),
        findings=tuple(run for run_id, run in about.items() if had.get(run_id) != has.get(run_id)),
        objectives=before.objectives != after.objectives,
    )


def _findings(snapshot: Snapshot) -> dict[str, list[Observation]]:
    found: dict[str, list[Observation]] = {}
    for run, observation in snapshot.findings:
        found.setdefault(run.run_id, []).append(observation)
    return found


class Events:
    """Tells listeners. ``is_ending``: whether the service is about to stop, which waits for no listener."""

    def __init__(self, evaluator: Evaluator, is_ending: Callable[[], bool]) -> None:
        self._evaluator = evaluator
        self._is_ending = is_ending
        self._listeners = 0
        # The newest comparison: most listeners ask for the same one.
        self._compared: tuple[Snapshot, Snapshot, Changes] | None = None

    async def serve(self, request: Request) -> Response:
        """Answer with events until the browser goes away."""
        if self._listeners >= _MOST_LISTENERS:
            raise HTTPException(503, "too many pages are open", {"Retry-After": "30"})
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        if request.method == "HEAD":
            return Response(headers=headers, media_type=_TYPE)
        grant = grant_of(request.scope)
        stream = self._stream(None if grant is None else grant.team, request.query_params.get("run"))
        return StreamingResponse(stream, headers=headers, media_type=_TYPE)

    async def _stream(self, team: str | None, run_id: str | None) -> AsyncIterator[str]:
        self._listeners += 1
        try:
            seen = self._evaluator.snapshot
            began = told = time.monotonic()
            yield "retry: 2000\n\n"
            while not self._is_ending() and time.monotonic() - began < _LONGEST_SECONDS:
                await asyncio.sleep(_LOOK_SECONDS)
                before, seen = seen, self._evaluator.snapshot
                message = None
                if seen is not before:
                    message = (await run_in_threadpool(self._changes, before, seen)).json(team, run_id)
                if message is not None:
                    yield f"event: changes\ndata: {json.dumps(message)}\n\n"
                    told = time.monotonic()
                elif time.monotonic() - told > _SILENCE_SECONDS:
                    yield ": still here\n\n"
                    told = time.monotonic()
        finally:
            self._listeners -= 1

    def _changes(self, before: Snapshot, after: Snapshot) -> Changes:
        compared = self._compared
        if compared is not None and compared[0] is before and compared[1] is after:
            return compared[2]
        found = changes(before, after)
        self._compared = before, after, found
        return found
