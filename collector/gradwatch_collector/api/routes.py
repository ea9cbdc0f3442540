"""The JSON API and the probes.

Whoever has a team's token is shown that team's runs and other telemetry, and objectives over its runs. A route
that can leave other teams out is named in ``auth/gate.py``; the others are refused there.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import Any, Final, TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DataError, SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from gradwatch import conventions as c
from gradwatch_collector.api import openapi, views
from gradwatch_collector.api.findings import FindingsQuery, list_findings
from gradwatch_collector.api.metric_catalog import list_metrics
from gradwatch_collector.api.metric_points import SeriesQuery, list_series, parse_labels
from gradwatch_collector.api.moments import parse_moment
from gradwatch_collector.api.shapes import MAX_LIMIT, BadCursorError
from gradwatch_collector.auth import grant_of
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_collector.service.evaluator import Evaluator
from gradwatch_collector.storage.database import of_one_moment
from gradwatch_slo.objective import Objective
from gradwatch_slo.render import report_json

logger = logging.getLogger(__name__)

# What Prometheus 2.x asks for by default and every version reads.
_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"

# Each takes one of the engine's connections: what is left is for the writer, the evaluator and tokens. And each
# may take some 100 MiB, where what was sent is made to.
_READS_AT_ONCE: Final = 4


class _Text(Convertor[str]):
    """The rest of a path. A run id may be any text, and what Starlette knows takes no line breaks."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        """Return the text."""
        return value

    def to_string(self, value: str) -> str:
        """Return the text."""
        return value


register_url_convertor("text", _Text())


class Api:
    """Answers from one database and the evaluator's newest snapshot."""

    def __init__(
        self,
        engine: Engine,
        evaluator: Evaluator,
        objectives: Sequence[Objective],
        metrics: CollectorRegistry,
    ) -> None:
        # An answer takes several statements.
        self._reading = of_one_moment(engine)
        self._evaluator = evaluator
        self._objectives = objectives
        self._metrics = metrics
        self._turns = asyncio.Semaphore(_READS_AT_ONCE)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/api/v1/runs", self.runs),
            Route("/api/v1/runs/{run_id:text}", self.run),
            Route("/api/v1/findings", self.findings),
            Route("/api/v1/metrics", self.metrics),
            Route("/api/v1/series", self.series),
            Route("/api/v1/slos", self.slos),
            Route(openapi.PATH, self.description),
            Route("/metrics", self.prometheus),
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
        ]

    async def runs(self, request: Request) -> Response:
        """List runs, newest first."""
        query = request.query_params
        limit = _limit(query)
        return await self._read(
            lambda connection: views.list_runs(
                connection,
                limit=limit,
                cursor=query.get("cursor"),
                status=query.get("status"),
                job=query.get("job"),
                team=_team(request),
            )
        )

    async def run(self, request: Request) -> Response:
        """Show one run."""
        run_id, team = request.path_params["run_id"], _team(request)
        return await self._read(lambda connection: views.show_run(connection, run_id, team))

    async def findings(self, request: Request) -> Response:
        """List findings, newest first."""
        query = request.query_params
        asked = FindingsQuery(
            state=query.get("state"),
            severity=query.get("severity"),
            rule=query.get("rule"),
            run_id=query.get("run"),
            job=query.get("job"),
            limit=_limit(query),
            cursor=query.get("cursor"),
        )
        team = _team(request)
        return await self._read(lambda connection: list_findings(connection, asked, team))

    async def metrics(self, request: Request) -> Response:
        """List metrics and who sent them, newest first."""
        query = request.query_params
        limit = _limit(query)
        return await self._read(
            lambda connection: list_metrics(
                connection,
                run_id=query.get("run"),
                name=query.get("name"),
                limit=limit,
                cursor=query.get("cursor"),
                team=_team(request),
            )
        )

    async def series(self, request: Request) -> Response:
        """Show the points of one metric of one run."""
        asked = _series_query(request.query_params)
        team = _team(request)
        return await self._read(
            lambda connection: (
                list_series(connection, asked) if views.is_shown(connection, asked.run_id, team) else None
            ),
            "no such metric of that run",
        )

    async def slos(self, request: Request) -> Response:
        """Report the objectives as last evaluated; for a team as they stand over its own runs."""
        team = _team(request)
        if team is None:
            return JSONResponse(report_json(self._evaluator.snapshot.objectives))
        return await self._read(
            lambda connection: report_json(
                evaluate_objectives(connection, self._objectives, time.time_ns(), *views.of_team(team))
            )
        )

    async def description(self, _: Request) -> Response:
        """Describe the API."""
        return JSONResponse(openapi.document())

    async def prometheus(self, _: Request) -> Response:
        """Render /metrics."""
        return Response(await run_in_threadpool(generate_latest, self._metrics), media_type=_EXPOSITION)

    async def healthz(self, _: Request) -> Response:
        """Say that the process answers."""
        return PlainTextResponse("ok\n")

    async def readyz(self, _: Request) -> Response:
        """Say whether the database answers."""
        return await self._read(
            lambda connection: {"ready": connection.scalar(text("SELECT 1")) == 1}, turns=nullcontext()
        )

    async def _read(
        self,
        view: Callable[[Connection], Any],
        missing: str = "no such run",
        turns: AbstractAsyncContextManager[Any] | None = None,
    ) -> Response:
        def run() -> Response | None:
            with self._reading.connect() as connection:
                found = view(connection)
            # Encoded here: it may be megabytes, and others are waiting on the event loop.
            return None if found is None else JSONResponse(found)

        try:
            async with turns or self._turns:
                answer = await run_in_threadpool(run)
        except BadCursorError as error:
            raise HTTPException(400, str(error)) from error
        except DataError:
            # Text that the database has no room for, such as a NUL, is in no run.
            return _not_found(missing)
        except SQLAlchemyError as error:
            logger.warning("cannot read from the database: %s", str(error).splitlines()[0])
            raise HTTPException(503, "the database is not available", {"Retry-After": "5"}) from error
        return _not_found(missing) if answer is None else answer


