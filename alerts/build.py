"""Build the Prometheus alerting rules; every name comes from ``gradwatch.conventions``.

python alerts/build.py            writes rules/gradwatch.rules.yaml beside this file
python alerts/build.py --check    fails when the committed file is not what this builds

Point the links in the notifications at your own pages with ``--runbook-url`` and ``--grafana-url``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from gradwatch import conventions as names

RULES_FILE: Final = Path(__file__).parent / "rules" / "gradwatch.rules.yaml"
GRAFANA_URL: Final = "http://127.0.0.1:3000"

# The scrape job of prometheus.yaml: `up` is the one series that only Prometheus can make.
SCRAPE_JOB: Final = "gradwatch-collector"

# A collector that is away must not resolve its findings and raise them again when it is back: a restart with
# a migration stays well below this. It only delays the notification that a finding is resolved.
KEEP_FIRING_FOR: Final = "2m"
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
# The contract's bar for an alert on few events: exact binomial test, and never on a single bad run.
BUDGET_P_VALUE: Final = 0.01
BUDGET_LEAST_BAD: Final = 2

PAGE: Final = "page"
TICKET: Final = "ticket"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alerting rule: ``labels`` add to those of the expression, ``dashboard`` is a path in Grafana."""

    name: str
    expr: str
    summary: str
    description: str
    dashboard: str
    labels: tuple[tuple[str, str], ...] = ()
    hold: str | None = None
    keep_firing_for: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Rules that are evaluated together, in this order."""

    name: str
    alerts: tuple[Alert, ...]


def over_replicas(selector: str) -> str:
    """The highest value over the collector's replicas, which all report the same findings: one alert."""
    return f"max without ({', '.join(names.REPLICA_LABELS)}) ({selector})"


def _finding(rule: str, *, summary: str, description: str) -> Alert:
    # The collector has already decided the severity, from the evidence and the tier: the series carries it.
    series = f'{names.FINDING_ACTIVE.name}{{rule="{rule}", severity=~"{PAGE}|{TICKET}"}}'
    return Alert(
        name=names.RULE_ALERTS[rule],
        expr=f"{over_replicas(series)} == 1",
        summary=summary,
        description=description,
        dashboard="gradwatch-debug?var-run_id={{ $labels.run_id | urlquery }}",
        keep_firing_for=KEEP_FIRING_FOR,
    )


_REASON: Final = (
    f'{{{{ with printf "{names.RUN_INFO.name}{{run_id=%q}}" $labels.run_id | query }}}}'
    ' ({{ . | first | label "reason" }}){{ end }}'
)

# Failed and lost come first: when a run dies with smaller findings open, Alertmanager hears of the death
# before it hears of them, and sends one notification.
RUNS: Final = Group(
    "gradwatch-runs",
    (
        _finding(
            names.RULE_RUN_FAILED,
            summary="Run {{ $labels.run_id }} of {{ $labels.training_job }} failed",
            description=f"The latest attempt of the run ended as failed{_REASON} and will not be retried."
            " See `gradwatch runs show {{ $labels.run_id }}`.",
        ),
        _finding(
            names.RULE_RUN_LOST,
            summary="Run {{ $labels.run_id }} of {{ $labels.training_job }} fell silent",
            description="No rank of the run has sent a sign of life within the limit, and none said it ended:"
            " killed, out of host memory, node gone or cut off."
            " See `gradwatch runs show {{ $labels.run_id }}`.",
        ),
        _finding(
            names.RULE_TELEMETRY_OUTAGE,
            summary="Run {{ $labels.run_id }} of {{ $labels.training_job }} and many others"
            " fell silent at once",
            description="At least five runs, and more than a fifth of those that were live, stopped sending"
            " within 10 s: suspect the network, a proxy or a shared host. None of them is called lost yet."
            " See their names in `gradwatch runs show {{ $labels.run_id }}`.",
        ),
        _finding(
            names.RULE_NONFINITE,
            summary="Run {{ $labels.run_id }} of {{ $labels.training_job }} has NaN or Inf in its"
            f' {{{{ if eq $labels.severity "{PAGE}" }}}}steps, repeatedly{{{{ else }}}}steps{{{{ end }}}}',
            description="The loss or a gradient was not finite. The first step and layer are in"
            " `gradwatch runs show {{ $labels.run_id }}`.",
        ),
        _finding(
            names.RULE_MEMORY_HEADROOM,
            summary="Run {{ $labels.run_id }} of {{ $labels.training_job }} is close to running out of memory",
            description="The peak of the run's tightest device (of the host, for a run without devices) leaves"
            " little below the limit. See `gradwatch runs show {{ $labels.run_id }}`.",
        ),
    ),
)

