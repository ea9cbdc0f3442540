"""The JSON API and the probes.

Whoever has a team's token is shown that team's runs and other telemetry, and objectives over its runs. A route
that can leave other teams out is named in ``auth/gate.py``; the others are refused there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DataError, SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from gradwatch_collector.api import openapi, parameters, views
from gradwatch_collector.api.comparisons import comparison_json
from gradwatch_collector.api.curves import list_curves
from gradwatch_collector.api.findings import list_findings
from gradwatch_collector.api.last_steps import last_steps_json
from gradwatch_collector.api.layer_maps import layer_map_json
from gradwatch_collector.api.metric_catalog import list_metrics
from gradwatch_collector.api.metric_points import list_series
from gradwatch_collector.api.run_list import count_runs, is_run, list_runs, of_team
from gradwatch_collector.api.shapes import BadCursorError
from gradwatch_collector.api.slo_courses import list_courses
from gradwatch_collector.auth import grant_of
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_collector.runs.comparison import compare
from gradwatch_collector.runs.facts import load_runs
from gradwatch_collector.service.evaluator import Evaluator
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import of_one_moment
from gradwatch_slo.cost import PriceTable
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
        prices: PriceTable | None = None,
    ) -> None:
        # An answer takes several statements.
        self._reading = of_one_moment(engine)
        self._evaluator = evaluator
        self._objectives = objectives
        self._metrics = metrics
        self._prices = prices
        self._turns = asyncio.Semaphore(_READS_AT_ONCE)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/api/v1/runs", self.runs),
            Route("/api/v1/runs/{run_id:text}", self.run),
            Route("/api/v1/run-counts", self.run_counts),
            Route("/api/v1/curves", self.curves),
            Route("/api/v1/layer-map", self.layer_map),
            Route("/api/v1/last-steps", self.last_steps),
            Route("/api/v1/comparison", self.comparison),
            Route("/api/v1/findings", self.findings),
            Route("/api/v1/metrics", self.metrics),
            Route("/api/v1/series", self.series),
            Route("/api/v1/slos", self.slos),
            Route("/api/v1/slo-courses", self.slo_courses),
            Route(openapi.PATH, self.description),
            Route("/metrics", self.prometheus),
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
        ]

    async def runs(self, request: Request) -> Response:
        """List runs, newest first unless told otherwise."""
        asked, team = parameters.runs_query(request.query_params), _team(request)
        return await self._read(lambda connection: list_runs(connection, asked, team))

    async def run(self, request: Request) -> Response:
        """Show one run."""
        run_id, team = request.path_params["run_id"], _team(request)
        sections = parameters.sections(request.query_params)
        return await self._read(lambda connection: views.show_run(connection, run_id, team, sections))

    async def run_counts(self, request: Request) -> Response:
        """Count runs by status."""
        asked, team = parameters.runs_query(request.query_params), _team(request)
        return await self._read(lambda connection: count_runs(connection, asked, team))

    async def curves(self, request: Request) -> Response:
        """Show per-step numbers of a run over its steps."""
        asked = parameters.curves_query(request.query_params)
        return await self._of_run(request, asked.run_id, lambda connection: list_curves(connection, asked))

    async def layer_map(self, request: Request) -> Response:
        """Show gradient norms by layer over the steps of an attempt."""
        asked = parameters.layer_map_query(request.query_params)
        return await self._of_run(request, asked.run_id, lambda connection: layer_map_json(connection, asked))

    async def last_steps(self, request: Request) -> Response:
        """Show the last steps that a run's black box has."""
        run_id = parameters.run_id(request.query_params)
        return await self._of_run(request, run_id, lambda connection: last_steps_json(connection, run_id))

    async def comparison(self, request: Request) -> Response:
        """Show what differs between runs."""
        run_ids, everything = parameters.compared(request.query_params)
        team = _team(request)

        def view(connection: Connection) -> Any:
            rows = [
                row
                for run_id in run_ids
                for row in load_runs(connection, schema.run.c.run_id == run_id, *of_team(team))
            ]
            if len(rows) < len(run_ids):
                return None
            return comparison_json(compare(connection, rows, self._prices), everything=everything)

        return await self._read(view)

    async def findings(self, request: Request) -> Response:
        """List findings, newest first."""
        asked, team = parameters.findings_query(request.query_params), _team(request)
        return await self._read(lambda connection: list_findings(connection, asked, team))

    async def metrics(self, request: Request) -> Response:
        """List metrics and who sent them, newest first."""
        query = request.query_params
        limit = parameters.limit(query)
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
        asked = parameters.series_query(request.query_params)
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
                evaluate_objectives(connection, self._objectives, time.time_ns(), *of_team(team))
            )
        )

    async def slo_courses(self, request: Request) -> Response:
        """Show how the budgets of an objective's groups were spent."""
        name, team = request.query_params.get("objective"), _team(request)
        chosen = [each for each in self._objectives if each.name == name]
        return await self._read(
            lambda connection: (
                list_courses(connection, chosen, time.time_ns(), *of_team(team)) if chosen else None
            ),
            "no such objective",
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

    async def _of_run(self, request: Request, run_id: str, view: Callable[[Connection], Any]) -> Response:
        """Answer about a run that the asker may see; what is no run has none of this."""
        team = _team(request)
        return await self._read(
            lambda connection: view(connection) if is_run(connection, run_id, team) else None
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


def _team(request: Request) -> str | None:
    """Return whose runs the asker may see; None for all."""
    grant = grant_of(request.scope)
    return None if grant is None else grant.team


def _not_found(missing: str) -> Response:
    # An answer as good as any other: nothing was refused.
    return JSONResponse({"error": missing}, 404)
