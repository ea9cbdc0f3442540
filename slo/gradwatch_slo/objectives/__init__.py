"""The objectives gradwatch ships: OpenSLO v1 files beside this module, to use or to copy and change."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from gradwatch_slo.objective import ObjectiveSet, objectives_of
from gradwatch_slo.reader import Document, parse_documents

# In the order of reports.
SHIPPED: Final = (
    "service.yaml",
    "training-success-rate.yaml",
    "time-to-convergence.yaml",
    "gradient-health.yaml",
    "finite-training.yaml",
    "gpu-utilization.yaml",
    "collective-latency.yaml",
    "checkpoint-success.yaml",
    "memory-headroom.yaml",
    "step-cost.yaml",
    "model-quality.yaml",
    "effective-training-time.yaml",
)


def default_documents() -> list[Document]:
    """Return the shipped documents."""
    here = files(__name__)
    contents = ((here.joinpath(name).read_bytes(), name) for name in SHIPPED)
    return [document for content, name in contents for document in parse_documents(content, name)]


def default_objectives() -> ObjectiveSet:
    """Return the shipped objectives, in the order of the measures M1 to M11, each by tier."""
    return objectives_of(default_documents())
