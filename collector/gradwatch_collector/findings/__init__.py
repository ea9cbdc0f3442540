"""What the collector finds wrong by itself: one module a detector, all of one shape.

A detector is a function of a :class:`Scene` that yields an :class:`Observation` for everything that is wrong
now. :func:`reconcile` opens, updates and resolves the stored findings to match; :func:`load_findings` reads
them.
"""

from gradwatch_collector.findings import memory_headroom, nonfinite, run_endings, telemetry_outage
from gradwatch_collector.findings.advice import ADVICE
from gradwatch_collector.findings.observation import Detector, Observation, Scene, Severity
from gradwatch_collector.findings.store import Finding, load_findings, reconcile

DETECTORS: tuple[Detector, ...] = (
    telemetry_outage.detect,
    run_endings.detect,
    nonfinite.detect,
    memory_headroom.detect,
)
RULES: tuple[str, ...] = tuple(ADVICE)

__all__ = ["DETECTORS", "RULES", "Finding", "Observation", "Scene", "Severity", "load_findings", "reconcile"]
