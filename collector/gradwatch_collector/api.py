"""The JSON API and the probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradwatch_slo.report import report_json
from prometheus_client import CollectorRegistry, generate_latest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from gradwatch_collector import views
from gradwatch_collector.evaluator import Evaluator

# What Prometheus 2.x asks for by default and every version reads.
_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


def routes(engine: Engine, evaluator: Evaluator, metrics: CollectorRegistry) -> list[Route]:
    """Return the routes of the API over one database."""

    async def read(view: Callable[[Connection], Any]) -> Response:
        def run() -> Any:
            with engine.connect() as connection:
                return view(connection)

        try:
            found = await run_in_threadpool(run)
        except views.BadCursorError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        except SQLAlchemyError:
            return JSONResponse(
                {"error": "the database is not available"}, status_code=503, headers={"Retry-After": "5"}
            )
        if found is None:
            return JSONResponse({"error": "no such run"}, status_code=404)
        return JSONResponse(found)

    async def runs(request: Request) -> Response:
        query = request.query_params
        try:
            limit = int(query.get("limit", views.MAX_LIMIT))
        except ValueError:
            return JSONResponse({"error": "limit must be a number from 1 to 1000"}, status_code=400)
        return await read(
            lambda connection: views.list_runs(
                connection,
                limit=limit,
                cursor=query.get("cursor"),
                status=query.get("status"),
                job=query.get("job"),
            )
        )

    async def run(request: Request) -> Response:
        run_id = request.path_params["run_id"]
        return await read(lambda connection: views.show_run(connection, run_id))

    async def slos(_: Request) -> Response:
        return JSONResponse(report_json(evaluator.snapshot.objectives))

    async def prometheus(_: Request) -> Response:
        return Response(await run_in_threadpool(generate_latest, metrics), media_type=_EXPOSITION)

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        response = await read(lambda connection: {"ready": connection.scalar(text("SELECT 1")) == 1})
        return response

    return [
        Route("/api/v1/runs", runs),
        Route("/api/v1/runs/{run_id:path}", run),
        Route("/api/v1/slos", slos),
        Route("/metrics", prometheus),
        Route("/healthz", healthz),
        Route("/readyz", readyz),
    ]
