"""Who may talk to the collector."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from tests.collector_process import Collector, collector, gradwatch

PROTOBUF = {"Content-Type": "application/x-protobuf"}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('access') / 'gradwatch.db'}"


@pytest.fixture(scope="module")
def token(database: str) -> str:
    created = gradwatch("token", "create", "ci", "--team", "vision", "--db", database)
    assert created.returncode == 0, created.stderr
    return created.stdout.strip()


@pytest.fixture(scope="module")
def guarded(database: str, token: str) -> Iterator[Collector]:
    with collector(database, "--require-token", "--allowed-host", "gradwatch.example") as running:
        yield running


def test_another_address_is_refused_without_a_token(tmp_path: Path) -> None:
    done = gradwatch("collector", "serve", "--db", f"sqlite:///{tmp_path / 'db'}", "--listen", "0.0.0.0:0")
    assert done.returncode == 1
    assert "gradwatch token create" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_token_is_shown_once_and_not_stored(database: str, token: str) -> None:
    assert token.startswith("gw_")
    assert token.encode() not in Path(database.removeprefix("sqlite:///")).read_bytes()


def test_a_name_is_given_once(database: str, token: str) -> None:
    again = gradwatch("token", "create", "ci", "--db", database)
    assert again.returncode == 1
    assert "exists already" in again.stderr


@pytest.mark.parametrize("authorization", [None, "Bearer gw_wrong", "Basic dXNlcg==", "Bearer"])
def test_no_valid_token_gets_401(guarded: Collector, authorization: str | None) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    answer = guarded.get("/api/v1/runs", headers=headers)
    assert answer.status_code == 401
    assert "token" in answer.json()["error"]


def test_a_valid_token_gets_in(guarded: Collector, token: str) -> None:
    assert guarded.get("/api/v1/runs", headers={"Authorization": f"Bearer {token}"}).status_code == 200


def test_probes_need_no_token(guarded: Collector) -> None:
    assert guarded.get("/healthz").status_code == 200
    assert guarded.get("/readyz").json() == {"ready": True}


def test_telemetry_without_a_token_gets_an_encoded_status(guarded: Collector) -> None:
    answer = requests.post(
        f"{guarded.url}/v1/metrics",
        data=ExportMetricsServiceRequest().SerializeToString(),
        headers=PROTOBUF,
        timeout=10,
    )
    assert answer.status_code == 401
    assert "token" in Status.FromString(answer.content).message


@pytest.mark.parametrize("host", ["evil.example", "evil.example:4318", "", "127.0.0.1.evil.example"])
def test_a_foreign_host_header_is_refused(guarded: Collector, host: str) -> None:
    assert guarded.get("/healthz", headers={"Host": host}).status_code == 421


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:4318", "[::1]:4318", "127.0.0.1:1", "gradwatch.example"]
)
def test_our_own_host_headers_are_served(guarded: Collector, host: str) -> None:
    assert guarded.get("/healthz", headers={"Host": host}).status_code == 200


def test_a_port_in_use_is_one_clear_line(guarded: Collector, tmp_path: Path) -> None:
    address = guarded.url.removeprefix("http://")
    done = gradwatch("collector", "serve", "--db", f"sqlite:///{tmp_path / 'db'}", "--listen", address)
    assert done.returncode == 1
    assert address in done.stderr
    assert "--listen" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=1001", "limit=x", "limit=²", "cursor=x", "cursor=WzFlOTk5LCJhIl0=", "cursor=WzEsMl0="],
)
def test_a_bad_query_is_the_askers_fault(guarded: Collector, token: str, query: str) -> None:
    answer = guarded.get(f"/api/v1/runs?{query}", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_an_unknown_run_is_not_found(guarded: Collector, token: str) -> None:
    for name in ("nope", "a%00b", "a/b", "%F0%9F%98%80"):
        answer = guarded.get(f"/api/v1/runs/{name}", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 404
