"""Queries of Grafana's PostgreSQL data source, which its SDK has no types for, and what they have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models.common import DataSourceRef

# Its name before Grafana 10, which later ones still answer to.
PLUGIN: Final = "postgres"
VARIABLE: Final = "postgres_datasource"
DATASOURCE: Final = DataSourceRef(type_val=PLUGIN, uid=f"${{{VARIABLE}}}")

# Filter of a dashboard -> column of `run`.
COLUMNS: Final = {
    "team": "run.team",
    "tier": "run.tier",
    "training_job": "run.job",
    "model": "run.model",
    "dataset": "run.dataset",
    "run_id": "run.run_id",
}


@dataclass(frozen=True, slots=True)
class SqlQuery(Builder[Dataquery], Dataquery):
    """One query. As ``time_series`` it has a column ``time``; columns of text name its series."""

    sql: str
    ref_id: str
    format: Literal["table", "time_series"]

    def build(self) -> Self:
        """Return itself: there is nothing left to build."""
        return self

    def to_json(self) -> dict[str, Any]:
        """Return it as Grafana stores it."""
        return {
            "datasource": DATASOURCE,
            "editorMode": "code",
            "format": self.format,
            "rawQuery": True,
            "rawSql": self.sql,
            "refId": self.ref_id,
        }


def literal(text: str) -> str:
    """A string in SQL."""
    escaped = text.replace("'", "''")
    return f"'{escaped}'"


def chosen(*filters: str) -> str:
    """Condition on `run`: it is among what the dashboard's filters let through (all of them unless told).

    Names are the senders' own. Between dollars, whatever is in one is text: escaped for a regular expression,
    it cannot hold two dollars in a row. Quotes would not do, as "All" is inserted as it is.
    """
    wanted = filters or tuple(reversed(COLUMNS))
    return " AND ".join(rf"coalesce({COLUMNS[label]}, '') ~ $$\A(${{{label}:regex}})\Z$$" for label in wanted)


# The run that a panel about a single one shows, if the filters let several through.
THE_RUN: Final = f"(SELECT run_id FROM run WHERE {chosen()} ORDER BY started_at DESC LIMIT 1)"
# What a panel about several shows: those that were there at the time, the last heard of before the others.
THESE_RUNS: Final = (
    f"(SELECT run_id FROM run WHERE {chosen()}"
    " AND started_at <= $__unixEpochNanoTo() AND last_seen_at >= $__unixEpochNanoFrom()"
    " ORDER BY last_seen_at DESC LIMIT 100)"
)


def told(runs: str, *fields: tuple[str, str]) -> str:
    """`FROM` and `WHERE` for the values of fields of metrics within the dashboard's time, one row each."""
    wanted = ", ".join(f"({literal(metric)}, {literal(field)})" for metric, field in fields)
    return (
        f"FROM trend WHERE run_id IN {runs} AND (metric, field) IN ({wanted})"
        " AND since <= $__unixEpochNanoTo() AND until >= $__unixEpochNanoFrom()"
        " AND $__unixEpochNanoFilter(nanos)"
    )


def moment(nanos: str, name: str) -> str:
    """A column of Unix nanoseconds as a time that Grafana knows as one."""
    return f"to_timestamp({nanos} / 1e9) AS {name}"
