"""Telling a collector what ``gradwatch checkpoint verify`` found of a run's checkpoints."""

from __future__ import annotations

import itertools
import math
import os
import socket
import uuid
from collections.abc import Iterable
from typing import Final

from gradwatch import conventions
from gradwatch.checkpoints.finding import Verdict
from gradwatch.checkpoints.telling import event_of
from gradwatch.clock import Clock
from gradwatch.export.exporter import Pacer
from gradwatch.export.exporters import otlp_exporter
from gradwatch.redaction import redact
from gradwatch.settings import Settings
from gradwatch.telemetry import Attributes, Event

_SECONDS: Final = 10.0


def report(verdicts: Iterable[Verdict], settings: Settings) -> bool:
    """Tell of those whose manifest names their run; return whether the collector has taken all.

    What it has not is kept on this host, and sent by whoever next sends from here. Runs stand as they stood:
    what reads a checkpoint is none of their processes.
    """
    clock, sequence, instance = Clock(), itertools.count(), str(uuid.uuid4())
    exporter = otlp_exporter(settings, Pacer())
    try:
        for verdict in verdicts:
            told, manifest = event_of(verdict), verdict.manifest
            if told is None or manifest is None or manifest.run_id is None:
                continue
            event, known = told
            attributes = {name: value for name, value in known.items() if value is not None}
            attributes[conventions.EVENT_SEQUENCE] = next(sequence)
            resource = _resource(settings, manifest.run_id, manifest.attempt, instance)
            exporter.send_events(resource, [Event(event.name, clock.now(), redact(attributes))])
        return exporter.deliver(_SECONDS, at_once=True) == math.inf
    finally:
        exporter.close()


def _resource(settings: Settings, run_id: str, attempt: int | None, instance: str) -> Attributes:
    known = {
        **settings.resource,
        conventions.SERVICE_NAME: settings.job,
        conventions.SERVICE_INSTANCE_ID: instance,
        # It sees the run from outside, and is no rank of it.
        conventions.SUPERVISOR: True,
        conventions.RUN_ID: run_id,
        conventions.RUN_ATTEMPT: attempt,
        conventions.TEAM: settings.team,
        conventions.HOST_NAME: socket.gethostname(),
        conventions.PROCESS_PID: os.getpid(),
    }
    return redact({name: value for name, value in known.items() if value is not None})
