"""What is OTLP/HTTP's own: content types, JSON, pipelining, methods, browsers."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
import requests
from google.rpc.code_pb2 import Code
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from sqlalchemy import select

from gradwatch import conventions as c
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from tests.collector_process import Collector
from tests.metric_views import points, series
from tests.otlp_clients import gauge, metrics_request

START = 1_750_000_000_000_000_000
JSON = "application/json"
PROTOBUF = "application/x-protobuf"


@pytest.fixture
def run_id() -> str:
    return f"run-{uuid4().hex}"


def of(run_id: str, *times: int) -> bytes:
    request = metrics_request({c.RUN_ID: run_id}, *(gauge("norm", (time, 1.5)) for time in times))
    encoded: bytes = request.SerializeToString()
    return encoded


def post(served: Collector, body: Any, path: str = "metrics", **headers: str) -> requests.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if not isinstance(body, bytes | Iterator):
        body = json.dumps(body).encode()
        named = {"Content-Type": JSON, **named}
    return requests.post(f"{served.url}/v1/{path}", body, headers=named, timeout=30)


def metrics_json(run_id: str, *metrics: Any) -> Any:
    attribute = {"key": c.RUN_ID, "value": {"stringValue": run_id}}
    return {
        "resourceMetrics": [{"resource": {"attributes": [attribute]}, "scopeMetrics": [{"metrics": metrics}]}]
    }


def gauge_json(run_id: str, **point: Any) -> Any:
    metric = {"name": "norm", "gauge": {"dataPoints": [{"timeUnixNano": str(START), **point}]}}
    return metrics_json(run_id, metric)


@pytest.mark.parametrize(
    "content_type", [PROTOBUF, f"{PROTOBUF}; charset=utf-8", "Application/X-Protobuf ;x=y"]
)
def test_a_content_type_may_have_parameters(served: Collector, run_id: str, content_type: str) -> None:
    answer = post(served, of(run_id, START), Content_Type=content_type)
    assert (answer.status_code, answer.headers["Content-Type"], answer.content) == (200, PROTOBUF, b"")


@pytest.mark.parametrize("content_type", [JSON, f"{JSON};charset=UTF-8", "APPLICATION/JSON"])
def test_json_is_answered_in_json(served: Collector, run_id: str, content_type: str) -> None:
    answer = post(served, gauge_json(run_id, asDouble=1.5), Content_Type=content_type)
    assert (answer.status_code, answer.headers["Content-Type"], answer.json()) == (200, JSON, {})
    partial = post(served, gauge_json(run_id), Content_Type=content_type).json()["partialSuccess"]
    assert partial["rejectedDataPoints"] == "1"
    assert partial["errorMessage"].startswith("not stored: ")
    refused = post(served, b"{", Content_Type=content_type)
    assert (refused.status_code, refused.headers["Content-Type"]) == (400, JSON)
    assert refused.json()["code"] == Code.INVALID_ARGUMENT
    assert "in JSON: " in refused.json()["message"]
    (detail,) = refused.json()["details"]
    assert detail["@type"] == "type.googleapis.com/google.rpc.BadRequest"
    assert detail["fieldViolations"] == [{"description": refused.json()["message"]}]


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "*/*"])
def test_other_content_types_are_refused_in_protobuf(served: Collector, content_type: str) -> None:
    answer = post(served, b"", Content_Type=content_type)
    assert (answer.status_code, answer.headers["Content-Type"]) == (415, PROTOBUF)
    assert Status.FromString(answer.content).code == Code.INVALID_ARGUMENT


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
@pytest.mark.parametrize("path", ["metrics", "logs", "traces"])
def test_only_post_is_served(served: Collector, method: str, path: str) -> None:
    answer = requests.request(method, f"{served.url}/v1/{path}", timeout=30)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    if method != "HEAD":
        assert Status.FromString(answer.content).code == Code.UNIMPLEMENTED


def test_a_page_of_another_origin_is_granted_nothing(served: Collector, run_id: str) -> None:
    origin = {"Origin": "https://evil.example"}
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    preflight = requests.options(f"{served.url}/v1/metrics", headers={**origin, **wanted}, timeout=30)
    assert preflight.status_code == 405
    answers = [
        preflight,
        post(served, gauge_json(run_id, asInt=1), **origin),
        served.get("/api/v1/metrics", headers=origin),
    ]
    allowed = [
        name for answer in answers for name in answer.headers if name.lower().startswith("access-control")
    ]
    assert allowed == []


def test_what_a_page_may_send_unasked_is_refused(served: Collector, run_id: str) -> None:
    # text/plain, forms: requests that a browser makes without a preflight.
    body = json.dumps(gauge_json(run_id, asInt=1)).encode()
    assert post(served, body, Content_Type="text/plain").status_code == 415
    assert served.get("/api/v1/series", params={"metric": "norm", "run": run_id}).status_code == 404


def test_a_body_may_come_in_chunks(served: Collector, run_id: str) -> None:
    body = of(run_id, START)
    answer = post(served, iter([body[:7], body[7:]]), Content_Type=PROTOBUF)
    assert answer.status_code == 200
    assert len(points(served, run_id, "norm")) == 1


def wire(body: bytes, content_type: str = PROTOBUF, **headers: str) -> bytes:
    lines = [
        "POST /v1/metrics HTTP/1.1",
        "Host: localhost",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def connect(served: Collector) -> socket.socket:
    host, _, port = served.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def read_answer(stream: Any) -> tuple[int, bytes]:
    status = int(stream.readline().split()[1])
    length = 0
    while line := stream.readline().strip():
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return status, stream.read(length)


def test_requests_may_be_sent_before_the_answers_to_those_before_them(served: Collector, run_id: str) -> None:
    # Good, bad and partly good ones in turn: each answer must be its own request's.
    bodies = [of(run_id, START + i, *([2**63] * (i % 4))) if i % 5 else b"\xff" for i in range(40)]
    with connect(served) as client, client.makefile("rb") as stream:
        client.sendall(b"".join(map(wire, bodies)))
        answers = [read_answer(stream) for _ in bodies]
    for i, (status, body) in enumerate(answers):
        if i % 5:
            rejected = ExportMetricsServiceResponse.FromString(body).partial_success.rejected_data_points
            assert (status, rejected) == (200, i % 4)
        else:
            assert (status, Status.FromString(body).code) == (400, Code.INVALID_ARGUMENT)
    assert len(points(served, run_id, "norm")) == 32


def test_a_client_may_ask_before_it_sends_the_body(served: Collector, run_id: str) -> None:
    body = of(run_id, START)
    with connect(served) as client, client.makefile("rb") as stream:
        client.sendall(wire(body, Expect="100-continue").removesuffix(body))
        assert read_answer(stream)[0] == 100
        client.sendall(body)
        assert read_answer(stream)[0] == 200


def test_a_client_that_goes_away_halfway_disturbs_nobody(served: Collector, run_id: str) -> None:
    for _ in range(20):
        with connect(served) as client:
            client.sendall(wire(of(run_id, START))[:-5])
    assert post(served, of(run_id, START + 1), Content_Type=PROTOBUF).status_code == 200
    assert len(points(served, run_id, "norm")) == 1


@pytest.mark.parametrize("written", [7, "7", "-7", -(2**63), str(2**63 - 1)])
def test_json_integers_are_strings_or_numbers(served: Collector, run_id: str, written: Any) -> None:
    assert post(served, gauge_json(run_id, asInt=written)).json() == {}
    assert points(served, run_id, "norm")[0]["value"] == int(written)


@pytest.mark.parametrize("time", [START, str(START)])
def test_json_times_are_strings_or_numbers(served: Collector, run_id: str, time: Any) -> None:
    assert post(served, gauge_json(run_id, asInt=1, timeUnixNano=time)).json() == {}
    assert points(served, run_id, "norm")[0]["time"] == "2025-06-15T15:06:40.000000000Z"


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_json_numbers_that_are_none_are_strings(served: Collector, run_id: str, value: str) -> None:
    assert post(served, gauge_json(run_id, asDouble=value)).json() == {}
    assert points(served, run_id, "norm")[0]["nonfinite"] == {"value": value}


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_not_json_is_refused(served: Collector, run_id: str, literal: str) -> None:
    body = json.dumps(gauge_json(run_id, asDouble=0)).replace('"asDouble": 0', f'"asDouble": {literal}')
    answer = post(served, body.encode(), Content_Type=JSON)
    assert (answer.status_code, answer.json()["code"]) == (400, Code.INVALID_ARGUMENT)


def test_json_null_is_a_field_that_is_not_there(served: Collector, run_id: str) -> None:
    told = gauge_json(run_id, asInt=1, startTimeUnixNano=None, attributes=None, exemplars=None, asDouble=None)
    assert post(served, told).json() == {}
    assert points(served, run_id, "norm")[0]["value"] == 1


@pytest.mark.parametrize("temporality", [1, "AGGREGATION_TEMPORALITY_DELTA"])
def test_json_enums_are_integers_and_names_are_understood(
    served: Collector, run_id: str, temporality: Any
) -> None:
    data = {"aggregationTemporality": temporality, "dataPoints": [{"timeUnixNano": START, "asInt": 1}]}
    assert post(served, metrics_json(run_id, {"name": "count", "sum": data})).json() == {}
    assert series(served, run_id, "count")[0]["metric"]["temporality"] == "delta"


def test_an_enum_of_a_later_version_is_ignored(served: Collector, run_id: str) -> None:
    data = {"aggregationTemporality": 99, "dataPoints": [{"timeUnixNano": START, "asInt": 1}]}
    assert post(served, metrics_json(run_id, {"name": "count", "sum": data})).json() == {}
    assert series(served, run_id, "count")[0]["metric"]["temporality"] is None


@pytest.mark.parametrize("name", ["trace_id", "traceId"])
@pytest.mark.parametrize("case", [str.lower, str.upper])
def test_json_ids_are_hexadecimal_in_either_case(served: Collector, name: str, case: Any) -> None:
    trace_id = uuid4().hex
    span = {name: case(trace_id), "spanId": case("eee19b7ec3c1b174"), "name": "run", "startTimeUnixNano": START}
    assert post(served, {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}, "traces").json() == {}
    engine = db.connect(served.database)
    with engine.connect() as connection:
        ids = connection.scalars(select(schema.span.c.span_id).where(schema.span.c.trace_id == trace_id)).all()
    engine.dispose()
    assert ids == ["eee19b7ec3c1b174"]


def test_json_ids_that_are_base64_are_refused(served: Collector) -> None:
    span = {"traceId": "W47/95gDgQPSabYzgT/GDA==", "spanId": "eee19b7ec3c1b174", "name": "run"}
    answer = post(served, {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}, "traces")
    assert answer.status_code == 400
    assert answer.json()["message"] == "traceId is 'W47/95gDgQPSabYzgT/GDA=='; it must be hexadecimal"


def test_the_example_of_the_specification_is_understood(served: Collector, run_id: str) -> None:
    # After opentelemetry-proto's examples/metrics.json: integers as strings, enums as integers.
    told = metrics_json(
        run_id,
        {
            "name": "my.histogram",
            "unit": "1",
            "description": "I am a Histogram",
            "histogram": {
                "aggregationTemporality": 1,
                "dataPoints": [
                    {
                        "startTimeUnixNano": "1544712660300000000",
                        "timeUnixNano": "1544712660300000000",
                        "count": "2",
                        "sum": 2,
                        "bucketCounts": ["1", "1"],
                        "explicitBounds": [1],
                        "min": 0,
                        "max": 2,
                        "attributes": [{"key": "my.attr", "value": {"stringValue": "some value"}}],
                    }
                ],
            },
        },
    )
    assert post(served, told).json() == {}
    (found,) = series(served, run_id, "my.histogram", label="my.attr=some value")
    (point,) = found["points"]
    assert (point["count"], point["sum"], point["bucket_counts"]) == (2, 2, [1, 1])


def test_a_path_that_is_none_is_told_as_its_clients_read_errors(served: Collector) -> None:
    for path in ("/v1/profiles", "/v1/metrics/"):
        answer = requests.post(served.url + path, headers={"Content-Type": PROTOBUF}, timeout=30)
        assert (answer.status_code, answer.headers["Content-Type"]) == (404, PROTOBUF)
        assert Status.FromString(answer.content).code == Code.NOT_FOUND
    answer = requests.post(f"{served.url}/nothing", timeout=30)
    assert answer.status_code == 404
    assert answer.json()["error"]


def test_an_event_in_json_keeps_its_number(served: Collector, run_id: str) -> None:
    record = {"eventName": c.RUN_STARTED.name, "timeUnixNano": str(START), "severityNumber": 9}
    attribute = {"key": c.EVENT_SEQUENCE, "value": {"intValue": "12"}}
    owner = {"key": c.RUN_ID, "value": {"stringValue": run_id}}
    told = {
        "resourceLogs": [
            {
                "resource": {"attributes": [owner]},
                "scopeLogs": [{"logRecords": [{**record, "attributes": [attribute]}]}],
            }
        ]
    }
    for _ in range(2):
        assert post(served, told, "logs").json() == {}
    (event,) = served.show(run_id)["events"]
    assert event["attributes"] == {c.EVENT_SEQUENCE: 12}