_success_rate = f'slo="{names.SLO_TRAINING_SUCCESS_RATE}"'
_p_value = over_replicas(f"{names.SLO_P_VALUE.name}{{{_success_rate}}}")
_bad = over_replicas(f'{names.SLO_EVENTS.name}{{{_success_rate}, quality="bad"}}')

OBJECTIVES: Final = Group(
    "gradwatch-objectives",
    (
        Alert(
            name="GradwatchSuccessRateBudget",
            expr=f"{_p_value} < {BUDGET_P_VALUE} and ignoring (quality) {_bad} >= {BUDGET_LEAST_BAD}",
            summary="More training runs{{ with $labels.training_job }} of {{ . }}{{ end }}"
            "{{ with $labels.tier }} in tier {{ . }}{{ end }} fail than {{ $labels.slo }} allows",
            description="With the objective's target true, as many bad runs as in its window would be seen"
            ' with probability {{ $value | printf "%.2g" }}. See `gradwatch slo report`.',
            labels=(("severity", TICKET),),
            dashboard="gradwatch-executive",
            keep_firing_for=KEEP_FIRING_FOR,
        ),
    ),
)

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
        hold=hold,
    )
    ticket = Alert(
        name=name,
        expr=f"({condition}) unless on () ({_production_live})",
        summary=summary,
        description=description,
        labels=(("severity", TICKET),),
        dashboard="gradwatch-oncall",
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
            labels=(("severity", "none"),),
            dashboard="gradwatch-oncall",
        ),
    ),
)

GROUPS: Final = (RUNS, OBJECTIVES, SERVICE)


def render(*, runbook_url: str = names.RUNBOOK_BASE_URL, grafana_url: str = GRAFANA_URL) -> str:
    """The rule file as YAML text, with the links below the two absolute URLs."""
    document = {
        "groups": [
            {"name": group.name, "rules": [_rule(alert, runbook_url, grafana_url) for alert in group.alerts]}
            for group in GROUPS
        ]
    }
    header = "# Built by alerts/build.py: change that, not this file.\n"
    return header + yaml.safe_dump(document, sort_keys=False, width=10_000)


def _rule(alert: Alert, runbook_url: str, grafana_url: str) -> dict[str, object]:
    rule: dict[str, object] = {"alert": alert.name, "expr": alert.expr}
    if alert.hold:
        rule["for"] = alert.hold
    if alert.keep_firing_for:
        rule["keep_firing_for"] = alert.keep_firing_for
    if alert.labels:
        rule["labels"] = dict(alert.labels)
    rule["annotations"] = {
        "summary": alert.summary,
        "description": alert.description,
        "runbook_url": names.runbook_url(alert.name, runbook_url),
        "dashboard_url": f"{grafana_url.rstrip('/')}/d/{alert.dashboard}",
    }
    return rule


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the rule file, or with ``--check`` compare it; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the Prometheus alerting rules.")
    parser.add_argument(
        "--runbook-url", default=names.RUNBOOK_BASE_URL, help="absolute URL of the folder of runbooks"
    )
    parser.add_argument("--grafana-url", default=GRAFANA_URL, help="absolute URL of Grafana")
    parser.add_argument("--output", type=Path, default=RULES_FILE, help="rule file to write or compare")
    parser.add_argument("--check", action="store_true", help="fail when the file differs, and write nothing")
    options = parser.parse_args(arguments)
    text = render(runbook_url=options.runbook_url, grafana_url=options.grafana_url)
    if options.check:
        if not options.output.is_file() or options.output.read_text(encoding="utf-8") != text:
            print(f"{options.output} is out of date: run python alerts/build.py", file=sys.stderr)
            return 1
        return 0
    options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
