"""From a finding on /metrics to a webhook, through real servers with the shipped configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from gradwatch import conventions as names
from tests.prometheus_servers import (
    Configuration,
    MetricsSource,
    Notification,
    Prometheus,
    WebhookReceiver,
    alertmanager,
    free_port,
    metrics_source,
    needs_prometheus,
    prometheus,
    wait_for,
    webhook_receiver,
)

pytestmark = [pytest.mark.prometheus, needs_prometheus]

JOB = "resnet"


# What the shipped configuration waits for, sped up for tests.
FASTER = {
    "_interval: 2s": "_interval: 1s",
    "keep_firing_for: 2m": "keep_firing_for: 8s",
    "group_interval: 10s": "group_interval: 1s",
    "group_interval: 5m": "group_interval: 1s",
    "  for: 30s": "  for: 4s",
}


@dataclass(frozen=True, slots=True)
class Stack:
    """A /metrics that the test decides, Prometheus, and the people Alertmanager tells."""

    source: MetricsSource
    prometheus: Prometheus
    people: WebhookReceiver

    def find(
        self, run_id: str, rule: str, severity: str, *, tier: str = names.TIER_PRODUCTION, active: bool = True
    ) -> None:
        """Open a finding, or with ``active=False`` resolve it."""
        labels = {"run_id": run_id, "rule": rule, "severity": severity, "tier": tier, "training_job": JOB}
        if active:
            self.source.set(names.FINDING_ACTIVE, 1, **labels)
        else:
            self.source.remove(names.FINDING_ACTIVE, **labels)

    def wait_until_told(self, receiver: str, run_id: str, *, status: str = "firing", rule: str) -> Notification:
        """Wait for a notification about a finding of a run and return the first."""
        told = wait_for(
            lambda: self.people.got(receiver, status, run_id=run_id, rule=rule),
            what=f"{receiver} to hear that {rule} of {run_id} is {status}",
        )
        return told[0]

    def settle(self) -> None:
        """Let several evaluations and group intervals pass: whatever was to be sent has been sent."""
        self.prometheus.wait_for_evaluations(3)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("alerting")
    listen = f"127.0.0.1:{free_port()}"
    with metrics_source() as source, webhook_receiver() as people:
        configuration = Configuration.shipped(
            folder, collector=source.address, alertmanager=listen, webhook=people.url, changes=FASTER
        )
        with alertmanager(configuration, folder, listen), prometheus(configuration, folder) as server:
            server.wait_for_alertmanager()
            yield Stack(source, server, people)


def test_a_failed_production_run_is_one_page_even_when_the_collector_restarts(stack: Stack) -> None:
    stack.source.set(names.RUN_INFO, 1, run_id="r-page", training_job=JOB, status="failed", reason="ValueError")
    stack.find("r-page", names.RULE_RUN_FAILED, "page")
    page = stack.wait_until_told("page", "r-page", rule=names.RULE_RUN_FAILED)
    assert page.labels["severity"] == "page"
    assert page.labels["training_job"] == JOB
    assert not {"job", "instance"} & page.labels.keys()
    assert page.annotations["summary"] == "Run r-page of resnet failed"
    assert "ValueError" in page.annotations["description"]

    stack.find("r-page", names.RULE_RUN_FAILED, "page", active=False)
    stack.prometheus.wait_for_evaluations(2)
    stack.find("r-page", names.RULE_RUN_FAILED, "page")
    stack.settle()
    assert len(stack.people.got("page", run_id="r-page")) == 1
    assert stack.people.got("ticket", run_id="r-page") == []


def test_a_failed_experiment_is_a_ticket_and_wakes_nobody(stack: Stack) -> None:
    stack.find("r-ticket", names.RULE_RUN_FAILED, "ticket", tier=names.TIER_EXPERIMENT)
    stack.wait_until_told("ticket", "r-ticket", rule=names.RULE_RUN_FAILED)
    stack.settle()
    assert len(stack.people.got("ticket", run_id="r-ticket")) == 1
    assert stack.people.got("page", run_id="r-ticket") == []


def test_an_experiment_that_claims_to_be_a_page_is_a_ticket(stack: Stack) -> None:
    stack.find("r-claim", names.RULE_NONFINITE, "page", tier=names.TIER_EXPERIMENT)
    stack.wait_until_told("ticket", "r-claim", rule=names.RULE_NONFINITE)
    assert stack.people.got("page", run_id="r-claim") == []


def test_people_hear_once_that_a_finding_is_resolved(stack: Stack) -> None:
    stack.find("r-back", names.RULE_RUN_LOST, "page")
    stack.wait_until_told("page", "r-back", rule=names.RULE_RUN_LOST)
    stack.find("r-back", names.RULE_RUN_LOST, "page", active=False)
    stack.wait_until_told("page", "r-back", status="resolved", rule=names.RULE_RUN_LOST)
    stack.settle()
    assert [n.status for n in stack.people.got("page", run_id="r-back")] == ["firing", "resolved"]


def test_pages_and_tickets_go_to_the_owners_of_their_rules(stack: Stack) -> None:
    stack.find("r-owners", names.RULE_CHECKPOINT_CORRUPT, "page")
    stack.find("r-owners", names.RULE_NONFINITE, "page")
    stack.find("r-owners", names.RULE_CHECKPOINT_STALE, "ticket")
    stack.find("r-owners", names.RULE_PLATEAU, "ticket")
    for receiver, rule in (
        ("ml-sre-page", names.RULE_CHECKPOINT_CORRUPT),
        ("ml-engineer-page", names.RULE_NONFINITE),
        ("ml-sre-ticket", names.RULE_CHECKPOINT_STALE),
        ("ml-engineer-ticket", names.RULE_PLATEAU),
    ):
        told = stack.wait_until_told(receiver, "r-owners", rule=rule)
        assert told.labels["owner"] == receiver.rpartition("-")[0]
        assert told.annotations["runbook_url"] == names.runbook_url(names.RULE_ALERTS[rule])
    stack.settle()
    assert len(stack.people.got("page", run_id="r-owners")) == 2
    assert len(stack.people.got("ticket", run_id="r-owners")) == 2


def test_what_a_restart_depends_on_is_told_of_a_run_that_died(stack: Stack) -> None:
    stack.find("r-died", names.RULE_RUN_FAILED, "page")
    stack.find("r-died", names.RULE_CHECKPOINT_CORRUPT, "page")
    stack.find("r-died", names.RULE_REPEATED_FAILURE, "ticket")
    stack.find("r-died", names.RULE_CHECKPOINT_FAILED, "ticket")
    stack.wait_until_told("page", "r-died", rule=names.RULE_RUN_FAILED)
    stack.wait_until_told("page", "r-died", rule=names.RULE_CHECKPOINT_CORRUPT)
    stack.wait_until_told("ticket", "r-died", rule=names.RULE_REPEATED_FAILURE)
    stack.settle()
    assert stack.people.got("ticket", run_id="r-died", rule=names.RULE_CHECKPOINT_FAILED) == []


def test_a_run_that_hangs_in_a_collective_is_one_page_that_silences_what_follows_from_it(stack: Stack) -> None:
    stack.find("r-hung", names.RULE_STALLED, "page")
    stack.wait_until_told("ml-sre-page", "r-hung", rule=names.RULE_STALLED)
    for rule in (names.RULE_STRAGGLER, names.RULE_SLOW_COLLECTIVE, names.RULE_CHECKPOINT_STALE):
        stack.find("r-hung", rule, "ticket")
    stack.find("r-late", names.RULE_STRAGGLER, "ticket")
    stack.wait_until_told("ml-sre-ticket", "r-late", rule=names.RULE_STRAGGLER)
    stack.settle()
    assert len(stack.people.got("page", run_id="r-hung")) == 1
    assert stack.people.got("ticket", run_id="r-hung") == []


def test_an_outage_of_many_runs_collectives_is_one_page(stack: Stack) -> None:
    hung = [f"r-out{number}" for number in range(6)]
    for run_id in hung:
        stack.find(run_id, names.RULE_STALLED, "page")
    stack.find(hung[0], names.RULE_COLLECTIVE_OUTAGE, "page")
    stack.wait_until_told("ml-sre-page", hung[0], rule=names.RULE_COLLECTIVE_OUTAGE)
    # Each has been stalled for longer than its alert is held.
    stack.prometheus.wait_for_evaluations(6)
    assert [n.labels["run_id"] for n in stack.people.got("page") if n.labels["run_id"] in hung] == hung[:1]
    # One that is left when the outage is over is told of then.
    for run_id in hung[1:]:
        stack.find(run_id, names.RULE_STALLED, "page", active=False)
    # Else the outage may be told to be over before these are.
    stack.prometheus.wait_for_evaluations(2)
    stack.find(hung[0], names.RULE_COLLECTIVE_OUTAGE, "page", active=False)
    stack.wait_until_told("page", hung[0], status="resolved", rule=names.RULE_COLLECTIVE_OUTAGE)
    stack.wait_until_told("page", hung[0], rule=names.RULE_STALLED)
    stack.settle()
    assert [n for run_id in hung[1:] for n in stack.people.got("page", run_id=run_id)] == []


def test_an_outage_of_experiments_silences_no_production_run(stack: Stack) -> None:
    stack.find("r-try", names.RULE_COLLECTIVE_OUTAGE, "ticket", tier=names.TIER_EXPERIMENT)
    stack.find("r-try", names.RULE_STALLED, "ticket", tier=names.TIER_EXPERIMENT)
    stack.wait_until_told("ml-sre-ticket", "r-try", rule=names.RULE_COLLECTIVE_OUTAGE)
    stack.find("r-serious", names.RULE_STALLED, "page")
    stack.wait_until_told("ml-sre-page", "r-serious", rule=names.RULE_STALLED)
    assert stack.people.got("ticket", run_id="r-try", rule=names.RULE_STALLED) == []
    stack.find("r-try", names.RULE_COLLECTIVE_OUTAGE, "ticket", tier=names.TIER_EXPERIMENT, active=False)
    stack.find("r-try", names.RULE_STALLED, "ticket", tier=names.TIER_EXPERIMENT, active=False)


def test_repeated_nans_turn_a_run_s_ticket_into_a_page(stack: Stack) -> None:
    stack.find("r-nan", names.RULE_NONFINITE, "ticket")
    stack.wait_until_told("ticket", "r-nan", rule=names.RULE_NONFINITE)
    stack.find("r-nan", names.RULE_NONFINITE, "ticket", active=False)
    stack.find("r-nan", names.RULE_NONFINITE, "page")
    stack.wait_until_told("page", "r-nan", rule=names.RULE_NONFINITE)
    stack.settle()
    assert len(stack.people.got("page", run_id="r-nan")) == 1
    assert len(stack.people.got("ticket", "firing", run_id="r-nan")) == 1


def test_the_death_of_a_run_silences_its_smaller_alerts_and_no_other_run_s(stack: Stack) -> None:
    stack.find("r-dead", names.RULE_RUN_FAILED, "page")
    stack.find("r-dead", names.RULE_NONFINITE, "page")
    stack.find("r-dead", names.RULE_MEMORY_HEADROOM, "ticket")
    stack.find("r-alive", names.RULE_NONFINITE, "page")
    stack.wait_until_told("page", "r-dead", rule=names.RULE_RUN_FAILED)
    stack.wait_until_told("page", "r-alive", rule=names.RULE_NONFINITE)
    stack.settle()
    assert len(stack.people.got("page", run_id="r-dead")) == 1
    assert stack.people.got("ticket", run_id="r-dead") == []


def test_too_many_bad_runs_are_a_ticket_while_runs_of_the_same_job_die(stack: Stack) -> None:
    objective = {"slo": names.SLO_TRAINING_SUCCESS_RATE, "training_job": JOB, "tier": names.TIER_PRODUCTION}
    stack.find("r-dead-too", names.RULE_RUN_FAILED, "page")
    stack.wait_until_told("page", "r-dead-too", rule=names.RULE_RUN_FAILED)
    stack.source.set(names.SLO_EVENTS, 3, quality="bad", **objective)
    stack.source.set(names.SLO_EVENTS, 27, quality="good", **objective)
    stack.source.set(names.SLO_P_VALUE, 0.0003, **objective)
    wait_for(
        lambda: stack.people.got("ticket", "firing", slo=names.SLO_TRAINING_SUCCESS_RATE), what="the ticket"
    )
    assert stack.people.got("page", slo=names.SLO_TRAINING_SUCCESS_RATE) == []


def test_a_healthy_run_tells_only_the_dead_man_s_switch(stack: Stack) -> None:
    healthy = {"run_id": "r-healthy", "training_job": "healthy", "tier": names.TIER_PRODUCTION}
    stack.source.set(names.RUN_INFO, 1, status="running", **healthy)
    stack.source.set(names.RUN_MEMORY_HEADROOM, 0.7, **healthy)
    stack.find("r-sick", names.RULE_RUN_FAILED, "page")
    stack.wait_until_told("page", "r-sick", rule=names.RULE_RUN_FAILED)
    stack.settle()
    # It fired before Prometheus knew of Alertmanager, and is sent again after a minute.
    wait_for(lambda: stack.people.got("watchdog"), seconds=90, what="the dead man's switch to hear")
    for receiver in ("page", "ticket"):
        assert stack.people.got(receiver, alertname="GradwatchWatchdog") == []
        assert stack.people.got(receiver, run_id="r-healthy") == []
        assert stack.people.got(receiver, training_job="healthy") == []
