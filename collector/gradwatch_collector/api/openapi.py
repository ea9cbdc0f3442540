"""The JSON API as an OpenAPI 3.1 document, which the collector serves about itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

from gradwatch import conventions as c
from gradwatch_collector import schemas
from gradwatch_collector.api.curves import MAX_POINTS, METRICS
from gradwatch_collector.api.layer_maps import MAX_ROWS, MAX_STRETCHES
from gradwatch_collector.api.parameters import MOST_COMPARED, MOST_RUNS
from gradwatch_collector.api.run_list import SORTS
from gradwatch_collector.api.shapes import MAX_LIMIT
from gradwatch_collector.api.views import SECTIONS
from gradwatch_slo import schemas as slo_schemas
from gradwatch_slo.runs import Status

PATH: Final = "/api/v1/openapi.json"
_COMPONENTS: Final = "#/components/schemas/"
# How schemas refer to others, and to parts of themselves.
_REFERENCE: Final = re.compile("^(urn:gradwatch:schema:|#/[$]defs/)")

_ERROR: Final = {
    "type": "object",
    "properties": {"error": {"type": "string", "description": "One line."}},
    "required": ["error"],
    "additionalProperties": False,
}
_REFUSALS: Final = {
    "400": "A parameter is not what it must be.",
    "401": "A token is asked for, and none that is known came.",
    "403": "The token is not for this.",
    "404": "There is no such thing, or it is another team's.",
    "421": "The Host header is not one of the collector's.",
    "429": "The token's limit is reached; Retry-After says until when.",
    "503": "The database is not available; Retry-After says when to ask again.",
}

_Json = dict[str, Any]


def document() -> _Json:
    """Return the document, complete in itself."""
    text = {"type": "string"}
    limit = _number("limit", "Entries in the answer, at most.", 1, MAX_LIMIT)
    cursor = _parameter("cursor", "The next_cursor of the answer before.", text)
    run = _parameter("run", "Id of a run, or of what sent telemetry and is none.", text)
    moment = {
        "type": "string",
        "description": "RFC 3339, or Unix nanoseconds; from 1970 to 2262.",
        "anyOf": [{"format": "date-time"}, {"pattern": "^[0-9]{1,19}$"}],
    }
    series = (
        {**_parameter("metric", "Name of the metric.", {**text, "minLength": 1}), "required": True},
        {**run, "schema": {**text, "minLength": 1}, "required": True},
        _number("attempt", "Of the run.", 1, c.MAX_INT32),
        _number("rank", "Of the process.", 0, c.MAX_INT32),
        _parameter(
            "label",
            "NAME=VALUE that points must have; the value as text or as JSON writes it.",
            {"type": "array", "items": {**text, "pattern": "^[^=]+="}},
        ),
        _parameter("since", "Oldest moment of the points and roll-ups, inclusive.", moment),
        _parameter("until", "Newest moment of the points and roll-ups, inclusive.", moment),
        _number("points", "Newest points and roll-ups of each series, at most.", 1, MAX_LIMIT),
        limit,
        cursor,
    )
    run_id = {"name": "run_id", "in": "path", "required": True, "description": "Id of the run.", "schema": text}
    one_run = {**_parameter("run", "Id of the run.", {**text, "minLength": 1}), "required": True}
    several = {"type": "array", "items": text}
    matching = (
        _parameter(
            "status",
            "How the runs stand; repeatable.",
            {**several, "items": {**text, "examples": [each.value for each in Status]}},
        ),
        _parameter("job", "Job of the runs.", text),
        _parameter("tier", "Tier of the runs.", {**text, "examples": [c.TIER_PRODUCTION, c.TIER_EXPERIMENT]}),
        _parameter("text", "What id, job, model, data set, team or reason contains, in either case.", text),
    )
    runs = (
        limit,
        cursor,
        *matching,
        _parameter("sort", "Order of the runs; a minus is descending.", {"enum": list(SORTS)}),
    )
    shown = _parameter(
        "section",
        "What to show beside the run itself; repeatable.",
        {**several, "items": {"enum": list(SECTIONS)}},
    )
    curves = (
        one_run,
        {
            **_parameter(
                "metric",
                "Name of a per-step metric; repeatable.",
                {"type": "array", "minItems": 1, "items": {"enum": list(METRICS)}},
            ),
            "required": True,
        },
        _number("points", "Points of each curve, at most.", 1, MAX_POINTS),
        _parameter("ranks", "Of which ranks that told it.", {"enum": ["lowest", "all"]}),
    )
    layer_map = (
        one_run,
        _number("attempt", "Of the run; the newest unless told.", 1, c.MAX_INT32),
        _parameter("text", "What the layers' names contain, in either case.", text),
        _number("rows", "Rows, at most: where there are more layers, several share one.", 1, MAX_ROWS),
        _number("stretches", "Stretches of steps, at most.", 1, MAX_STRETCHES),
    )
    comparison = (
        {
            **_parameter(
                "run",
                "Id of a run; repeatable. The others are compared with the first.",
                {"type": "array", "minItems": 1, "maxItems": MOST_COMPARED, "items": text, "uniqueItems": True},
            ),
            "required": True,
        },
        _parameter("facts", "Which are shown.", {"enum": ["different", "all"]}),
    )
    objective = {
        **_parameter("objective", "Name of the objective.", {**text, "minLength": 1}),
        "required": True,
    }
    findings = (
        _parameter("state", "How the findings stand.", {**text, "examples": ["open", "resolved"]}),
        _parameter("severity", "How loud they are.", {**text, "examples": ["page", "ticket", "info"]}),
        _parameter("rule", "Rule that found them.", text),
        _parameter("run", "Id of their run; repeatable.", {**several, "maxItems": MOST_RUNS}),
        _parameter("job", "Job of their run.", text),
        limit,
        cursor,
    )
    metrics = (run, _parameter("name", "Name of the metric.", text), limit, cursor)
    return {
        "openapi": "3.1.0",
        "info": {"title": "gradwatch", "version": version("gradwatch"), "license": {"name": "Apache-2.0"}},
        "paths": {
            "/api/v1/runs": _get("List runs, newest first unless told otherwise.", "run-list", runs),
            "/api/v1/runs/{run_id}": _get("Show one run.", "run-detail", (run_id, shown)),
            "/api/v1/run-counts": _get("Count runs by status.", "run-counts", matching),
            "/api/v1/curves": _get("Show per-step numbers of a run over its steps.", "curve-list", curves),
            "/api/v1/layer-map": _get("Show gradient norms by layer over steps.", "layer-map", layer_map),
            "/api/v1/last-steps": _get("Show the last steps in a run's black box.", "last-steps", (one_run,)),
            "/api/v1/comparison": _get("Show what differs between runs.", "run-comparison", comparison),
            "/api/v1/findings": _get("List findings, newest first.", "finding-list", findings),
            "/api/v1/metrics": _get("List metrics and who sent them, newest first.", "metric-list", metrics),
            "/api/v1/series": _get(
                "Show points of a metric, and roll-ups of older ones.", "series-list", series
            ),
            "/api/v1/slos": _get("Report the objectives as last evaluated.", "slo-report", ()),
            "/api/v1/slo-courses": _get("Show how budgets were spent.", "slo-course-list", (objective,)),
        },
        "components": {
            "schemas": {**_shapes(), "error": _ERROR},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        # A token is asked for unless the collector listens on loopback only.
        "security": [{"token": []}, {}],
    }


def _shapes() -> _Json:
    whole = {name: schemas.load_schema(name) for name in schemas.SCHEMAS}
    whole |= {name: slo_schemas.load_schema(name) for name in slo_schemas.SCHEMAS}
    parts = [shape.pop("$defs", {}) for shape in whole.values()]
    return {name: _moved(shape) for each in (*parts, whole) for name, shape in each.items()}


def _moved(shape: Any) -> Any:
    """Return a schema that is a component of the document, as are those that it refers to."""
    if isinstance(shape, Mapping):
        return {key: _moved(value) for key, value in shape.items() if key not in ("$schema", "$id", "$defs")}
    if isinstance(shape, list):
        return [_moved(each) for each in shape]
    return _REFERENCE.sub(_COMPONENTS, shape) if isinstance(shape, str) else shape


def _get(summary: str, shape: str, parameters: Sequence[_Json]) -> _Json:
    answers = {"200": _answer(summary, shape)}
    answers |= {status: _answer(description, "error") for status, description in _REFUSALS.items()}
    return {"get": {"summary": summary, "parameters": [*parameters], "responses": answers}}


def _answer(description: str, shape: str) -> _Json:
    reference = {"$ref": f"{_COMPONENTS}{shape}"}
    return {"description": description, "content": {"application/json": {"schema": reference}}}


def _parameter(name: str, description: str, shape: _Json) -> _Json:
    return {"name": name, "in": "query", "description": description, "schema": shape}


def _number(name: str, description: str, least: int, most: int) -> _Json:
    return _parameter(name, description, {"type": "integer", "minimum": least, "maximum": most})
