"""JSON Schemas (draft 2020-12) of runs, findings and metrics as JSON, to validate against and to publish."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, Final

SCHEMAS: Final = (
    "run",
    "run-list",
    "run-detail",
    "run-comparison",
    "run-counts",
    "curve-list",
    "layer-map",
    "last-steps",
    "slo-course-list",
    "finding",
    "finding-list",
    "metric-list",
    "series-list",
)


def load_schema(name: str) -> dict[str, Any]:
    """Return one of :data:`SCHEMAS`, complete in itself.

    Raises:
        ValueError: there is no such schema.
    """
    if name not in SCHEMAS:
        raise ValueError(f"found the schema {name!r}, expected one of {', '.join(SCHEMAS)}")
    schema: dict[str, Any] = json.loads(files(__name__).joinpath(f"{name}.schema.json").read_bytes())
    return schema
