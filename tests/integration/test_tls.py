"""Encrypted from the training process to the collector, each sure of the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import requests
import trustme
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2_grpc import LogsServiceStub

from gradwatch_collector.api.run_list import list_runs
from gradwatch_collector.storage import database as db
from tests.collector_process import Collector, collector, gradwatch, train

LOOP = """
import torch
import gradwatch

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with gradwatch.watch(model, optimizer, job="encrypted", run_id="encrypted"):
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
"""


@dataclass(frozen=True)
class Files:
    """PEM files: an authority, and what it issued to the server and to a client."""

    authority: str
    server: tuple[str, str]
    client: tuple[str, str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "authority.pem")

    def issued(name: str, *identities: str) -> tuple[str, str]:
        leaf = authority.issue_cert(*identities)
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        leaf.cert_chain_pems[0].write_to_path(certificate)
        leaf.private_key_pem.write_to_path(key)
        return str(certificate), str(key)

    return Files(
        str(folder / "authority.pem"), issued("server", "127.0.0.1"), issued("client", "trainer@example.org")
    )


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/gradwatch.db"


@pytest.fixture
def encrypted(files: Files, database: str) -> Iterator[Collector]:
    certificate, key = files.server
    with collector(database, "--tls-cert", certificate, "--tls-key", key) as running:
        yield running


@pytest.fixture
def mutual(files: Files, database: str) -> Iterator[Collector]:
    certificate, key = files.server
    options = ("--tls-cert", certificate, "--tls-key", key, "--tls-client-ca", files.authority)
    options += ("--grpc", "127.0.0.1:0")
    with collector(database, *options) as running:
        yield running


def trained(collector: Collector, folder: Path, **settings: str) -> list[str]:
    """Train to the end, and return how the runs in the database stand."""
    script = folder / "loop.py"
    script.write_text(LOOP)
    process = train(script, collector, **settings)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    engine = db.connect(collector.database)
    with engine.connect() as connection:
        found = [run["status"] for run in list_runs(connection)["runs"]]
    engine.dispose()
    return found


def test_a_training_process_that_knows_the_authority_delivers(
    encrypted: Collector, files: Files, tmp_path: Path
) -> None:
    assert encrypted.url.startswith("https://")
    assert trained(encrypted, tmp_path, OTEL_EXPORTER_OTLP_CERTIFICATE=files.authority) == ["succeeded"]


def test_a_training_process_that_does_not_tells_a_stranger_nothing(
    encrypted: Collector, tmp_path: Path
) -> None:
    assert trained(encrypted, tmp_path, GRADWATCH_SPOOL_DIR=str(tmp_path / "spool")) == []


def test_with_client_certificates_only_those_who_have_one_are_heard(
    mutual: Collector, files: Files, tmp_path: Path
) -> None:
    stranger = {"OTEL_EXPORTER_OTLP_CERTIFICATE": files.authority, "GRADWATCH_DIR": str(tmp_path / "stranger")}
    assert trained(mutual, tmp_path, **stranger) == []
    certificate, key = files.client
    known = {
        "OTEL_EXPORTER_OTLP_CERTIFICATE": files.authority,
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": certificate,
        "OTEL_EXPORTER_OTLP_CLIENT_KEY": key,
        "GRADWATCH_DIR": str(tmp_path / "known"),
    }
    assert trained(mutual, tmp_path, **known) == ["succeeded"]


def test_with_client_certificates_nothing_at_all_is_answered_without_one(
    mutual: Collector, files: Files
) -> None:
    with pytest.raises(requests.ConnectionError):
        mutual.get("/healthz", verify=files.authority)
    assert mutual.get("/healthz", verify=files.authority, cert=files.client).status_code == 200


def send_over_grpc(collector: Collector, authority: str, client: tuple[str, str] | None) -> None:
    certificate, key = (Path(file).read_bytes() for file in client) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(Path(authority).read_bytes(), key, certificate)
    with grpc.secure_channel(collector.grpc, credentials) as channel:
        LogsServiceStub(channel).Export(ExportLogsServiceRequest(), timeout=10)


def test_grpc_is_encrypted_with_the_same_files(mutual: Collector, files: Files) -> None:
    send_over_grpc(mutual, files.authority, files.client)
    with pytest.raises(grpc.RpcError) as refused:
        send_over_grpc(mutual, files.authority, None)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_browsers_are_told_to_come_back_encrypted(encrypted: Collector, files: Files) -> None:
    answer = encrypted.get("/healthz", verify=files.authority)
    assert "max-age=" in answer.headers["Strict-Transport-Security"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_files_that_cannot_be_used_are_one_clear_line(files: Files, database: str, tmp_path: Path) -> None:
    (certificate, key), (_, other_key) = files.server, files.client
    absent, text = str(tmp_path / "absent.pem"), tmp_path / "text.pem"
    text.write_text("not a certificate")
    for options, named in (
        ((absent, key), absent),
        ((certificate, other_key), other_key),
        ((str(text), key), str(text)),
        ((certificate, key, "--tls-client-ca", str(text)), str(text)),
    ):
        serve = ("--tls-cert", options[0], "--tls-key", *options[1:])
        done = gradwatch("collector", "serve", "--db", database, *serve)
        assert done.returncode == 1
        assert named in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("options", [("--tls-cert", "a"), ("--tls-key", "a"), ("--tls-client-ca", "a")])
def test_half_of_tls_is_a_usage_error(database: str, options: tuple[str, ...]) -> None:
    done = gradwatch("collector", "serve", "--db", database, *options)
    assert done.returncode == 2
    assert "--tls-cert and --tls-key" in done.stderr
