"""What the supervisor says of one attempt: that it started, that it goes on, how it ended."""

from __future__ import annotations

import itertools
import math
import os
import socket
import threading
import uuid
from collections.abc import Mapping

from gradwatch import conventions
from gradwatch.clock import Clock
from gradwatch.export.exporter import ExportThread, Pacer
from gradwatch.export.exporters import otlp_exporter
from gradwatch.life.endings import CANCELLED
from gradwatch.redaction import redact
from gradwatch.supervisor.deaths import Death
from gradwatch.supervisor.launch import Launch
from gradwatch.telemetry import Attributes, AttributeValue, Event, Exporter, MetricPoints, Point


class Reporter:
    """Speaks for an attempt of a run from outside of it; no rank.

    ``instance``: its own, by which the processes below say who speaks for them; made up where none is given.
    """

    def __init__(
        self,
        launch: Launch,
        attempt: int,
        run_id: str | None = None,
        instance: str | None = None,
        exporter: Exporter | None = None,
    ) -> None:
        self.run_id = run_id or launch.run_id
        self._clock = Clock()
        self._sequence = itertools.count()
        self._lock = threading.Lock()
        self.instance = instance or str(uuid.uuid4())
        self._resource: Attributes = redact(_resource(launch, attempt, self.run_id, self.instance))
        self._thread = ExportThread(
            exporter or otlp_exporter(launch.settings, Pacer()),
            lambda: self._resource,
            self._lost,
            lambda: self._emit(conventions.RUN_HEARTBEAT, {}),
            lambda: None,
            math.inf,
            launch.settings.heartbeat_interval,
        )
        self._thread.start()
        self._emit(conventions.RUN_STARTED, {})

    def follow(self, attempt: int) -> None:
        """From now on speak of this attempt: a launcher below us began it."""
        if self._resource[conventions.RUN_ATTEMPT] != attempt:
            self._resource = {**self._resource, conventions.RUN_ATTEMPT: attempt}

    def withdraw(self, run_id: str) -> None:
        """Say that this was never a run of its own: what trains is the run of that id."""
        self._emit(
            conventions.RUN_ENDED,
            {
                conventions.STATUS: CANCELLED,
                conventions.REASON: "renamed",
                conventions.EVIDENCE: f"now {run_id}",
            },
        )

    def end(self, death: Death, last_step: int | None = None, *, will_retry: bool = False) -> None:
        """Say how it ended. A later word corrects an earlier one."""
        self._emit(
            conventions.RUN_ENDED,
            {
                conventions.STEP: last_step,
                conventions.STATUS: death.status,
                conventions.REASON: death.reason,
                conventions.EXIT_CODE: death.exit_code,
                conventions.EVIDENCE: death.evidence,
                conventions.WILL_RETRY: will_retry or None,
            },
        )

    def close(self, seconds: float) -> None:
        """Deliver what waits, within so many seconds; the rest goes to the spool."""
        self._thread.close(seconds)

    def _emit(self, event: conventions.Event, attributes: Mapping[str, AttributeValue | None]) -> None:
        with self._lock:
            known = redact({name: value for name, value in attributes.items() if value is not None})
            known[conventions.EVENT_SEQUENCE] = next(self._sequence)
            self._thread.emit(Event(event.name, self._clock.now(), known))

    def _lost(self, dropped: int, _background: int) -> list[MetricPoints]:
        if not dropped:
            return []
        now = self._clock.now()
        return [MetricPoints(conventions.AGENT_DROPPED, [Point(now, dropped, {}, now)])]


def _resource(launch: Launch, attempt: int, run_id: str, instance: str) -> dict[str, AttributeValue]:
    settings = launch.settings
    # What nobody said here may be said by the script, and a default must not contradict it.
    tier_is_given = launch.given.get("tier") or launch.environ.get("GRADWATCH_TIER")
    known: dict[str, AttributeValue | None] = {
        **settings.resource,
        conventions.SERVICE_NAME: settings.job,
        conventions.SERVICE_INSTANCE_ID: instance,
        conventions.SUPERVISOR: True,
        conventions.RUN_ID: run_id,
        conventions.RUN_ATTEMPT: attempt,
        conventions.MODEL: settings.model,
        conventions.DATASET: settings.dataset,
        conventions.TEAM: settings.team,
        conventions.TIER: settings.tier if tier_is_given else None,
        conventions.TARGET: str(settings.target) if settings.target else None,
        conventions.DEADLINE: settings.deadline,
        conventions.HOST_NAME: socket.gethostname(),
        conventions.PROCESS_PID: os.getpid(),
        conventions.PROCESS_COMMAND: launch.command[0],
    }
    return {name: value for name, value in known.items() if value is not None}
