"""Who may talk to the collector."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import requests
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2_grpc import LogsServiceStub
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from prometheus_client.parser import text_string_to_metric_families

from gradwatch import conventions as c
from gradwatch_collector.service.server import Address, ServerSettings
from tests.collector_process import Collector, collector, eventually, gradwatch

PROTOBUF = {"Content-Type": "application/x-protobuf"}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def create(database: str, name: str, *options: str) -> str:
    created = gradwatch("token", "create", name, *options, "--db", database)
    assert created.returncode == 0, created.stderr
    return created.stdout.strip()


def export(collector: Collector, signal: str, token: str | None = None, body: bytes = b"") -> requests.Response:
    headers = PROTOBUF | ({} if token is None else bearer(token))
    return requests.post(f"{collector.url}/v1/{signal}", data=body, headers=headers, timeout=10)


def started(run_id: str) -> bytes:
    message = ExportLogsServiceRequest()
    owner = message.resource_logs.add()
    owner.resource.attributes.add(key=c.RUN_ID).value.string_value = run_id
    owner.resource.attributes.add(key=c.TEAM).value.string_value = "claimed"
    owner.scope_logs.add().log_records.add(event_name=c.RUN_STARTED.name, time_unix_nano=1_750_000_000 * 10**9)
    encoded: bytes = message.SerializeToString()
    return encoded


def one_step(run_id: str) -> bytes:
    message = ExportMetricsServiceRequest()
    owner = message.resource_metrics.add()
    owner.resource.attributes.add(key=c.RUN_ID).value.string_value = run_id
    metric = owner.scope_metrics.add().metrics.add(name="norm")
    metric.gauge.data_points.add(time_unix_nano=1_750_000_000 * 10**9, as_double=1.5)
    encoded: bytes = message.SerializeToString()
    return encoded


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('access') / 'gradwatch.db'}"


@pytest.fixture(scope="module")
def token(database: str) -> str:
    return create(database, "ci", "--role", "ingest", "--role", "read")


@pytest.fixture(scope="module")
def guarded(database: str, token: str) -> Iterator[Collector]:
    options = ("--require-token", "--allowed-host", "gradwatch.example", "--grpc", "127.0.0.1:0")
    with collector(database, *options) as running:
        yield running


def test_another_address_is_refused_without_a_token(tmp_path: Path) -> None:
    done = gradwatch("collector", "serve", "--db", f"sqlite:///{tmp_path / 'db'}", "--listen", "0.0.0.0:0")
    assert done.returncode == 1
    assert "gradwatch token create" in done.stderr
    assert "--allow-anonymous" in done.stderr
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
    answer = export(guarded, "metrics", body=ExportMetricsServiceRequest().SerializeToString())
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    status = Status.FromString(answer.content)
    assert status.code == Code.UNAUTHENTICATED
    assert "token" in status.message


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


# --- Roles and teams -----------------------------------------------------------------------------------


def test_a_token_opens_the_doors_of_its_roles_only(guarded: Collector, database: str) -> None:
    doors = {}
    for role in ("ingest", "read", "admin"):
        token = create(database, f"only-{role}", "--role", role)
        sent = export(guarded, "metrics", token)
        read = guarded.get("/api/v1/runs", headers=bearer(token))
        removed = requests.delete(f"{guarded.url}/api/v1/runs/x", headers=bearer(token), timeout=10)
        doors[role] = (sent.status_code, read.status_code, removed.status_code)
        if role == "read":
            assert Status.FromString(sent.content).code == Code.PERMISSION_DENIED
        if role == "ingest":
            assert "is for ingest, not read" in read.json()["error"]
    # There is nothing to be removed by anybody yet: 405 is behind the door.
    assert doors == {"ingest": (200, 403, 403), "read": (403, 200, 403), "admin": (200, 200, 405)}


def test_sending_is_all_that_a_token_is_for_unless_more_is_said(guarded: Collector, database: str) -> None:
    token = create(database, "sender")
    assert export(guarded, "logs", token).status_code == 200
    assert guarded.get("/metrics", headers=bearer(token)).status_code == 403


def test_a_team_sees_and_touches_its_own_runs_only(guarded: Collector, database: str, token: str) -> None:
    teams = {
        team: create(database, team, "--team", team, "--role", "ingest", "--role", "read")
        for team in ("vision", "speech")
    }
    for team, own in teams.items():
        assert export(guarded, "logs", own, started(f"{team}-run")).status_code == 200
    trespass = export(guarded, "logs", teams["vision"], started("speech-run"))
    assert trespass.status_code == 403
    assert "another team's" in Status.FromString(trespass.content).message

    def runs(token: str) -> dict[str, str]:
        listed = guarded.get("/api/v1/runs", headers=bearer(token)).json()["runs"]
        return {run["run_id"]: run["team"] for run in listed}

    assert runs(token) == {"vision-run": "vision", "speech-run": "speech"}
    assert runs(teams["vision"]) == {"vision-run": "vision"}
    shown = {
        run: guarded.get(f"/api/v1/runs/{run}", headers=bearer(teams["vision"])).status_code
        for run in ("vision-run", "speech-run")
    }
    assert shown == {"vision-run": 200, "speech-run": 404}
    for run in ("vision-run", "speech-run"):
        assert export(guarded, "metrics", token, one_step(run)).status_code == 200
    series = {
        run: guarded.get(f"/api/v1/series?metric=norm&run={run}", headers=bearer(teams["vision"])).status_code
        for run in ("vision-run", "speech-run")
    }
    assert series == {"vision-run": 200, "speech-run": 404}
    (listed,) = guarded.get("/api/v1/metrics?name=norm", headers=bearer(teams["vision"])).json()["metrics"]
    assert [source["run_id"] for source in listed["sources"]] == ["vision-run"]


def test_objectives_are_told_to_a_team_over_its_own_runs(guarded: Collector, database: str, token: str) -> None:
    teams = create(database, "quiet", "--team", "nobody", "--role", "read")
    whole = guarded.get("/api/v1/slos", headers=bearer(token)).json()
    own = guarded.get("/api/v1/slos", headers=bearer(teams)).json()
    assert own.keys() == whole.keys()
    assert {objective["total"] for objective in own["objectives"]} <= {0}


def test_metrics_of_the_whole_service_are_not_for_one_team(
    guarded: Collector, database: str, token: str
) -> None:
    team = create(database, "scraper", "--team", "vision", "--role", "read")
    refused = guarded.get("/metrics", headers=bearer(team))
    assert refused.status_code == 403
    assert "every team's" in refused.json()["error"]
    # What is new is refused until it knows teams.
    for path in ("/api/v1/new", "/api/v1/runs-of-all"):
        assert guarded.get(path, headers=bearer(team)).status_code == 403
        assert guarded.get(path, headers=bearer(token)).status_code == 404
    assert guarded.get("/metrics", headers=bearer(token)).status_code == 200


def test_tokens_are_listed_without_what_would_let_anybody_in(
    guarded: Collector, database: str, token: str
) -> None:
    assert guarded.get("/api/v1/runs", headers=bearer(token)).status_code == 200
    listed = gradwatch("token", "list", "--db", database, "--format", "json")
    shown = {row["name"]: row for row in json.loads(listed.stdout)}
    assert shown["ci"]["roles"] == ["ingest", "read"]
    assert shown["ci"]["state"] == "valid"
    assert shown["ci"]["last_used_at"] is not None
    assert shown["ci"]["expires_at"] is None
    assert token not in listed.stdout
    assert "gw_" not in gradwatch("token", "list", "--db", database).stdout


def test_a_token_is_revoked_by_name_and_both_acts_are_in_the_audit_log(database: str) -> None:
    create(database, "leaver", "--team", "vision", "--expires-in", "90d")
    done = gradwatch("token", "revoke", "leaver", "--db", database)
    assert (done.returncode, done.stdout) == (0, "token leaver is revoked\n")
    again = gradwatch("token", "revoke", "leaver", "--db", database)
    assert again.returncode == 1
    assert len(again.stderr.strip().splitlines()) == 1
    acts = json.loads(gradwatch("audit", "list", "--db", database, "--format", "json").stdout)
    about = [act for act in acts if act["subject"] == "leaver"]
    assert [act["action"] for act in about] == ["token.revoked", "token.created"]
    assert about[1]["details"]["team"] == "vision"
    assert all("@" in act["actor"] for act in about)
    assert "token.revoked" in gradwatch("audit", "list", "--db", database).stdout


@pytest.mark.parametrize(
    "options",
    [
        ("--expires-in", "soon"),
        ("--expires-in", "0s"),
        ("--role", "root"),
        ("--team", ""),
        ("--team", "x" * 257),
    ],
)
def test_a_token_that_makes_no_sense_is_a_usage_error(database: str, options: tuple[str, ...]) -> None:
    done = gradwatch("token", "create", "nonsense", *options, "--db", database)
    assert done.returncode == 2
    assert options[0] in done.stderr


# --- Limits --------------------------------------------------------------------------------------------


def test_who_sends_too_much_is_told_when_to_come_back(guarded: Collector, database: str) -> None:
    token = create(database, "eager", "--role", "admin", "--requests-per-second", "0.1")
    answers = [export(guarded, "metrics", token) for _ in range(3)]
    refused = answers[-1]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(refused.headers["Retry-After"]) <= 10
    assert Status.FromString(refused.content).code == Code.RESOURCE_EXHAUSTED
    assert guarded.get("/api/v1/runs", headers=bearer(token)).status_code == 429


def test_bytes_are_counted_as_they_come_however_they_are_announced(guarded: Collector, database: str) -> None:
    token = create(database, "bulky", "--bytes-per-second", "100")
    sent = requests.post(
        f"{guarded.url}/v1/metrics", data=iter([b"\xff" * 3_000]), headers=PROTOBUF | bearer(token), timeout=10
    )
    assert sent.status_code == 400  # let in, read, and not understood
    refused = export(guarded, "metrics", token)
    assert refused.status_code == 429
    assert 10 < int(refused.headers["Retry-After"]) <= 21


# --- Every answer --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "method", "path", "host", "with_token"),
    [
        (200, "GET", "/healthz", "localhost", False),
        (401, "GET", "/api/v1/runs", "localhost", False),
        (404, "GET", "/nothing/here", "localhost", True),
        (405, "PUT", "/v1/metrics", "localhost", True),
        (421, "GET", "/healthz", "evil.example", False),
    ],
)
def test_every_answer_has_secure_headers_and_lets_no_other_origin_read_it(
    guarded: Collector, token: str, status: int, method: str, path: str, host: str, with_token: bool
) -> None:
    headers = {"Origin": "https://evil.example", "Host": host} | (bearer(token) if with_token else {})
    answer = requests.request(method, guarded.url + path, headers=headers, timeout=10)
    assert answer.status_code == status
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert not [name for name in answer.headers if name.lower().startswith("access-control-")]
    # Over plain HTTP it would be a lie.
    assert "Strict-Transport-Security" not in answer.headers
    assert "Server" not in answer.headers


def test_a_preflight_request_of_a_browser_gets_nothing(guarded: Collector, token: str) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for headers in (asked, asked | bearer(token)):
        answer = requests.options(f"{guarded.url}/v1/metrics", headers=headers, timeout=10)
        assert answer.status_code >= 400
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]


# --- Of the collector itself ---------------------------------------------------------------------------


def test_the_collector_tells_about_itself(guarded: Collector, token: str) -> None:
    def samples() -> dict[tuple[str, str], float]:
        text = guarded.get("/metrics", headers=bearer(token)).text
        return {
            (sample.name, sample.labels.get("reason", "")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = samples()
    guarded.get("/api/v1/runs")
    guarded.get("/healthz", headers={"Host": "evil.example"})
    after = samples()
    for reason in ("unauthenticated", "foreign_host"):
        place = (c.COLLECTOR_REJECTED.name, reason)
        assert after[place] == before[place] + 1
    assert after[c.COLLECTOR_CONNECTIONS.name, ""] >= 1
    assert after[c.COLLECTOR_DATABASE_CONNECTIONS.name, ""] >= 0
    assert after[c.COLLECTOR_QUEUE_BYTES.name, ""] == 0
    assert after[c.COLLECTOR_QUEUE_LIMIT.name, ""] > 0
    eventually(lambda: samples().get((c.COLLECTOR_DATABASE_SIZE.name, ""), 0) > 0, "the database's size")


@pytest.mark.parametrize(
    ("host", "options", "guarded_by_token"),
    [
        ("127.0.0.1", {}, False),
        ("127.0.0.1", {"require_token": True}, True),
        ("192.0.2.1", {}, True),
        ("192.0.2.1", {"allow_anonymous": True}, False),
        ("::", {}, True),
    ],
)
def test_tokens_are_asked_for_beyond_loopback_unless_that_is_refused(
    host: str, options: dict[str, bool], guarded_by_token: bool
) -> None:
    http, grpc = Address("127.0.0.1", 4318), Address(host, 4317)
    assert ServerSettings(http, grpc, 30.0, **options).guarded(grpc) is guarded_by_token


def test_asking_for_tokens_and_for_none_exclude_each_other(tmp_path: Path) -> None:
    done = gradwatch(
        "collector", "serve", "--db", f"sqlite:///{tmp_path}/db", "--require-token", "--allow-anonymous"
    )
    assert done.returncode == 2
    assert "exclude each other" in done.stderr


# --- gRPC ----------------------------------------------------------------------------------------------


def export_grpc(collector: Collector, token: str | None, body: bytes) -> grpc.RpcError | None:
    """Send logs; what went wrong, if anything did."""
    metadata = () if token is None else (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(collector.grpc) as channel:
        try:
            LogsServiceStub(channel).Export(
                ExportLogsServiceRequest.FromString(body), metadata=metadata, timeout=10
            )
        except grpc.RpcError as error:
            return error
    return None


def test_roles_and_teams_are_the_same_over_grpc(guarded: Collector, database: str) -> None:
    reader = create(database, "grpc-reader", "--role", "read")
    owner, stranger = (create(database, f"grpc-{team}", "--team", team) for team in ("owner", "stranger"))
    codes = [
        error and error.code()
        for error in (
            export_grpc(guarded, None, b""),
            export_grpc(guarded, reader, b""),
            export_grpc(guarded, owner, started("grpc-run")),
            export_grpc(guarded, stranger, started("grpc-run")),
        )
    ]
    assert codes == [
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        None,
        grpc.StatusCode.PERMISSION_DENIED,
    ]


def test_a_token_has_one_limit_over_both_protocols(guarded: Collector, database: str) -> None:
    token = create(database, "grpc-eager", "--requests-per-second", "0.1")
    assert export(guarded, "logs", token).status_code == 200
    assert export_grpc(guarded, token, b"") is None
    refused = export_grpc(guarded, token, b"")
    assert refused is not None
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailers = dict(refused.trailing_metadata())
    waits = RetryInfo.FromString(trailers["google.rpc.retryinfo-bin"]).retry_delay.seconds
    assert 1 <= waits <= 10
    assert export(guarded, "logs", token).status_code == 429
