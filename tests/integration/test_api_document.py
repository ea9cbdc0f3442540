"""The JSON API keeps to its own OpenAPI document, whatever is asked: requests are made up from the document."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import jsonschema
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks
from sqlalchemy import create_engine, make_url

from gradwatch import conventions as c
from gradwatch_collector.api.openapi import PATH, document
from gradwatch_collector.api.routes import Api
from tests.collector_process import Collector, collector, gradwatch
from tests.fuzzing.samples import events_request, resource_of, samples
from tests.odd_ids import ODD_IDS
from tests.otlp_clients import ProtobufClient, gauge, metrics_request

START = 1_750_000_000_000_000_000
CHECKS = (
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
)
SETTINGS = hypothesis.settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(
    scope="module",
    params=[pytest.param("sqlite", id="sqlite"), pytest.param("postgresql", marks=pytest.mark.postgresql)],
)
def filled(request: pytest.FixtureRequest, collectors: Callable[[str], Collector]) -> Collector:
    """A collector that holds every kind of telemetry, of runs of ordinary and odd ids."""
    running = collectors(request.param)
    with ProtobufClient(running.url, running.grpc) as client:
        for sample in samples("documented", START):
            assert client.send(sample).code == 0
        for run_id in ODD_IDS:
            assert client.send(metrics_request(resource_of(run_id), gauge(c.LOSS.name, (START, 0.5)))).code == 0
            assert client.send(events_request(resource_of(run_id), [c.RUN_STARTED], START)).code == 0
    return running


def operations(url: str) -> Iterator[Any]:
    described = schemathesis.openapi.from_dict(document())
    described.config.update(base_url=url)
    yield from (found.ok() for found in described.get_all_operations())


def ask_all(running: Collector, told: list[str] | None = None, **options: Any) -> dict[str, set[int]]:
    """Ask whatever the document allows and much that it does not; return which status each path answered.

    ``told``: what was answered is added to it.
    """
    seen: dict[str, set[int]] = {}
    for operation in operations(running.url):
        strategies = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]

        @SETTINGS
        @hypothesis.given(hypothesis.strategies.one_of(strategies))
        def ask(case: Any) -> None:
            answer = case.call(**options)
            seen.setdefault(case.operation.path, set()).add(answer.status_code)
            if told is not None:
                told.append(answer.text)
            case.validate_response(answer, checks=CHECKS)

        ask()
    return seen


def test_the_document_is_valid_and_leaves_out_no_route(filled: Collector) -> None:
    described = filled.get(PATH).json()
    assert described == document()
    for shape in described["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(shape)
    nothing: Any = None
    api = Api(create_engine("sqlite://"), nothing, (), nothing)
    served = {route.path.replace(":text", "") for route in api.routes()}
    assert {*described["paths"], PATH} == {path for path in served if path.startswith("/api/")}


def test_whatever_is_asked_is_answered_as_the_document_says(filled: Collector) -> None:
    seen = ask_all(filled)
    assert {200, 400} <= seen["/api/v1/runs"]
    assert {400, 404} <= seen["/api/v1/series"]
    assert seen["/api/v1/slos"] == {200}


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_the_api_is_only_read(filled: Collector, method: str) -> None:
    for path in document()["paths"]:
        answer = requests.request(method, filled.url + path, timeout=30)
        assert (answer.status_code, set(answer.headers["Allow"].split(", "))) == (405, {"GET", "HEAD"})
        assert answer.json() == {"error": "Method Not Allowed"}


@pytest.fixture(scope="module")
def guarded(template: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    """A collector that asks for tokens, and has a run of another team than vision."""
    database = tmp_path_factory.mktemp("guarded") / "gradwatch.db"
    shutil.copy(make_url(template("sqlite")).database or "", database)
    token = new_token(str(database), "sender", "ingest")
    with collector(str(database), "--require-token", "--grpc", "127.0.0.1:0") as running:
        with ProtobufClient(running.url, running.grpc) as client:
            for sample in samples("of another team", START):
                assert client.send(sample, token=token).code == 0
        yield running


def new_token(database: str, *options: str) -> str:
    name, role, *team = options
    done = gradwatch("token", "create", name, "--role", role, *team, "--db", database)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_a_token_nothing_is_answered(guarded: Collector) -> None:
    for token in (None, "gw_0000", "é"):
        headers = {} if token is None else {"Authorization": f"Bearer {token}".encode()}
        assert set().union(*ask_all(guarded, headers=headers).values()) == {401}


def test_with_a_token_whatever_is_asked_is_answered_as_the_document_says(guarded: Collector) -> None:
    token = new_token(guarded.database, "reader", "read")
    seen = ask_all(guarded, headers={"Authorization": f"Bearer {token}"})
    assert {200, 400} <= seen["/api/v1/runs"]


def test_whatever_a_team_asks_it_is_told_nothing_of_others(guarded: Collector) -> None:
    token = new_token(guarded.database, "vision", "read", "--team", "vision")
    told: list[str] = []
    seen = ask_all(guarded, told, headers={"Authorization": f"Bearer {token}"})
    assert 200 in seen["/api/v1/runs"]
    assert 200 in seen["/api/v1/metrics"]
    assert not any("of another team" in each for each in told)


@pytest.mark.parametrize("run_id", ODD_IDS)
def test_a_run_of_any_id_is_found_by_it(filled: Collector, run_id: str) -> None:
    quoted = requests.utils.quote(run_id, safe="").replace(".", "%2E")
    assert filled.get(f"/api/v1/runs/{quoted}").json()["run_id"] == run_id
    shown = filled.get("/api/v1/series", params={"run": run_id, "metric": c.LOSS.name}).json()
    assert {each["run_id"] for each in shown["series"]} == {run_id}
