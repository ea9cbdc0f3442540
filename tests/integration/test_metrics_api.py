"""Metrics as the API and ``gradwatch metrics`` show them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from sqlalchemy import Engine, event, select, text

from gradwatch import conventions as c
from gradwatch_collector.api import metric_catalog
from gradwatch_collector.api.metric_catalog import list_metrics
from gradwatch_collector.api.metric_points import SeriesQuery, list_series
from gradwatch_collector.records import ProcessKey, Received
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.storage import database as db
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store
from tests.batches import batch, scalar, source
from tests.collector_process import Collector, collector, eventually, gradwatch
from tests.fuzzing.samples import events_request
from tests.metric_views import metrics, points, series
from tests.otlp_clients import Answer, Client, ProtobufClient, attributes, gauge, metrics_request

SECOND = 1_000_000_000
START = 1_750_000_000 * SECOND
OK = Answer(0)


@pytest.fixture
def run_id() -> str:
    return f"run-{uuid4().hex}"


@pytest.fixture
def sdk(served: Collector) -> Iterator[Client]:
    with ProtobufClient(served.url, served.grpc) as client:
        yield client


def at(second: float) -> int:
    return START + int(second * SECOND)


def of(run_id: str, *sent: Metric, **resource: Any) -> Any:
    return metrics_request({c.RUN_ID: run_id, **resource}, *sent)


def steps(*seconds: float, name: str = "norm", **labels: Any) -> Metric:
    return gauge(name, *((at(second), float(second)) for second in seconds), **labels)


def values(found: list[Any]) -> list[float]:
    return [point["value"] for point in found]


def test_points_can_be_asked_for_by_time(served: Collector, sdk: Client, run_id: str) -> None:
    assert sdk.send(of(run_id, steps(*range(10)))) == OK
    assert values(points(served, run_id, "norm", since=at(3), until=at(5))) == [5, 4, 3]
    moments = {"since": "2025-06-15T15:06:43.000000001Z", "until": "2025-06-15T17:06:45+02:00"}
    assert values(points(served, run_id, "norm", **moments)) == [5, 4]


def test_older_points_are_asked_for_where_the_newer_ones_end(
    served: Collector, sdk: Client, run_id: str
) -> None:
    assert sdk.send(of(run_id, steps(*range(25)))) == OK
    seen: list[float] = []
    until: dict[str, str] = {}
    while True:
        (only,) = series(served, run_id, "norm", points="10", **until)
        seen += values(only["points"])
        if only["next_until"] is None:
            break
        until = {"until": only["next_until"]}
    assert seen == list(range(24, -1, -1))


def test_series_are_chosen_by_labels_attempt_and_rank(served: Collector, sdk: Client, run_id: str) -> None:
    for attempt in (1, 2):
        for rank in (0, 1):
            sent = [steps(1, layer=layer, index=i, frozen=i > 0) for i, layer in enumerate("ab")]
            resource = {c.RUN_ATTEMPT: attempt, c.RANK: rank}
            assert sdk.send(of(run_id, *sent, **resource)) == OK

    def places(**query: Any) -> list[tuple[int, int, str]]:
        found = series(served, run_id, "norm", **query)
        return [(each["attempt"], each["rank"], each["labels"]["layer"]) for each in found]

    every = [(attempt, rank, layer) for attempt in (2, 1) for rank in (0, 1) for layer in "ab"]
    assert places() == every
    assert places(attempt="1") == [place for place in every if place[0] == 1]
    assert places(rank="1", label="layer=b") == [(2, 1, "b"), (1, 1, "b")]
    assert (
        places(label=["layer=a", "index=0", "frozen=false"])
        == places(label='layer="a"')
        == places(label="index=0")
    )
    assert places(label=["layer=a", "index=1"]) == places(label="nothing=a") == []


def test_many_series_come_in_pages(served: Collector, sdk: Client, run_id: str) -> None:
    assert sdk.send(of(run_id, *(steps(1, layer=f"{n:02}") for n in range(25)))) == OK
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        query = {"run": run_id, "metric": "norm", "limit": "10", **cursor}
        page = served.get("/api/v1/series", params=query).json()
        seen += [each["labels"]["layer"] for each in page["series"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert seen == [f"{n:02}" for n in range(25)]


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_pages_have_each_series_once_in_however_many_sets_it_was_sent(
    served: Collector, sdk: Client, run_id: str, limit: int
) -> None:
    sent = ("a", "b", "ab", "bc", "abc", "cd", "d", "e")
    for second, layers in enumerate(sent):
        for rank in (0, 1):
            metric = steps(second, layer=layers[0])
            for layer in layers[1:]:
                metric.gauge.data_points.extend(steps(second, layer=layer).gauge.data_points)
            assert sdk.send(of(run_id, metric, **{c.RANK: rank})) == OK
    seen: list[tuple[int, str, list[float]]] = []
    cursor: dict[str, str] = {}
    while True:
        query = {"run": run_id, "metric": "norm", "limit": str(limit), **cursor}
        page = served.get("/api/v1/series", params=query).json()
        assert len(page["series"]) <= limit
        seen += [(each["rank"], each["labels"]["layer"], values(each["points"])) for each in page["series"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert [rank for rank, _, _ in seen] == [0] * 5 + [1] * 5
    assert sorted(seen) == [
        (rank, layer, [second for second in range(len(sent))[::-1] if layer in sent[second]])
        for rank in (0, 1)
        for layer in "abcde"
    ]


def test_a_page_reads_the_labels_of_no_series_but_its_own(database: Engine) -> None:
    key = ProcessKey("run", 1, 0, "one")
    frames = [scalar(c.LOSS, [n], [n], part=f"{n:03}") for n in range(300)]
    with transaction(database) as connection:
        store(connection, SeriesIds(), [Received(key, batch(source(), frames=frames), START)])
    with database.connect() as connection:
        first = list_series(connection, SeriesQuery("run", c.LOSS.name, limit=10))
    assert first is not None
    with database.connect() as connection:
        query = SeriesQuery("run", c.LOSS.name, limit=280, cursor=first["next_cursor"])
        rest = list_series(connection, query)
    assert rest is not None
    last = {each["labels"]["part"] for each in rest["series"]}
    # Labels that are none: whoever reads them cannot.
    with transaction(database) as connection:
        for set_id, (labels,) in connection.execute(select(schema.attribute_set.c["set_id", "points"])).all():
            if labels["part"] not in last:
                spoilt = schema.attribute_set.update().where(schema.attribute_set.c.set_id == set_id)
                connection.execute(spoilt.values(points=5))
    with database.connect() as connection:
        query = SeriesQuery("run", c.LOSS.name, limit=279, cursor=first["next_cursor"])
        again = list_series(connection, query)
    assert again is not None
    assert again["series"] == rest["series"][:279]


def test_a_page_reads_no_series_but_its_own(served: Collector, sdk: Client, run_id: str) -> None:
    assert sdk.send(of(run_id, *(steps(1, layer=n) for n in range(200)))) == OK
    engine, statements = db.connect(served.database), []
    event.listen(engine, "before_cursor_execute", lambda *told: statements.append(told[2]))
    with engine.connect() as connection:
        page = list_series(connection, SeriesQuery(run_id, "norm", limit=5))
    engine.dispose()
    assert page is not None
    assert [values(each["points"]) for each in page["series"]] == [[1]] * 5
    assert len(statements) < 100


@pytest.mark.postgresql
def test_slow_reads_keep_no_sender_waiting(new_database: Callable[[str], str], run_id: str) -> None:
    engine = db.connect(url := new_database("postgresql"))
    started = events_request({c.RUN_ID: run_id}, [c.RUN_STARTED], START)
    with (
        collector(url, "--grpc", "127.0.0.1:0") as running,
        ProtobufClient(running.url, running.grpc) as client,
        ThreadPoolExecutor(20) as pool,
    ):
        assert client.send(started) == OK
        with engine.begin() as connection:
            connection.execute(text("LOCK TABLE checkpoint IN ACCESS EXCLUSIVE MODE"))
            asked = [pool.submit(running.get, f"/api/v1/runs/{run_id}") for _ in range(20)]
            waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
            eventually(lambda: connection.scalar(waiting) >= 4, "readers to wait")
            assert client.send(of(run_id, steps(1))) == OK
            assert running.get("/readyz").json() == {"ready": True}
        assert [answer.result().status_code for answer in asked] == [200] * 20
    engine.dispose()


def test_an_answer_stays_bounded_however_many_series_share_it(
    served: Collector, sdk: Client, run_id: str
) -> None:
    sent = [steps(*range(400), layer=layer) for layer in range(300)]
    assert sdk.send(of(run_id, *sent)) == OK
    found = series(served, run_id, "norm")
    assert len(found) == 300
    assert {len(each["points"]) for each in found} == {100_000 // 300}
    assert all(each["next_until"] for each in found)
    (one,) = series(served, run_id, "norm", label="layer=7")
    assert (len(one["points"]), one["next_until"]) == (400, None)


def test_a_label_that_is_a_large_number_is_the_same_wherever_it_is_stored(
    served: Collector, sdk: Client, run_id: str
) -> None:
    for second in (1, 2):
        assert sdk.send(of(run_id, steps(second, big=1e22))) == OK
    (one,) = series(served, run_id, "norm")
    assert one["labels"]["big"] == 10**22
    assert len(one["points"]) == 2
    assert series(served, run_id, "norm", label=f"big={10**22}") == [one]


@pytest.mark.parametrize("path", ["runs", "metrics", "series"])
@pytest.mark.parametrize("told", ["[" * 40_000, "[1]", "null", "x"])
def test_a_cursor_that_is_none_is_refused(served: Collector, run_id: str, path: str, told: str) -> None:
    cursor = base64.urlsafe_b64encode(told.encode()).decode()
    query = {"cursor": cursor, "run": run_id, "metric": "norm"}
    assert served.get(f"/api/v1/{path}", params=query).status_code == 400


def test_metrics_come_in_pages_newest_first(served: Collector, sdk: Client, run_id: str) -> None:
    names = [f"{run_id}.{n}" for n in range(5)]
    for name in names:
        assert sdk.send(of(run_id, steps(1, name=name))) == OK
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        page = served.get("/api/v1/metrics", params={"run": run_id, "limit": "2", **cursor}).json()
        seen += [each["name"] for each in page["metrics"]]
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert seen == names[::-1]


def test_a_metric_names_its_newest_senders(served: Collector, sdk: Client, run_id: str) -> None:
    name = f"{run_id}.norm"
    for n in range(22):
        assert sdk.send(of(f"{run_id}-{n}", steps(1, name=name), **{c.SERVICE_NAME: "digits"})) == OK
    (listed,) = metrics(served, name=name)
    assert [source["run_id"] for source in listed["sources"]] == [f"{run_id}-{n}" for n in range(21, 1, -1)]
    assert listed["more_sources"]
    assert {(source["job"], source["is_run"]) for source in listed["sources"]} == {("digits", False)}
    (listed,) = metrics(served, name=name, run=f"{run_id}-0")
    assert [source["run_id"] for source in listed["sources"]] == [f"{run_id}-0"]
    assert not listed["more_sources"]


def test_what_a_sender_says_at_length_is_cut_or_left_out(served: Collector, sdk: Client, run_id: str) -> None:
    told = {"long": "é" * 1_000_000, "listed": ["x" * 10_000], "short": 1}
    others = {f"other.{n}": "y" * 1_000 for n in range(20)}
    assert sdk.send(of(run_id, steps(1), **told, **others)) == OK
    (listed,) = metrics(served, run=run_id)
    (source,) = listed["sources"]
    resource = source["resource"]
    assert resource["long"] == "é" * 1_999 + "…"
    assert "listed" not in resource
    assert resource["short"] == 1
    assert 5 <= sum(name in resource for name in others) < 10


def test_a_page_of_metrics_ends_where_its_senders_say_much(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_catalog, "_PAGE_CHARACTERS", 3_000)
    sender = source("run", notes="x" * 1_000)
    frames = [scalar(replace(c.LOSS, name=f"loss.{n}"), [1], [1.0]) for n in range(10)]
    sent = [Received(ProcessKey("run", 1, 0, "one"), batch(sender, frames=frames), START)]
    with transaction(database) as connection:
        Registry().resolve(connection, [(sender, START)])
        store(connection, SeriesIds(), sent)
    seen: list[str] = []
    cursor, pages = None, 0
    with database.connect() as connection:
        while pages == 0 or cursor is not None:
            page = list_metrics(connection, cursor=cursor)
            seen += [each["name"] for each in page["metrics"]]
            cursor, pages = page["next_cursor"], pages + 1
    assert seen == [f"loss.{n}" for n in range(9, -1, -1)]
    assert pages == 4


def spread(buckets: int, seconds: range, **labels: Any) -> Metric:
    metric = Metric(name="spread")
    for second in seconds:
        point = metric.exponential_histogram.data_points.add(time_unix_nano=at(second), count=second)
        point.positive.bucket_counts.extend([1] * buckets)
        point.attributes.extend(attributes(labels))
    return metric


def test_large_distributions_come_in_pages(served: Collector, sdk: Client, run_id: str) -> None:
    sent = range(1, 13)
    for label in "abc":
        assert sdk.send(of(run_id, spread(250_000, sent, label=label))) == OK
    page = served.get("/api/v1/series", params={"run": run_id, "metric": "spread"}).json()
    assert [each["labels"]["label"] for each in page["series"]] == ["a", "b"]
    rest = series(served, run_id, "spread", cursor=page["next_cursor"])
    assert [each["labels"]["label"] for each in rest] == ["c"]
    seen: list[int] = []
    until: dict[str, str] = {}
    while not seen or until:
        (only,) = series(served, run_id, "spread", label="label=b", **until)
        assert 0 < len(only["points"]) < 10
        seen += [point["count"] for point in only["points"]]
        until = {"until": only["next_until"]} if only["next_until"] else {}
    assert seen == list(sent)[::-1]


def test_series_with_long_labels_come_in_pages(served: Collector, sdk: Client, run_id: str) -> None:
    for n in range(10):
        assert sdk.send(of(run_id, steps(1, n=n, text="x" * 1_000_000))) == OK
    seen: list[int] = []
    cursor: dict[str, str] = {}
    pages = 0
    while not pages or cursor:
        page = served.get("/api/v1/series", params={"run": run_id, "metric": "norm", **cursor}).json()
        seen += [each["labels"]["n"] for each in page["series"]]
        cursor = {"cursor": page["next_cursor"]} if page["next_cursor"] else {}
        pages += 1
    assert seen == list(range(10))
    assert pages == 2


def test_a_run_is_told_from_what_is_none(served: Collector, sdk: Client, run_id: str) -> None:
    started = ExportLogsServiceRequest()
    owner = started.resource_logs.add()
    owner.resource.attributes.extend(attributes({c.RUN_ID: run_id}))
    owner.scope_logs.add().log_records.add(event_name=c.RUN_STARTED.name, time_unix_nano=START)
    assert sdk.send(of(run_id, steps(1))) == sdk.send(started) == OK
    (listed,) = metrics(served, run=run_id)
    assert [source["is_run"] for source in listed["sources"]] == [True]


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("metrics?limit=0", "limit is '0'"),
        ("metrics?cursor=x", "cursor 'x'"),
        ("series?metric=norm", "metric and run must be given"),
        ("series?run=r", "metric and run must be given"),
        ("series?metric=norm&run=r&since=yesterday", "'yesterday' is no moment"),
        ("series?metric=norm&run=r&until=9999-01-01T00:00:00Z", "is not between 1970 and 2262"),
        ("series?metric=norm&run=r&since=2025-13-01T00:00:00Z", "month must be in 1..12"),
        ("series?metric=norm&run=r&rank=-1", "rank is '-1'"),
        ("series?metric=norm&run=r&attempt=99999999999", "attempt is"),
        ("series?metric=norm&run=r&points=1001", "points is '1001'"),
        ("series?metric=norm&run=r&label=layer", "'layer' is no label"),
    ],
)
def test_a_bad_query_is_the_askers_fault(served: Collector, query: str, told: str) -> None:
    answer = served.get(f"/api/v1/{query}")
    assert answer.status_code == 400
    assert told in answer.json()["error"]


def test_a_cursor_of_another_list_is_refused(served: Collector, sdk: Client, run_id: str) -> None:
    assert sdk.send(of(run_id, steps(1))) == OK
    answer = served.get("/api/v1/series", params={"run": run_id, "metric": "norm", "cursor": "123"})
    assert answer.status_code == 400
    assert "cursor '123'" in answer.json()["error"]


def test_what_nobody_sent_is_not_found(served: Collector, sdk: Client, run_id: str) -> None:
    assert sdk.send(of(run_id, steps(1))) == OK
    for run, metric in ((run_id, "other"), ("nobody", "norm"), (run_id, "nul\0"), ("nul\0", "norm")):
        answer = served.get("/api/v1/series", params={"run": run, "metric": metric})
        assert answer.status_code == 404
        assert answer.json() == {"error": "no such metric of that run"}
    assert metrics(served, run="nobody") == metrics(served, name="nothing") == []


def test_the_command_line_lists_metrics_and_who_sent_them(served: Collector, sdk: Client, run_id: str) -> None:
    counted = Metric(name=f"{run_id}.orders", unit="{order}")
    counted.sum.is_monotonic, counted.sum.aggregation_temporality = True, 2
    counted.sum.data_points.add(time_unix_nano=START, as_int=3)
    assert sdk.send(metrics_request({c.SERVICE_NAME: "shop", "n": run_id}, counted)) == OK
    listed = gradwatch("metrics", "list", "--name", counted.name, "--db", served.database)
    heading, row = listed.stdout.strip().splitlines()
    assert heading.split("  ")[0] == "METRIC"
    (source,) = metrics(served, name=counted.name)[0]["sources"]
    assert row.split("  ") == [
        counted.name,
        "cumulative monotonic sum",
        "{order}",
        f"{source['run_id']} (shop)",
    ]
    as_json = gradwatch("metrics", "list", "--name", counted.name, "--format", "json", "--db", served.database)
    assert json.loads(as_json.stdout)["metrics"] == metrics(served, name=counted.name)


def test_the_command_line_shows_points_of_any_kind(served: Collector, sdk: Client, run_id: str) -> None:
    spread = Metric(name="spread")
    spread.histogram.data_points.add(
        time_unix_nano=START, count=2, sum=3, bucket_counts=[1, 1], explicit_bounds=[2]
    )
    assert sdk.send(of(run_id, gauge("norm", (START, float("nan")), (START + 1, 0.5), layer="a"), spread)) == OK
    place = ("--run", run_id, "--db", served.database)
    shown = gradwatch("metrics", "show", "norm", *place, "--label", "layer=a").stdout.splitlines()
    assert [line.split() for line in shown] == [
        ["ATTEMPT", "RANK", "LABELS", "TIME", "VALUE"],
        ["1", "0", "layer=a", "2025-06-15T15:06:40.000000001Z", "0.5"],
        ["1", "0", "layer=a", "2025-06-15T15:06:40.000000000Z", "NaN"],
    ]
    shown = gradwatch("metrics", "show", "spread", *place).stdout.splitlines()
    assert shown[1].endswith("count=2 sum=3.0 explicit_bounds=[2.0] bucket_counts=[1, 1]")
    as_json = gradwatch("metrics", "show", "norm", *place, "--format", "json", "--points", "1")
    assert json.loads(as_json.stdout)["series"] == series(served, run_id, "norm", points="1")


def test_the_command_line_says_in_one_line_what_is_wrong(served: Collector, run_id: str) -> None:
    for arguments, told in (
        (("show", "norm"), "gradwatch metrics list"),
        (("show", "norm", "--since", "yesterday"), "no moment"),
        (("show", "norm", "--label", "x"), "no label"),
        (("list", "--cursor", "x"), "cursor"),
    ):
        done = gradwatch("metrics", *arguments, "--run", run_id, "--db", served.database)
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert told in line