@contextmanager
def _parsing() -> Iterator[None]:
    """Refuse a request that says what cannot be read."""
    try:
        yield
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def _series_query(query: QueryParams) -> SeriesQuery:
    metric, run_id = query.get("metric"), query.get("run")
    if not metric or not run_id:
        raise HTTPException(400, "metric and run must be given, as in ?metric=training.loss&run=RUN")
    with _parsing():
        return SeriesQuery(
            run_id,
            metric,
            attempt=_number(query, "attempt", 1, c.MAX_INT32, None),
            rank=_number(query, "rank", 0, c.MAX_INT32, None),
            labels=parse_labels(query.getlist("label")),
            since=_moment(query, "since"),
            until=_moment(query, "until"),
            points=_number(query, "points", 1, MAX_LIMIT, MAX_LIMIT),
            limit=_limit(query),
            cursor=query.get("cursor"),
        )


def _limit(query: Mapping[str, str]) -> int:
    with _parsing():
        return _number(query, "limit", 1, MAX_LIMIT, MAX_LIMIT)


_Default = TypeVar("_Default", int, None)


def _number(query: Mapping[str, str], name: str, least: int, most: int, default: _Default) -> int | _Default:
    told = query.get(name)
    if told is None:
        return default
    if not re.fullmatch("[0-9]{1,10}", told) or not least <= int(told) <= most:
        raise ValueError(f"{name} is {told!r:.80}; it must be a number from {least} to {most}")
    return int(told)


def _moment(query: Mapping[str, str], name: str) -> int | None:
    told = query.get(name)
    return None if told is None else parse_moment(told)


def _team(request: Request) -> str | None:
    """Return whose runs the asker may see; None for all."""
    grant = grant_of(request.scope)
    return None if grant is None else grant.team


def _not_found(missing: str) -> Response:
    # An answer as good as any other: nothing was refused.
    return JSONResponse({"error": missing}, 404)
