"""For whoever is on call: which run is sick, since when, and is the service itself well."""

from __future__ import annotations

from typing import Final

from links import ON_CALL
from panels import (
    JOB_LEGEND,
    RUN_LEGEND,
    Dashboard,
    Panel,
    Query,
    Row,
    equal,
    newest,
    or_zero,
    over_replicas,
)
from runs import FINDING_MARKS, NO_RUN, memory_headroom, nonfinite_steps
from stored import CHECKPOINT_MARKS, checkpoints, collectives_of_runs, nonfinite_log
from variables import select

from gradwatch import conventions as names

_ENDED_BADLY: Final = newest(names.RUN_INFO, 'status=~"failed|lost"')
_RUNNING: Final = newest(names.RUN_INFO, equal("status", "running"))
_NO_COLLECTOR: Final = "No collector is scraped"
_QUEUE_FILLED: Final = f"max({names.COLLECTOR_QUEUE_BYTES.name} / {names.COLLECTOR_QUEUE_LIMIT.name})"


def _rate(family: names.Family, label: str) -> str:
    # Each replica counts its own requests.
    return f"sum by ({label}) (rate({family.name}[$__rate_interval]))"


def _commit_quantile(quantile: float) -> str:
    buckets = f"{names.COLLECTOR_COMMIT_DURATION.name}_bucket"
    return f"histogram_quantile({quantile}, sum by (le) (rate({buckets}[$__rate_interval])))"


def _open(severity: str) -> str:
    return or_zero(f"sum({newest(names.FINDING_ACTIVE, equal('severity', severity))})")


_NOW: Final = Row(
    "Now",
    (
        Panel(
            kind="stat",
            title="Open pages",
            description="Open findings that wake somebody: production runs only.",
            unit="none",
            empty=_NO_COLLECTOR,
            queries=(Query(_open("page")),),
            width=4,
            height=4,
            thresholds=((1, "red"),),
        ),
        Panel(
            kind="stat",
            title="Open tickets",
            description="Open findings that can wait for the morning.",
            unit="none",
            empty=_NO_COLLECTOR,
            queries=(Query(_open("ticket")),),
            width=4,
            height=4,
            thresholds=((1, "yellow"),),
        ),
        Panel(
            kind="stat",
            title="Failed or lost",
            description="Runs that failed or were lost within the last hour.",
            unit="none",
            empty=_NO_COLLECTOR,
            queries=(Query(or_zero(f"count({_ENDED_BADLY})")),),
            runbook=names.RULE_ALERTS[names.RULE_RUN_FAILED],
            width=4,
            height=4,
            thresholds=((1, "red"),),
        ),
        Panel(
            kind="stat",
            title="Live runs",
            description="Runs that are live now.",
            unit="none",
            empty=_NO_COLLECTOR,
            queries=(Query(or_zero(f"sum({newest(names.RUNS_LIVE)})")),),
            width=4,
            height=4,
            base="blue",
        ),
        Panel(
            kind="stat",
            title="Last evaluation",
            description="How long ago runs, findings and objectives were evaluated. Above a minute the rest of"
            " this page is the past.",
            unit="s",
            empty=_NO_COLLECTOR,
            queries=(Query(f"time() - max({names.COLLECTOR_EVALUATED_TIMESTAMP.name})"),),
            runbook="GradwatchEvaluatorStale",
            width=8,
            height=4,
            thresholds=((30, "yellow"), (60, "red")),
        ),
        Panel(
            kind="table",
            title="Open findings",
            description="Each open finding; its runbook has the alert's name. The run leads to its debug page.",
            unit="none",
            empty="Nothing is wrong",
            queries=(Query(f"{newest(names.FINDING_ACTIVE)} == 1"),),
            width=12,
        ),
        Panel(
            kind="table",
            title="Failing jobs",
            description="Runs that failed or were lost within the last hour, and why. The run leads to its"
            " debug page.",
            unit="none",
            empty="No run failed or was lost within the last hour",
            queries=(Query(_ENDED_BADLY),),
            runbook=names.RULE_ALERTS[names.RULE_RUN_FAILED],
            width=12,
        ),
    ),
)

