"""What the collector's API says of metrics, each answer checked against its schema."""

from __future__ import annotations

from typing import Any

from tests.collector_process import Collector
from tests.schemas import valid


def metrics(served: Collector, **query: str) -> list[Any]:
    """Metrics as listed."""
    return _list(served, "metrics", "metric-list", query)


def series(served: Collector, run_id: str, metric: str, **query: Any) -> list[Any]:
    """Every series of a metric of a run or other sender; keywords are further parameters."""
    return _list(served, "series", "series-list", {"run": run_id, "metric": metric, **query})


def points(served: Collector, run_id: str, metric: str, **query: Any) -> list[Any]:
    """The points of the one series that a metric has, newest first."""
    (only,) = series(served, run_id, metric, **query)
    found: list[Any] = only["points"]
    return found


def _list(served: Collector, name: str, schema: str, query: dict[str, Any]) -> list[Any]:
    answer = served.get(f"/api/v1/{name}", params=query)
    assert answer.status_code == 200, answer.text
    found: list[Any] = valid(answer.json(), schema)[name]
    return found
