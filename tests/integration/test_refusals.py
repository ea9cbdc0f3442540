"""Whatever the collector refuses is counted, by reason, whoever refused it."""

from __future__ import annotations

from collections import Counter

import requests
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine

from gradwatch import conventions as c
from tests.collector_process import Collector, collector


def refused(running: Collector) -> Counter[str]:
    """How many requests were refused, by reason."""
    return Counter(
        {
            sample.labels["reason"]: int(sample.value)
            for family in text_string_to_metric_families(running.get("/metrics").text)
            for sample in family.samples
            if sample.name == c.COLLECTOR_REJECTED.name and sample.value
        }
    )


def test_what_the_router_and_the_api_refuse_is_counted(database: Engine, database_url: str) -> None:
    asked = [
        ("POST", "/api/v1/runs", 405, "unsupported"),
        ("GET", "/v1/metrics", 405, "unsupported"),
        ("GET", "/v1/nothing", 404, "unsupported"),
        ("GET", "/api/v1/runs?limit=0", 400, "malformed"),
        ("GET", "/api/v1/runs?cursor=x", 400, "malformed"),
        ("GET", "/api/v1/metrics?limit=x", 400, "malformed"),
        ("GET", "/api/v1/series?run=r", 400, "malformed"),
        ("GET", "/api/v1/series?run=r&metric=m&limit=1001", 400, "malformed"),
        ("GET", "/api/v1/series?run=r&metric=m&since=x", 400, "malformed"),
    ]
    with collector(database_url) as running:
        for method, path, status, reason in asked:
            before = refused(running)
            answer = requests.request(method, running.url + path, timeout=10)
            assert (answer.status_code, refused(running) - before) == (status, {reason: 1}), path
        before = refused(running)
        for path in ("/api/v1/runs/nobody", "/api/v1/series?run=nobody&metric=nothing"):
            assert running.get(path).status_code == 404
        assert refused(running) == before
        with database.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE metric RENAME TO elsewhere")
        answer = running.get("/api/v1/metrics")
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert (refused(running) - before)["unavailable"] >= 1
