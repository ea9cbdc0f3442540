"""Alerts about the service itself: who watches must be watched."""

from __future__ import annotations

from typing import Final

from alert import NONE, PAGE, TICKET, Alert, Group, over_replicas

from gradwatch import conventions as names

# The scrape job of prometheus.yaml: `up` is the one series that only Prometheus can make.
SCRAPE_JOB: Final = "gradwatch-collector"

# A restart takes seconds, and runs are lost only after 30 s of silence while a collector is up.
COLLECTOR_GRACE: Final = "1m"
# Findings are evaluated every few seconds, so a minute is many evaluations missed.
EVALUATOR_STALE_SECONDS: Final = 60
# Requests are refused when the queue is full; until then there is time to act.
QUEUE_NEARLY_FULL: Final = 0.8
# Single requests go wrong all the time: scanners, a client of another age.
REJECTED_REQUESTS: Final = 5
REJECTED_WITHIN: Final = "5m"
# How far back a production run makes the absence of its collector worth waking somebody.
PRODUCTION_LOOKBACK: Final = "6h"

_no_collector = f'absent(up{{job="{SCRAPE_JOB}"}} == 1)'
_evaluation_age = f"time() - {over_replicas(names.COLLECTOR_EVALUATED_TIMESTAMP.name)}"
_stale = f"{_evaluation_age} > {EVALUATOR_STALE_SECONDS}"
_queue = over_replicas(f"{names.COLLECTOR_QUEUE_BYTES.name} / {names.COLLECTOR_QUEUE_LIMIT.name}")
_production_live = (
    f'sum(max_over_time({names.RUNS_LIVE.name}{{tier="{names.TIER_PRODUCTION}"}}[{PRODUCTION_LOOKBACK}])) > 0'
)


def _of_the_service(
    name: str, condition: str, *, summary: str, description: str, hold: str
) -> tuple[Alert, Alert]:
    # Only production pages: the service wakes somebody when it leaves production runs unwatched.
    page = Alert(
        name=name,
        expr=f"({condition}) and on () ({_production_live})",
        summary=f"{summary}; production runs are not watched",
        description=description,
        labels=(("severity", PAGE), ("tier", names.TIER_PRODUCTION)),
        dashboard="gradwatch-oncall",
        slo_severity=PAGE,
        hold=hold,
    )
    ticket = Alert(
        name=name,
        expr=f"({condition}) unless on () ({_production_live})",
        summary=summary,
        description=description,
        labels=(("severity", TICKET),),
        dashboard="gradwatch-oncall",
        slo_severity=PAGE,
        hold=hold,
    )
    return page, ticket


SERVICE: Final = Group(
    "gradwatch-service",
    (
        *_of_the_service(
            "GradwatchCollectorDown",
            _no_collector,
            summary="No collector answers Prometheus",
            description=f"No target of the scrape job `{SCRAPE_JOB}` is up: runs, findings and objectives are"
            " unknown. Training itself goes on.",
            hold=COLLECTOR_GRACE,
        ),
        *_of_the_service(
            "GradwatchEvaluatorStale",
            _stale,
            summary="The collector has stopped evaluating",
            description="Runs, findings and objectives were last evaluated {{ $value | humanizeDuration }} ago:"
            " telemetry is stored, but nothing new will alert.",
            hold="30s",
        ),
        *_of_the_service(
            "GradwatchCollectorQueueFull",
            f"{_queue} > {QUEUE_NEARLY_FULL}",
            summary="The collector takes in more than it can commit",
            description="The requests that arrive or wait for a commit hold {{ $value | humanizePercentage }}"
            " of the memory there is for them. Further ones are put off; agents keep them on disk and send"
            " them again.",
            hold="2m",
        ),
        Alert(
            name="GradwatchCollectorRejecting",
            expr=f"sum by (reason) (increase({names.COLLECTOR_REJECTED.name}[{REJECTED_WITHIN}]))"
            f" > {REJECTED_REQUESTS}",
            summary="The collector refuses requests: {{ $labels.reason }}",
            description='{{ $value | printf "%.0f" }} requests were refused within '
            f"{REJECTED_WITHIN} for the reason"
            ' "{{ $labels.reason }}".',
            labels=(("severity", TICKET),),
            dashboard="gradwatch-oncall",
            hold="5m",
        ),
        Alert(
            name="GradwatchWatchdog",
            expr="vector(1)",
            summary="Alerting works",
            description="Always firing. Route it to a dead man's switch, which alerts when it stops arriving.",
            slo_severity=NONE,
            labels=(("severity", NONE),),
            dashboard="gradwatch-oncall",
        ),
    ),
)
