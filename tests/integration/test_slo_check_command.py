"""``gradwatch slo check`` answers pipelines by its exit code, and says why."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine

from gradwatch.cli import main
from gradwatch_collector.storage.database import transaction
from gradwatch_slo.runs import Status
from tests.stored_runs import DAY, HOUR, run, store_runs

OCTOBER = datetime(2025, 10, 1, tzinfo=UTC)
AS_OF = ("--as-of", "2025-10-28")
ELSEWHERE = """
apiVersion: openslo/v1
kind: SLO
metadata: {name: elsewhere}
spec:
  service: training
  indicator:
    metadata: {name: elsewhere}
    spec:
      ratioMetric:
        counter: true
        good: {metricSource: {type: prometheus, spec: {query: good}}}
        total: {metricSource: {type: prometheus, spec: {query: total}}}
  timeWindow: [{duration: 28d, isRolling: true}]
  budgetingMethod: Occurrences
  objectives: [{target: 0.9}]
"""
TOO_FEW = " too few to judge, 5 are needed"
PER_TEAM = """
apiVersion: openslo/v1
kind: SLO
metadata: {name: mine}
spec:
  service: training
  indicator:
    metadata: {name: mine}
    spec:
      ratioMetric:
        rawType: success
        raw:
          metricSource:
            type: gradwatch
            spec: {unit: run, measure: success, where: {tier: [production]}, groupBy: [tier]}
  timeWindow: [{duration: 28d, isRolling: true}]
  budgetingMethod: Occurrences
  objectives: [{target: 0.9}]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(PER_TEAM)
    return path


def check(database_url: str, *options: str | Path) -> Result:
    return CliRunner().invoke(main, ["slo", "check", "--db", database_url, *AS_OF, *map(str, options)])


def store(database: Engine, bad: int, total: int, team: str = "vision") -> None:
    """So many production runs of a team in October, of which so many failed."""
    with transaction(database) as connection:
        store_runs(
            connection,
            [
                run(
                    Status.FAILED if n < bad else Status.SUCCEEDED,
                    started=OCTOBER + n * DAY / 2,
                    lasted=HOUR,
                    team=team,
                )
                for n in range(total)
            ],
        )


@pytest.mark.parametrize(
    ("bad", "total", "code", "line"),
    [
        (0, 10, 0, "ok: 1 met"),
        (2, 10, 0, "ok: 1 uncertain"),
        (4, 10, 3, "breached: mine (tier=production): 4 of 10 runs failed; the budget allows 1"),
        (
            0,
            4,
            4,
            "insufficient data: mine (tier=production): 0 of 4 runs failed; the budget allows 0;" + TOO_FEW,
        ),
    ],
)
def test_the_exit_code_is_the_verdict(
    database: Engine, database_url: str, file: Path, bad: int, total: int, code: int, line: str
) -> None:
    store(database, bad, total)
    result = check(database_url, "-f", file)
    assert (result.exit_code, result.output) == (code, f"{line}\n")


def test_insufficient_data_may_be_well_and_a_breach_never_is(
    database: Engine, database_url: str, file: Path
) -> None:
    assert check(database_url, "-f", file).exit_code == 4
    assert check(database_url, "-f", file, "--insufficient", "ok").output == "ok: 1 insufficient data\n"
    store(database, 4, 10)
    assert check(database_url, "-f", file, "--insufficient", "ok").exit_code == 3


def test_a_breach_decides_before_insufficient_data(database: Engine, database_url: str) -> None:
    store(database, 4, 10)
    result = check(database_url)
    assert result.exit_code == 3
    (line,) = result.output.splitlines()
    assert line.startswith("breached: training-success-rate (tier=production): 4 of 10 runs failed")


def test_one_group_is_judged_by_itself(database: Engine, database_url: str, file: Path) -> None:
    store(database, 0, 10)
    store(database, 5, 10, team="audio")
    assert check(database_url, "-f", file, "--group", "team=vision").exit_code == 0
    audio = check(database_url, "-f", file, "--group", "team=audio", "--group", "tier=production")
    assert audio.exit_code == 3
    assert audio.output.startswith("breached: mine (tier=production, team=audio): 5 of 10 runs failed")
    nobody = check(database_url, "-f", file, "--group", "team=nobody")
    assert nobody.exit_code == 4
    assert "mine (tier=production, team=nobody): no runs counted" in nobody.output


def test_an_objective_is_chosen_by_its_name(database: Engine, database_url: str) -> None:
    store(database, 4, 10)
    result = check(database_url, "--objective", "time-to-convergence", "--insufficient", "ok")
    assert (result.exit_code, "training-success-rate" in result.output) == (0, False)


def test_what_cannot_be_evaluated_here_is_an_error(
    database: Engine, database_url: str, file: Path, tmp_path: Path
) -> None:
    store(database, 4, 10)
    other = tmp_path / "elsewhere.yaml"
    other.write_text(ELSEWHERE)
    result = check(database_url, "-f", file, "-f", other)
    assert result.exit_code == 1
    error, breached = result.output.splitlines()
    assert error.startswith("error: elsewhere cannot be evaluated: metrics of the source type 'prometheus'")
    assert breached.startswith("breached: mine")
    assert check(database_url, "-f", file, "-f", other, "--objective", "mine").exit_code == 3


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (("--objective", "minn"), 2, "found 'minn', expected 'mine'; did you mean 'mine'?"),
        (("--group", "tema=vision"), 2, "found 'tema=vision', expected FIELD=VALUE, such as team=vision"),
        (("--group", "team"), 2, "found 'team', expected FIELD=VALUE"),
        (("--group", "team="), 2, "found 'team=', expected FIELD=VALUE"),
        (("--group", "team=a", "--group", "team=b"), 2, "found team twice, expected each field once"),
        (("--as-of", "never"), 2, "found 'never', expected a date or a moment with its zone"),
        (("--group", "tier=experiment"), 1, "no objective is about tier=experiment"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(
    database_url: str, file: Path, options: tuple[str, ...], code: int, expected: str
) -> None:
    result = check(database_url, "-f", file, *options)
    assert result.exit_code == code
    assert expected in result.output.splitlines()[-1]