_RUNS: Final = Row(
    "Runs",
    (
        nonfinite_steps(width=12),
        memory_headroom(width=12),
        nonfinite_log(),
        collectives_of_runs(width=12),
        checkpoints(width=12),
        Panel(
            kind="timeseries",
            title="Silence",
            description="Time since the last sign of life of each run that is running. Agents speak every 5 s.",
            unit="s",
            empty=NO_RUN,
            queries=(
                Query(
                    f"time() - {newest(names.RUN_LAST_SEEN_TIMESTAMP)} and on (run_id) {_RUNNING}", RUN_LEGEND
                ),
            ),
            runbook=names.RULE_ALERTS[names.RULE_RUN_LOST],
            width=12,
            thresholds=((15, "yellow"), (30, "red")),
            least=0,
        ),
        Panel(
            kind="timeseries",
            title="Findings opened",
            description="Findings opened, by rule.",
            unit="none",
            empty="No job in this selection",
            queries=(
                Query(
                    "sum by (rule)"
                    f" ({over_replicas(f'increase({select(names.FINDINGS_OPENED)}[$__rate_interval])')})",
                    "{{rule}}",
                ),
            ),
            width=12,
            least=0,
            bars=True,
        ),
        Panel(
            kind="timeseries",
            title="Live runs by job",
            description="A job that drops to zero while it should train is worth a look.",
            unit="none",
            empty="No job in this selection",
            queries=(Query(newest(names.RUNS_LIVE), JOB_LEGEND),),
            width=24,
            least=0,
        ),
    ),
)

_COLLECTOR: Final = Row(
    "Collector",
    (
        Panel(
            kind="timeseries",
            title="Received and committed",
            description="Items received over OTLP and items committed to the database, by signal. The two"
            " lines of a signal part when telemetry is not stored.",
            unit="cps",
            empty=_NO_COLLECTOR,
            queries=(
                Query(_rate(names.COLLECTOR_RECEIVED, "signal"), "received {{signal}}"),
                Query(_rate(names.COLLECTOR_COMMITTED, "signal"), "committed {{signal}}"),
            ),
            width=12,
            least=0,
        ),
        Panel(
            kind="timeseries",
            title="Rejected",
            description="Requests the collector refused, by reason, and items of requests it took in part.",
            unit="cps",
            empty="No request was refused",
            queries=(
                Query(_rate(names.COLLECTOR_REJECTED, "reason"), "{{reason}}"),
                Query(_rate(names.COLLECTOR_REJECTED_ITEMS, "signal"), "items of {{signal}}"),
            ),
            runbook="GradwatchCollectorRejecting",
            width=12,
            least=0,
        ),
        Panel(
            kind="timeseries",
            title="Commit duration",
            description="Time of one group commit. Senders wait for it: the reply leaves after the commit.",
            unit="s",
            empty=_NO_COLLECTOR,
            queries=(Query(_commit_quantile(0.5), "p50"), Query(_commit_quantile(0.99), "p99")),
            width=12,
            least=0,
        ),
        Panel(
            kind="timeseries",
            title="Queue depth",
            description="Requests waiting for a commit.",
            unit="none",
            empty=_NO_COLLECTOR,
            queries=(Query(f"sum({names.COLLECTOR_QUEUE_DEPTH.name})", "waiting"),),
            width=12,
            least=0,
        ),
        Panel(
            kind="timeseries",
            title="Queue filled",
            description="How much of the memory for requests those hold that arrive or wait for a commit, in"
            " the fullest replica. At 100 % further ones are put off, and agents keep them.",
            unit="percentunit",
            empty=_NO_COLLECTOR,
            queries=(Query(_QUEUE_FILLED, "filled"),),
            runbook="GradwatchCollectorQueueFull",
            width=8,
            least=0,
        ),
        Panel(
            kind="timeseries",
            title="Connections",
            description="Open HTTP connections, and connections to the database that are in use.",
            unit="none",
            empty=_NO_COLLECTOR,
            queries=(
                Query(f"sum({names.COLLECTOR_CONNECTIONS.name})", "HTTP"),
                Query(f"sum({names.COLLECTOR_DATABASE_CONNECTIONS.name})", "database"),
            ),
            width=8,
            least=0,
        ),
        Panel(
            kind="timeseries",
            title="Database size",
            description="What the database takes up.",
            unit="bytes",
            empty=_NO_COLLECTOR,
            queries=(Query(f"max({names.COLLECTOR_DATABASE_SIZE.name})", "size"),),
            width=8,
            least=0,
        ),
    ),
)

ON_CALL_DASHBOARD: Final = Dashboard(
    uid=ON_CALL,
    title="gradwatch / On-call",
    description="Which run is sick, since when, and is the service itself well.",
    since="now-1h",
    refresh="10s",
    rows=(_NOW, _RUNS, _COLLECTOR),
    annotations=(FINDING_MARKS, CHECKPOINT_MARKS),
)
