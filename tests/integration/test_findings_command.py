"""``gradwatch findings`` and ``/api/v1/findings``: what is wrong, and who has it in hand."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_collector.api.findings import FindingsQuery, list_findings
from gradwatch_collector.api.shapes import BadCursorError
from gradwatch_collector.findings import Detection, Observation, Severity, reconcile
from gradwatch_collector.findings.silences import About, load_silences, silence, silenced_until
from gradwatch_collector.records import Received
from gradwatch_collector.runs.facts import load_runs
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.service.audit import entries
from gradwatch_collector.storage.database import transaction
from tests.batches import at, batch, event, source
from tests.schemas import valid

HOUR = 3600 * 1_000_000_000
Command = Callable[..., Result]


def fails(database: Engine, run_id: str, seconds: float, **attributes: Any) -> None:
    """A run that starts and fails, and is found to have failed."""
    sender = source(run_id, instance=run_id, **attributes)
    registry = Registry()
    for sent in (
        batch(sender, event(c.RUN_STARTED, seconds)),
        batch(sender, event(c.RUN_ENDED, seconds + 1, 1, STATUS="failed")),
    ):
        with transaction(database) as connection:
            (key,) = registry.resolve(connection, [(sent.source, at(seconds + 1))])
            registry.apply(connection, [Received(key, sent, at(seconds + 1))])
    with transaction(database) as connection:
        found = Detection().look(connection, load_runs(connection), at(seconds + 2), lambda: True)
        reconcile(connection, found.observations, at(seconds + 2))


@pytest.fixture
def command(database: Engine, database_url: str) -> Command:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["findings", *arguments, "--db", database_url])

    return run


def shown(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def listed(command: Command, *arguments: str) -> list[Any]:
    page = shown(command("list", "--format", "json", *arguments))
    valid(page, "finding-list")
    return list(page["findings"])


def test_findings_are_listed_newest_first_and_by_what_is_asked(database: Engine, command: Command) -> None:
    fails(database, "a", 0, tier="production")
    fails(database, "b", 10)
    assert [(each["run_id"], each["severity"]) for each in listed(command)] == [("b", "ticket"), ("a", "page")]
    assert [each["run_id"] for each in listed(command, "--severity", "page")] == ["a"]
    assert [each["run_id"] for each in listed(command, "--run", "b")] == ["b"]
    assert listed(command, "--rule", "nonfinite") == []
    assert listed(command, "--job", "another") == []
    assert [each["run_id"] for each in listed(command, "--job", "digits", "--limit", "1")] == ["b"]


def test_a_list_goes_on_where_a_cursor_says(database: Engine, command: Command) -> None:
    for number in range(3):
        fails(database, f"run{number}", 10 * number)
    first = shown(command("list", "--format", "json", "--limit", "2"))
    rest = shown(command("list", "--format", "json", "--cursor", first["next_cursor"]))
    assert [each["run_id"] for each in first["findings"] + rest["findings"]] == ["run2", "run1", "run0"]
    assert rest["next_cursor"] is None
    with database.connect() as connection, pytest.raises(BadCursorError):
        list_findings(connection, FindingsQuery(cursor="; DROP"))
    refused = command("list", "--cursor", "x")
    assert (refused.exit_code, refused.output) == (1, "Error: cursor 'x' is not one this server gave out\n")


def test_resolved_findings_are_shown_when_asked_for(database: Engine, command: Command) -> None:
    fails(database, "a", 0)
    with transaction(database) as connection:
        reconcile(connection, [], at(60))
    assert command("list").output == "nothing is wrong\n"
    (found,) = listed(command, "--state", "resolved")
    assert (found["state"], found["resolved_at"] is None) == ("resolved", False)


def test_a_finding_is_shown_with_its_evidence_and_what_to_do(database: Engine, command: Command) -> None:
    fails(database, "a", 0)
    (found,) = listed(command)
    output = command("show", str(found["finding_id"])).output
    for part in (
        "RUN_FAILED (ticket, open) of run a",
        "reason",
        "cause",
        found["action"],
        found["runbook_url"],
    ):
        assert part in output
    assert shown(command("show", str(found["finding_id"]), "--format", "json")) == found
    missing = command("show", "999")
    assert (missing.exit_code, missing.output.count("\n")) == (1, 1)
    assert "no finding 999" in missing.output


def test_whoever_has_a_finding_in_hand_is_written_down(database: Engine, command: Command) -> None:
    fails(database, "a", 0)
    (found,) = listed(command)
    assert command("ack", str(found["finding_id"]), "--note", "restarting").exit_code == 0
    (found,) = listed(command)
    assert (found["note"], found["acknowledged_by"] is None, found["state"]) == ("restarting", False, "open")
    assert "restarting" in command("show", str(found["finding_id"])).output
    with database.connect() as connection:
        assert "finding.acknowledged" in [each.action for each in entries(connection, 10)]


def test_of_several_findings_none_is_acknowledged_if_one_is_not_there(
    database: Engine, command: Command
) -> None:
    fails(database, "a", 0)
    (found,) = listed(command)
    refused = command("ack", str(found["finding_id"]), "999")
    assert (refused.exit_code, "no finding 999" in refused.output) == (1, True)
    assert listed(command)[0]["acknowledged_by"] is None


def test_a_silence_covers_what_it_names_until_it_ends(database: Engine) -> None:
    with transaction(database) as connection:
        silence(connection, About(job="llm-*", rule="plateau"), at(10), "a test", now=at(0))
        silence(connection, About(single_run="a"), at(20), "a test", now=at(0))

    def until(now: float, *which: str) -> int | None:
        with database.connect() as connection:
            return silenced_until(load_silences(connection, at(now)), *which)

    assert until(5, "b", "llm-7b", "plateau") == at(10)
    assert until(5, "b", "vision", "plateau") is None
    assert until(5, "b", "llm-7b", "divergence") is None
    assert until(5, "a", "llm-7b", "plateau") == at(20)
    assert until(15, "b", "llm-7b", "plateau") is None


@pytest.mark.parametrize("rule", [c.RULE_TELEMETRY_OUTAGE, c.RULE_COLLECTIVE_OUTAGE, c.RULE_SWEEP_COST])
def test_what_is_about_many_runs_is_not_silenced_with_the_run_that_it_is_told_of(rule: str) -> None:
    assert not About(single_run="a").fits("a", "llm-7b", rule)
    assert About(job="llm-*").fits("a", "llm-7b", rule) == (rule == c.RULE_SWEEP_COST)
    assert About(rule=rule).fits("a", "llm-7b", rule)
    assert About(single_run="a", rule=rule).fits("a", "llm-7b", rule)


def test_a_silenced_finding_is_shown_as_such_until_it_may_be_heard_again(
    database: Engine, command: Command
) -> None:
    fails(database, "a", 0)
    told = command("silence", "--run", "a", "--for", "4h", "--reason", "an exercise")
    number = re.search(r"number (\d+)", told.output)
    assert told.exit_code == 0
    assert number is not None
    (found,) = listed(command)
    assert found["silenced_until"] is not None
    (silent,) = shown(command("silences", "--format", "json"))
    assert (silent["run_id"], silent["reason"]) == ("a", "an exercise")
    assert command("unsilence", number[1]).exit_code == 0
    assert listed(command)[0]["silenced_until"] is None
    assert command("silences").output == "nothing is silenced\n"
    again = command("unsilence", number[1])
    assert (again.exit_code, "no silence" in again.output) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--for", "4h", "--reason", "why"], "expected --run, --job or --rule"),
        (["--job", "", "--for", "4h", "--reason", "why"], "expected --run, --job or --rule"),
        (["--run", "a", "--for", "forever", "--reason", "why"], "a silence lasts, and ends"),
        (["--run", "a", "--for", "0h", "--reason", "why"], "a silence lasts, and ends"),
        (["--run", "a", "--for", "15000w", "--reason", "why"], "a silence lasts, and ends"),
        (["--run", "a", "--for", "soon", "--reason", "why"], "is not an age"),
        (["--run", "a", "--for", "4h", "--reason", " "], "expected a reason"),
        (["--rule", "plato", "--for", "4h", "--reason", "why"], "plato"),
    ],
)
def test_a_silence_that_says_too_little_is_refused(command: Command, arguments: list[str], words: str) -> None:
    refused = command("silence", *arguments)
    assert (refused.exit_code, words in refused.output) == (2, True)


def test_a_run_that_is_not_known_is_not_silenced_and_a_job_is(command: Command) -> None:
    refused = command("silence", "--run", "nosuch", "--for", "4h", "--reason", "why")
    assert (refused.exit_code, "no run 'nosuch'" in refused.output) == (1, True)
    assert command("silences").output == "nothing is silenced\n"
    assert command("silence", "--job", "nosuch", "--for", "4h", "--reason", "why").exit_code == 0


def test_a_run_of_another_job_is_not_silenced_as_one_of_this(database: Engine, command: Command) -> None:
    fails(database, "a", 0)
    refused = command("silence", "--run", "a", "--job", "nosuch", "--for", "4h", "--reason", "why")
    assert (refused.exit_code, "run 'a' is of job" in refused.output) == (1, True)
    assert command("silences").output == "nothing is silenced\n"


def test_of_a_run_that_is_not_known_it_is_not_said_that_nothing_is_wrong(command: Command) -> None:
    refused = command("list", "--run", "nosuch")
    assert (refused.exit_code, "no run 'nosuch'" in refused.output) == (1, True)
    assert command("list", "--job", "nosuch").output == "no such findings\n"


@pytest.mark.parametrize("verb", ["ack", "show", "unsilence"])
def test_a_number_that_no_finding_can_have_is_refused(command: Command, verb: str) -> None:
    refused = command(verb, str(2**63))
    assert (refused.exit_code, f"{2**63} is not in the range" in refused.output) == (2, True)


def test_a_team_is_shown_findings_of_its_runs_only_and_of_an_outage_its_own_part(database: Engine) -> None:
    fails(database, "a", 0, team="vision")
    fails(database, "b", 10, team="speech")
    outage = Observation(
        run_id="a",
        attempt=1,
        rule=c.RULE_TELEMETRY_OUTAGE,
        severity=Severity.TICKET,
        first_seen=at(11),
        last_seen=at(11),
        evidence={"count": 2, "runs": ["a", "b"]},
    )
    with transaction(database) as connection:
        reconcile(connection, [outage], at(12))
        found = list_findings(connection, FindingsQuery(), team="vision")["findings"]
    assert {(each["rule"], each["run_id"]) for each in found} == {
        ("run_failed", "a"),
        ("telemetry_outage", "a"),
    }
    assert "b" not in json.dumps([each["evidence"] for each in found])


def test_old_events_page_nobody_and_a_page_stays_one(database: Engine) -> None:
    def found(age: int, as_of: int | None = None) -> str:
        now = time.time_ns()
        observed = Observation(
            run_id=f"{age}{as_of}", attempt=1, rule=c.RULE_NONFINITE, severity=Severity.PAGE,
            first_seen=now - age, last_seen=now - age, as_of=None if as_of is None else now - as_of,
        )  # fmt: skip
        with transaction(database) as connection:
            reconcile(connection, [observed], now)
            reconcile(connection, [observed], now + HOUR)
            row = connection.exec_driver_sql("SELECT severity FROM finding ORDER BY finding_id DESC LIMIT 1")
            return str(row.scalar_one())

    assert found(HOUR // 5) == "page"
    assert found(HOUR) == "ticket"
    assert found(HOUR, as_of=HOUR // 5) == "page"
    assert found(HOUR // 5, as_of=HOUR) == "ticket"
