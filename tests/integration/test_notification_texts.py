"""What people read: the shipped templates, in the shipped examples of receivers, sent by Alertmanager."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gradwatch import conventions as c
from tests.mailbox import Mailbox, mailbox
from tests.prometheus_servers import (
    ALERTS,
    Configuration,
    WebhookReceiver,
    alertmanager,
    free_port,
    needs_prometheus,
    wait_for,
    webhook_receiver,
)

pytestmark = [pytest.mark.prometheus, needs_prometheus]

STARTED = datetime(2026, 3, 1, 3, 12, 44, tzinfo=UTC)
ALERT: dict[str, Any] = {
    "labels": {
        "alertname": "GradwatchNonfinite", "run_id": "r1", "rule": "nonfinite", "training_job": "resnet",
        "severity": "page", "slo_severity": "page", "tier": "production", "team": "vision",
        "owner": "ml-engineer",
    },
    "annotations": {
        "summary": "Run r1 of resnet has NaN or Inf in its steps, repeatedly",
        "description": "Stop the run. See `gradwatch runs show r1`.",
        "runbook_url": c.runbook_url("GradwatchNonfinite"),
        "dashboard_url": "http://127.0.0.1:3000/d/gradwatch-debug?var-run_id=r1",
    },
    "startsAt": STARTED.isoformat(),
}  # fmt: skip
TEXT = """\
Run r1 of resnet has NaN or Inf in its steps, repeatedly

Stop the run. See `gradwatch runs show r1`.

What to do:   https://github.com/gradwatch/gradwatch/blob/main/alerts/runbooks/GradwatchNonfinite.md
Look at it:   http://127.0.0.1:3000/d/gradwatch-debug?var-run_id=r1
Since:        2026-03-01 03:12:44 UTC
Run:          r1
Job:          resnet
Team:         vision
Tier:         production
Owner:        ml-engineer
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """Alertmanager, and where its mails and chat messages arrive."""

    url: str
    mails: Mailbox
    chat: WebhookReceiver

    def send(self, *alerts: dict[str, Any]) -> None:
        request = urllib.request.Request(
            f"{self.url}/api/v2/alerts",
            json.dumps(alerts).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=10).close()


def uncommented(text: str) -> str:
    """The shipped configuration with the examples in it that are comments."""
    return re.sub(r"^  #   ", "    ", text, flags=re.MULTILINE)


@pytest.fixture
def delivery(tmp_path: Path) -> Iterator[Delivery]:
    with mailbox() as mails, webhook_receiver() as chat:
        changes = {
            "mail.example.org:587": f"{mails.address}\n        require_tls: false",
            "https://hooks.slack.com/services/...": f"{chat.url}/chat",
            "group_interval: 10s": "group_interval: 1s",
        }
        configuration = Configuration.shipped(
            tmp_path, collector="127.0.0.1:1", webhook=chat.url, changes=changes
        )
        about = configuration.folder / "alertmanager.yaml"
        about.write_text(uncommented(about.read_text(encoding="utf-8")), encoding="utf-8")
        with alertmanager(configuration, tmp_path, f"127.0.0.1:{free_port()}") as url:
            yield Delivery(url, mails, chat)


def test_a_mail_and_a_chat_message_say_what_happened_and_what_to_do(delivery: Delivery) -> None:
    delivery.send(ALERT)
    mail = wait_for(lambda: delivery.mails.mails, what="the mail")[0]
    assert mail["Subject"] == "[PAGE] Run r1 of resnet has NaN or Inf in its steps, repeatedly"
    assert mail["To"] == "ml-engineers@example.org"
    assert mail.get_content_type() == "multipart/alternative"
    body = mail.get_body(("plain",))
    assert body is not None
    assert body.get_content().replace("\r\n", "\n").strip() == TEXT.strip()

    (message,) = wait_for(lambda: delivery.chat.bodies("chat"), what="the chat message")
    (said,) = message["attachments"]
    assert said["title"] == mail["Subject"]
    assert said["title_link"] == ALERT["annotations"]["runbook_url"]
    assert said["text"].strip() == TEXT.strip()


def test_people_are_told_that_an_alert_of_a_run_ended_and_not_that_all_is_well(
    delivery: Delivery,
) -> None:
    """A run that failed an hour ago is told of no more, and has failed all the same."""
    delivery.send(ALERT)
    wait_for(lambda: delivery.mails.mails, what="the mail")
    delivery.send({**ALERT, "endsAt": datetime.now(UTC).isoformat()})
    mail = wait_for(lambda: delivery.mails.mails[1:], what="the second mail")[0]
    assert mail["Subject"].startswith("[RESOLVED] Run r1 of resnet")
    body = mail.get_body(("plain",))
    assert body is not None
    text = body.get_content()
    assert "It is told no more since " in text
    assert "nothing is to be done" not in text
    assert "Stop the run" not in text


def test_several_alerts_in_one_notification_are_told_one_after_the_other(tmp_path: Path) -> None:
    lost = {
        "labels": {"alertname": "GradwatchCollectorDown", "severity": "ticket"},
        "annotations": {
            "summary": "No collector answers",
            "description": "It is down.",
            "runbook_url": "http://r",
        },
    }
    alerts = [{**each, "status": "firing", "startsAt": STARTED.isoformat()} for each in (ALERT, lost)]
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"status": "firing", "alerts": alerts}), encoding="utf-8")

    def rendered(template: str) -> str:
        command = ["amtool", "template", "render", f"--template.glob={ALERTS / 'templates' / '*.tmpl'}"]
        command += [f'--template.text={{{{ template "{template}" . }}}}', f"--template.data={data}"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

    assert rendered("gradwatch.title").strip() == f"[PAGE] {ALERT['annotations']['summary']} (first of 2)"
    first, second = rendered("gradwatch.text").split("-" * 40)
    assert first.strip() == TEXT.strip()
    # What an alert has not is left out.
    assert second.strip() == (
        "No collector answers\n\nIt is down.\n\nWhat to do:   http://r\nSince:        2026-03-01 03:12:44 UTC"
    )
