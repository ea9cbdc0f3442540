"""Where panels lead: to one run, on its dashboard and on the collector's own page, and to runbooks."""

from __future__ import annotations

from typing import Final

import postgres
from variables import COLLECTOR, PROMETHEUS, RUNBOOKS

from gradwatch import conventions as names

EXECUTIVE: Final = "gradwatch-executive"
ON_CALL: Final = "gradwatch-oncall"
DEBUG: Final = "gradwatch-debug"
RUN: Final = "gradwatch-run"

_KEPT: Final = f"${{__url_time_range}}&${{{PROMETHEUS}:queryparam}}&${{{postgres.VARIABLE}:queryparam}}"


def of_run(run_id: str) -> list[dict[str, object]]:
    """Links to a run; ``run_id`` is Grafana's expression for its id."""
    return [
        _link("This run", f"/d/{RUN}?var-run_id={run_id}&{_KEPT}"),
        _link("Debug this run", f"/d/{DEBUG}?var-run_id={run_id}&{_KEPT}"),
        _link("Run page of the collector", f"${{{COLLECTOR}:raw}}/runs/{run_id}"),
    ]


def of_alert(alert: str) -> str:
    """Address of an alert's runbook."""
    return names.runbook_url(alert, f"${{{RUNBOOKS}:raw}}")


def of_rule() -> dict[str, object]:
    """Link from a rule that is shown by the name of its alert (`rule_names`) to the runbook."""
    return _link("Runbook", of_alert("${__value.text}"))


def rule_names() -> dict[str, dict[str, str]]:
    """What rules are shown as: the name of the alert, which is the runbook's as well."""
    return {rule: {"text": alert} for rule, alert in names.RULE_ALERTS.items()}


def _link(title: str, url: str) -> dict[str, object]:
    return {"title": title, "url": url, "targetBlank": not url.startswith("/d/")}
