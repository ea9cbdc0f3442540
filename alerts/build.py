"""Build the Prometheus alerting rules; every name comes from ``gradwatch.conventions``.

python alerts/build.py            writes rules/gradwatch.rules.yaml beside this file
python alerts/build.py --check    fails when the committed file is not what this builds

Point the links in the notifications at your own pages with ``--runbook-url`` and ``--grafana-url``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import yaml
from alert import Alert
from finding_alerts import FINDINGS
from service import SERVICE
from success_rate import SUCCESS_RATE

from gradwatch import conventions as names

RULES_FILE: Final = Path(__file__).parent / "rules" / "gradwatch.rules.yaml"
GRAFANA_URL: Final = "http://127.0.0.1:3000"

GROUPS: Final = (FINDINGS, SUCCESS_RATE, SERVICE)


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
    rule["labels"] = {**dict(alert.labels), "slo_severity": alert.slo_severity, "owner": alert.owner}
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
