"""What requests ask for, read from the parameters of their URLs.

Each raises ``HTTPException`` with status 400, and one line that says why, for what cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException

from gradwatch import conventions as c
from gradwatch_collector.api import curves, layer_maps
from gradwatch_collector.api.curves import CurvesQuery
from gradwatch_collector.api.findings import FindingsQuery
from gradwatch_collector.api.layer_map import STRETCHES
from gradwatch_collector.api.layer_maps import LayerMapQuery
from gradwatch_collector.api.metric_points import SeriesQuery, parse_labels
from gradwatch_collector.api.moments import parse_moment
from gradwatch_collector.api.run_list import NEWEST_FIRST, SORTS, RunsQuery
from gradwatch_collector.api.shapes import MAX_LIMIT
from gradwatch_collector.api.views import SECTIONS

# In one comparison: what fits beside each other.
MOST_COMPARED: Final = 8
# A page of runs, whose findings are asked for at once.
MOST_RUNS: Final = 200

_Default = TypeVar("_Default", int, None)


def runs_query(query: QueryParams) -> RunsQuery:
    """Return which runs are asked for."""
    return RunsQuery(
        statuses=tuple(query.getlist("status")),
        job=query.get("job"),
        tier=query.get("tier"),
        text=query.get("text"),
        sort=_one_of(query, "sort", SORTS, NEWEST_FIRST),
        limit=limit(query),
        cursor=query.get("cursor"),
    )


def findings_query(query: QueryParams) -> FindingsQuery:
    """Return which findings are asked for."""
    runs = query.getlist("run")
    if len(runs) > MOST_RUNS:
        raise HTTPException(400, f"run is given {len(runs)} times; at most {MOST_RUNS} are taken")
    return FindingsQuery(
        state=query.get("state"),
        severity=query.get("severity"),
        rule=query.get("rule"),
        run_ids=tuple(runs),
        job=query.get("job"),
        limit=limit(query),
        cursor=query.get("cursor"),
    )


def series_query(query: QueryParams) -> SeriesQuery:
    """Return which series are asked for."""
    metric, run = query.get("metric"), query.get("run")
    if not metric or not run:
        raise HTTPException(400, "metric and run must be given, as in ?metric=training.loss&run=RUN")
    with _parsing():
        return SeriesQuery(
            run,
            metric,
            attempt=_attempt(query),
            rank=_number(query, "rank", 0, c.MAX_INT32, None),
            labels=parse_labels(query.getlist("label")),
            since=_moment(query, "since"),
            until=_moment(query, "until"),
            points=_number(query, "points", 1, MAX_LIMIT, MAX_LIMIT),
            limit=limit(query),
            cursor=query.get("cursor"),
        )


def curves_query(query: QueryParams) -> CurvesQuery:
    """Return which curves are asked for."""
    run, metrics = run_id(query), query.getlist("metric")
    unknown = [name for name in metrics if name not in curves.METRICS]
    if not metrics or unknown:
        told = f"metric is {unknown[0]!r:.80}" if unknown else "metric must be given"
        raise HTTPException(400, f"{told}; it must be one of {', '.join(curves.METRICS)}")
    with _parsing():
        return CurvesQuery(
            run_id=run,
            metrics=metrics,
            points=_number(query, "points", 1, curves.MAX_POINTS, curves.FEW_POINTS),
            every_rank=_one_of(query, "ranks", ("lowest", "all"), "lowest") == "all",
        )


def layer_map_query(query: QueryParams) -> LayerMapQuery:
    """Return which map of layers is asked for."""
    with _parsing():
        return LayerMapQuery(
            run_id=run_id(query),
            attempt=_attempt(query),
            text=query.get("text", ""),
            rows=_number(query, "rows", 1, layer_maps.MAX_ROWS, layer_maps.FEW_ROWS),
            stretches=_number(query, "stretches", 1, layer_maps.MAX_STRETCHES, STRETCHES),
        )


def compared(query: QueryParams) -> tuple[list[str], bool]:
    """Return the runs to compare, the first being the reference, and whether what is alike is shown, too."""
    runs = list(dict.fromkeys(query.getlist("run")))
    if not 1 <= len(runs) <= MOST_COMPARED:
        raise HTTPException(400, f"run must be given once to {MOST_COMPARED} times, as in ?run=RUN&run=OTHER")
    return runs, _one_of(query, "facts", ("different", "all"), "different") == "all"


def sections(query: QueryParams) -> Collection[str]:
    """Return what of a run is asked for beside the run itself."""
    told = query.getlist("section")
    for each in told:
        if each not in SECTIONS:
            raise HTTPException(400, f"section is {each!r:.80}; it must be one of {', '.join(SECTIONS)}")
    return told or SECTIONS


def run_id(query: QueryParams) -> str:
    """Return the run."""
    run = query.get("run")
    if not run:
        raise HTTPException(400, "run must be given, as in ?run=RUN")
    return run


def limit(query: QueryParams) -> int:
    """Return how many entries an answer has at most."""
    with _parsing():
        return _number(query, "limit", 1, MAX_LIMIT, MAX_LIMIT)


@contextmanager
def _parsing() -> Iterator[None]:
    """Refuse a request that says what cannot be read."""
    try:
        yield
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def _one_of(query: QueryParams, name: str, known: Collection[str], default: str) -> str:
    told = query.get(name, default)
    if told not in known:
        raise HTTPException(400, f"{name} is {told!r:.80}; it must be one of {', '.join(known)}")
    return told


def _attempt(query: QueryParams) -> int | None:
    return _number(query, "attempt", 1, c.MAX_INT32, None)


def _number(query: QueryParams, name: str, least: int, most: int, default: _Default) -> int | _Default:
    told = query.get(name)
    if told is None:
        return default
    if not re.fullmatch("[0-9]{1,10}", told) or not least <= int(told) <= most:
        raise ValueError(f"{name} is {told!r:.80}; it must be a number from {least} to {most}")
    return int(told)


def _moment(query: QueryParams, name: str) -> int | None:
    told = query.get(name)
    return None if told is None else parse_moment(told)
