"""What a dashboard is asked with: its data sources, its filters, and the addresses that its links lead to."""

from __future__ import annotations

from typing import Final

import postgres
from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.common import DataSourceRef
from grafana_foundation_sdk.models.dashboard import VariableOption, VariableRefresh, VariableSort

from gradwatch import conventions as names

PROMETHEUS: Final = "prometheus_datasource"
PROMETHEUS_DATASOURCE: Final = DataSourceRef(type_val="prometheus", uid=f"${{{PROMETHEUS}}}")

# The labels that every dashboard filters by, widest first: each list narrows the next one.
FILTERS: Final = ("team", "tier", "training_job", "model", "dataset", "run_id")
METRIC_FILTER: Final = "metric"
EPOCH_STEPS: Final = "epoch_steps"
# Team, model and data set may be unknown, and an objective need not be grouped by any of them: such series have
# the label empty, and `.+` would hide them.
ALL: Final = ".*"

# Constants: an address that came with a link could lead anywhere.
COLLECTOR: Final = "collector"
RUNBOOKS: Final = "runbooks"
COLLECTOR_URL: Final = "http://127.0.0.1:4318"

_LABELS: Final = {"training_job": "Job", "run_id": "Run"}
_MOST: Final = 1000


def select(family: names.Family, *matchers: str) -> str:
    """The family's series within the dashboard's filters, as far as it has those labels."""
    filters = [f'{label}=~"${label}"' for label in FILTERS if label in family.labels]
    return f"{family.name}{{{', '.join((*matchers, *filters))}}}"


def data_sources() -> list[dashboard.DatasourceVariable]:
    """The two that can be chosen; dashboard-linter asks for these names."""
    return [
        dashboard.DatasourceVariable(PROMETHEUS).label("Prometheus data source").type("prometheus"),
        dashboard.DatasourceVariable(postgres.VARIABLE).label("Postgres data source").type(postgres.PLUGIN),
    ]


def filters() -> list[dashboard.QueryVariable]:
    """Filters that offer what Prometheus knows: jobs that ran of late, runs that are live or sick."""
    return [_of_prometheus(label, FILTERS[:index]) for index, label in enumerate(FILTERS)]


def stored_filters() -> list[dashboard.QueryVariable]:
    """The same, and they offer what the database knows: every run, the newest first."""
    return [_of_postgres(label, FILTERS[:index]) for index, label in enumerate(FILTERS)]


def metric_filter() -> dashboard.QueryVariable:
    """Chooses among the metrics given to `watch.log`."""
    query = f"label_values({select(names.LAST_METRIC)}, name)"
    return _query(METRIC_FILTER, query, PROMETHEUS_DATASOURCE).query({"query": query, "refId": "A"})


def epoch_steps() -> dashboard.TextBoxVariable:
    """Nobody tells how many steps an epoch has, so people say it."""
    return (
        dashboard.TextBoxVariable(EPOCH_STEPS)
        .label("Steps of an epoch")
        .default_value("1000")
        .current(VariableOption(selected=True, text="1000", value="1000"))
    )


def addresses() -> list[dashboard.ConstantVariable]:
    """Where links lead: to the collector as a browser reaches it, and to the folder of runbooks.

    `gradwatch dashboards export` sets them.
    """
    return [
        _address(COLLECTOR, "Collector", COLLECTOR_URL),
        _address(RUNBOOKS, "Runbooks", names.RUNBOOK_BASE_URL),
    ]


def _address(name: str, label: str, url: str) -> dashboard.ConstantVariable:
    variable = dashboard.ConstantVariable(name).label(label).value(url)
    variable.build().skip_url_sync = True  # there is no method for it
    return variable


def _of_prometheus(label: str, wider: tuple[str, ...]) -> dashboard.QueryVariable:
    # Every job has RUNS_LIVE, 0 when it is idle; only runs that are live or sick have RUN_INFO.
    family = names.RUN_INFO if label == "run_id" else names.RUNS_LIVE
    narrowed = ", ".join(f'{name}=~"${name}"' for name in wider)
    query = f"label_values({family.name}{{{narrowed}}}, {label})"
    variable = _query(label, query, PROMETHEUS_DATASOURCE)
    return variable.query({"query": query, "refId": "A"}).sort(VariableSort.ALPHABETICAL_ASC)


def _of_postgres(label: str, wider: tuple[str, ...]) -> dashboard.QueryVariable:
    column = postgres.COLUMNS[label]
    narrowed = f" AND {postgres.chosen(*wider)}" if wider else ""
    where = f"FROM run WHERE {column} IS NOT NULL{narrowed}"
    if label == "run_id":
        query = f"SELECT {column} {where} ORDER BY run.started_at DESC LIMIT {_MOST}"
    else:
        query = f"SELECT DISTINCT {column} {where} ORDER BY 1 LIMIT {_MOST}"
    return _query(label, query, postgres.DATASOURCE).query(query).sort(VariableSort.DISABLED)


def _query(name: str, query: str, datasource: DataSourceRef) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(_LABELS.get(name, name.capitalize()))
        .datasource(datasource)
        .definition(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(ALL)
        .current(VariableOption(selected=True, text=["All"], value=["$__all"]))
    )
