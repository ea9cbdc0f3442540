"""What the collector finds wrong by itself: one module a rule, below `rules/`, all of one shape.

:class:`Detection` runs them all, and gives an :class:`Observation` for everything that is wrong now.
:func:`reconcile` opens, updates and resolves the stored findings to match; :func:`load_findings` reads them.
"""

from gradwatch_collector.findings.detection import Detection
from gradwatch_collector.findings.observation import Observation, Scene, Severity
from gradwatch_collector.findings.rules import RULES, RUN_RULES, SCENE_RULES
from gradwatch_collector.findings.store import Finding, load_findings, reconcile

__all__ = [
    "RULES",
    "RUN_RULES",
    "SCENE_RULES",
    "Detection",
    "Finding",
    "Observation",
    "Scene",
    "Severity",
    "load_findings",
    "reconcile",
]
