"""`gradwatch slo exclude`, `include`, `exclusions` and `simulate`, as a person types them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine

from gradwatch.cli import main
from gradwatch_slo.runs import Status
from tests.stored_runs import DAY, HOUR, StoredRun, run, store_runs

BY_TEAM = """
apiVersion: openslo/v1
kind: SLO
metadata: {name: teams}
spec:
  service: training
  indicator:
    metadata: {name: success}
    spec:
      ratioMetric:
        rawType: success
        raw: {metricSource: {type: gradwatch, spec: {unit: run, measure: success, groupBy: [team]}}}
  timeWindow: [{duration: 28d, isRolling: true}]
  budgetingMethod: Occurrences
  objectives: [{target: 0.9}]
"""
POLICY = """
  alertPolicies:
    - kind: AlertPolicy
      metadata: {name: held}
      spec:
        alertWhenBreaching: true
        conditions:
          - kind: AlertCondition
            metadata: {name: burns}
            spec:
              severity: ticket
              condition: {kind: burnrate, threshold: 5, lookbackWindow: 6h, alertAfter: 3d}
        notificationTargets:
          - {kind: AlertNotificationTarget, metadata: {name: us}, spec: {target: email}}
"""
Gradwatch = Callable[..., Result]


@pytest.fixture
def gradwatch(database: Engine, database_url: str) -> Gradwatch:
    return lambda *words: CliRunner().invoke(main, [*words, "--db", database_url])


def fill(database: Engine, *runs: StoredRun) -> None:
    with database.begin() as connection:
        store_runs(connection, runs)


def counted(gradwatch: Gradwatch) -> tuple[int, int]:
    """Good and bad of the shipped success rate in production."""
    (first, *_) = json.loads(gradwatch("slo", "report", "--format", "json").stdout)["objectives"]
    return first["good"], first["bad"]


def ago(days: int) -> datetime:
    return datetime.now(UTC) - days * DAY


def test_a_run_is_excluded_with_who_and_why_and_included_again(database: Engine, gradwatch: Gradwatch) -> None:
    fill(database, run(Status.FAILED, started=ago(3), run_id="drill"), run(started=ago(2)))
    assert counted(gradwatch) == (1, 1)
    done = gradwatch("slo", "exclude", "--run", "drill", "--reason", "a test of the pager")
    assert (done.exit_code, done.stdout) == (0, "excluded the run drill (number 1)\n")
    assert counted(gradwatch) == (1, 0)
    (listed,) = json.loads(gradwatch("slo", "exclusions", "--format", "json").stdout)
    assert (listed["run_id"], listed["reason"]) == ("drill", "a test of the pager")
    assert "@" in listed["actor"]
    assert "a test of the pager" in gradwatch("audit", "list").stdout
    assert gradwatch("slo", "include", "1").stdout == "counted again: the run drill\n"
    assert counted(gradwatch) == (1, 1)
    assert json.loads(gradwatch("slo", "exclusions", "--format", "json").stdout) == []
    assert "the run drill (withdrawn)" in gradwatch("slo", "exclusions", "--all").stdout


def test_what_is_still_excluded_under_another_number_is_not_said_to_be_counted(
    database: Engine, gradwatch: Gradwatch
) -> None:
    fill(database, run(Status.FAILED, started=ago(3), run_id="drill"))
    day, before = (f"{ago(days):%Y-%m-%d}" for days in (3, 5))
    for words in (
        ("--run", "drill"),
        ("--run", "drill"),
        ("--from", before, "--to", day, "--group", "team=vision"),
        ("--from", before, "--to", day, "--group", "team=audio"),
        ("--from", "2100-01-01", "--to", "2100-01-03"),
        ("--from", "2100-01-02", "--to", "2100-01-04"),
    ):
        assert gradwatch("slo", "exclude", *words, "--reason", "a test").exit_code == 0
    first = "withdrawn: the run drill; still excluded under number 2, 3\n"
    assert gradwatch("slo", "include", "1").stdout == first
    assert (
        gradwatch("slo", "include", "2").stdout == "withdrawn: the run drill; still excluded under number 3\n"
    )
    assert counted(gradwatch) == (0, 0)
    assert gradwatch("slo", "include", "3").stdout.startswith("counted again: team=vision from")
    assert counted(gradwatch) == (0, 1)
    assert gradwatch("slo", "include", "5").stdout.endswith(
        "; still excluded, at least in part, under number 6\n"
    )
    assert gradwatch("slo", "include", "6").stdout.startswith("counted again: all from 2100")


def test_the_name_of_a_run_steers_no_terminal(database: Engine, gradwatch: Gradwatch) -> None:
    fill(database, run(Status.FAILED, started=ago(3), run_id="\x1b[2Jx", team="\x1b[31m"))
    done = gradwatch("slo", "exclude", "--run", "\x1b[2Jx", "--reason", "a test")
    assert done.stdout == "excluded the run \\x1b[2Jx (number 1)\n"
    assert gradwatch("slo", "include", "1").stdout == "counted again: the run \\x1b[2Jx\n"
    period = ("--from", "2026-01-01", "--to", "2026-01-02", "--group", "team=\x1b[31m")
    assert gradwatch("slo", "exclude", *period, "--reason", "a test").stdout.startswith(
        "excluded team=\\x1b[31m from"
    )


def test_days_are_excluded_whole_and_for_a_team_only(database: Engine, gradwatch: Gradwatch) -> None:
    day = ago(5).replace(hour=0, minute=0, second=0, microsecond=0)
    for ended in (day - timedelta(seconds=1), day, day + DAY - timedelta(seconds=1), day + DAY):
        fill(database, *(run(Status.FAILED, started=ended - HOUR, team=team) for team in ("vision", "audio")))
    words = ("--from", f"{day:%Y-%m-%d}", "--to", f"{day:%Y-%m-%d}", "--group", "team=vision")
    done = gradwatch("slo", "exclude", *words, "--reason", "its storage was moved")
    begins, ends = f"{day:%Y-%m-%dT00:00:00Z}", f"{day + DAY:%Y-%m-%dT00:00:00Z}"
    assert done.stdout == f"excluded team=vision from {begins} to {ends} (number 1)\n"
    assert counted(gradwatch) == (0, 6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected --run, or both --from and --to"),
        (("--from", "2026-01-01"), "expected --run, or both --from and --to"),
        (("--run", "x", "--from", "2026-01-01"), "expected either --run, or --from and --to"),
        (
            ("--from", "2026-01-02", "--to", "2026-01-01"),
            "found '2026-01-01', expected a moment after 2026-01-02",
        ),
        (("--from", "soon", "--to", "2026-01-01"), "found 'soon', expected a date or a moment with its zone"),
        (("--from", "2026-01-01", "--to", "2026-01-02", "--group", "taem=a"), "did you mean 'team'"),
        (
            ("--from", "2026-01-01", "--to", "2026-01-02", "--group", "tier=prod"),
            "found 'tier=prod', expected a tier: one of production, experiment",
        ),
    ],
)
def test_what_is_not_understood_is_told_in_one_line(
    gradwatch: Gradwatch, words: tuple[str, ...], message: str
) -> None:
    done = gradwatch("slo", "exclude", *words, "--reason", "a test")
    assert done.exit_code == 2
    assert message in done.stderr


def test_what_there_is_not_cannot_be_excluded_or_included(gradwatch: Gradwatch) -> None:
    unknown = gradwatch("slo", "exclude", "--run", "nothing", "--reason", "a test")
    assert (unknown.exit_code, unknown.stderr) == (
        1,
        "Error: no run 'nothing'; `gradwatch runs list` names them\n",
    )
    nothing = gradwatch("slo", "include", "7")
    assert nothing.exit_code == 1
    assert "nothing is excluded under the number 7" in nothing.stderr


def test_a_simulation_tells_when_alerts_would_have_fired(database: Engine, gradwatch: Gradwatch) -> None:
    healthy = [run(started=ago(days), lasted=HOUR) for days in range(40, 100)]
    sick = [run(Status.FAILED, started=ago(80), lasted=HOUR) for _ in range(4)]
    fill(database, *healthy, *sick)
    simulated = json.loads(gradwatch("slo", "simulate", "--format", "json").stdout)
    (found,) = (each for each in simulated if each["group"] == {"tier": "production"})
    assert (found["name"], found["total"], found["bad"]) == ("training-success-rate", 64, 4)
    (episode,) = found["episodes"]
    assert (episode["bad"], episode["total"]) == (4, 24)
    began, ended = (datetime.fromisoformat(episode[name]) for name in ("from", "to"))
    assert ended - began == 28 * DAY
    assert 0 < found["by_chance_a_year"] < 2
    printed = gradwatch("slo", "simulate").stdout
    assert "1 time" in printed
    assert "for 28 d (4 of 24 bad)" in printed
    assert "| exact test |" in gradwatch("slo", "simulate", "--format", "markdown").stdout


@pytest.mark.parametrize("columns", [40, 60, 80, 120, 200])
def test_a_simulation_fits_on_any_terminal(database: Engine, database_url: str, columns: int) -> None:
    fill(
        database,
        *(run(Status.FAILED, started=ago(days), lasted=HOUR) for days in (80, 80, 80, 80, 300, 300, 300)),
    )
    terminal = {"FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": str(columns)}
    done = CliRunner().invoke(main, ["slo", "simulate", "--db", database_url], env=terminal)
    lines = [re.sub("\x1b[^m]*m", "", line) for line in done.stdout.splitlines()]
    assert max(map(len, lines)) <= columns
    assert "(4 of 4 bad)" in " ".join(line.strip() for line in lines)
    assert sum("times" in line for line in lines) == 1
    assert any(line.startswith("training-success-rate ") for line in lines) or columns == 40


def test_an_alert_that_fires_since_before_what_is_asked_is_told(database: Engine, gradwatch: Gradwatch) -> None:
    fill(database, *(run(Status.FAILED, started=ago(20), lasted=HOUR) for _ in range(4)))
    (found,) = json.loads(gradwatch("slo", "simulate", "--days", "5", "--format", "json").stdout)
    assert found["episodes"] == [{"from": None, "to": None, "bad": 4, "total": 4}]
    printed = gradwatch("slo", "simulate", "--days", "5", "--format", "markdown").stdout
    assert re.search(r"\| 1 time \| - \| since before [-0-9]+ [:0-9]+ and goes on \(4 of 4 bad\)", printed)


def test_an_alert_that_held_for_longer_than_its_window_before_what_is_asked_is_told(
    database: Engine, gradwatch: Gradwatch, tmp_path: Path
) -> None:
    fill(database, *(run(Status.FAILED, started=ago(5) + n * HOUR, lasted=HOUR) for n in range(5 * 24)))
    file = tmp_path / "held.yaml"
    file.write_text(BY_TEAM.replace("28d", "1d") + POLICY)
    found = json.loads(gradwatch("slo", "simulate", "-f", str(file), "--days", "1", "--format", "json").stdout)
    (asked,) = (each for each in found if each["alert"] == "policy held")
    assert [(each["from"], each["to"]) for each in asked["episodes"]] == [(None, None)]


@pytest.mark.parametrize(
    ("window", "first"),
    [
        ("{duration: 1M, isRolling: true}", "2025-11-30"),
        ("{duration: 1Q, calendar: {startTime: 2025-01-01 00:00:00, timeZone: UTC}}", "2025-10-01"),
    ],
)
def test_a_simulation_of_one_day_knows_all_of_a_long_window(
    database: Engine, gradwatch: Gradwatch, tmp_path: Path, window: str, first: str
) -> None:
    # Sixty good ones as the window begins, and on its last day five bad ones of ten: 5 of 70 surprise nobody.
    good, last = (datetime.fromisoformat(at) for at in (f"{first}T22:30:00Z", "2025-12-31T01:30:00Z"))
    fill(
        database,
        *(run(started=good, lasted=HOUR) for _ in range(60)),
        *(run(Status.FAILED if n < 5 else Status.SUCCEEDED, started=last, lasted=HOUR) for n in range(10)),
    )
    file = tmp_path / "long.yaml"
    file.write_text(BY_TEAM.replace("{duration: 28d, isRolling: true}", window))
    asked = ("--days", "1", "--as-of", "2025-12-31", "--format", "json")
    (found,) = json.loads(gradwatch("slo", "simulate", "-f", str(file), *asked).stdout)
    assert (found["total"], found["bad"], found["episodes"]) == (10, 5, [])


def test_a_simulation_in_markdown_shows_names_as_text(
    database: Engine, gradwatch: Gradwatch, tmp_path: Path
) -> None:
    fill(database, *(run(started=ago(days), team="a|<b>[c](d)\\") for days in range(40, 50)))
    file = tmp_path / "teams.yaml"
    file.write_text(BY_TEAM)
    told = gradwatch("slo", "simulate", "-f", str(file), "--format", "markdown").stdout
    assert r"team=a\|\<b\>\[c\](d)\\ |" in told
