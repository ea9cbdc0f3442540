"""``gradwatch slo report``: any window and group, as of any moment, in every format."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine, insert

from gradwatch.cli import main
from gradwatch_collector.objectives.changes import tell_due
from gradwatch_collector.objectives.counting import Tallies
from gradwatch_collector.objectives.courses import Courses, mondays, pieces
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.runs.facts import nanos
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_slo.counts import Counts
from gradwatch_slo.objectives import default_objectives
from gradwatch_slo.runs import Status
from tests.pages import HOSTILE, Page, live
from tests.schemas import valid
from tests.stored_runs import DAY, HOUR, StoredRun, run, store_runs

OCTOBER = datetime(2025, 10, 1, tzinfo=UTC)
SUCCESS = "training-success-rate"
SLICED = """
apiVersion: openslo/v1
kind: SLO
metadata: {name: days}
spec:
  service: training
  indicator:
    metadata: {name: success}
    spec:
      ratioMetric:
        rawType: success
        raw: {metricSource: {type: gradwatch, spec: {unit: run, measure: success}}}
  timeWindow: [{duration: 28d, isRolling: true}]
  budgetingMethod: Timeslices
  objectives: [{target: 0.6, timeSliceTarget: 0.5, timeSliceWindow: 1d}]
"""


def report(database_url: str, *options: str) -> Result:
    return CliRunner().invoke(main, ["slo", "report", "--db", database_url, *options])


def objectives(database_url: str, *options: str) -> list[dict[str, Any]]:
    """What the report says as JSON, which is as its schema says."""
    result = report(database_url, "--format", "json", *options)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    valid(told, "slo-report")
    found: list[dict[str, Any]] = told["objectives"]
    return found


def counts(
    found: Sequence[dict[str, Any]], name: str = SUCCESS
) -> dict[tuple[str | None, ...], tuple[int, int]]:
    """Good and bad by the values of the group."""
    return {
        tuple(each["group"].values()): (each["good"], each["bad"]) for each in found if each["name"] == name
    }


def page(database_url: str, *options: str) -> tuple[str, Page]:
    result = report(database_url, "--format", "html", *options)
    assert result.exit_code == 0, result.output
    return result.stdout, Page(result.stdout)


def ended(at: datetime, status: Status = Status.SUCCEEDED, **columns: Any) -> StoredRun:
    """A run of an hour that ended then."""
    return run(status, started=at - HOUR, **columns)


def store(database: Engine, *runs: StoredRun) -> None:
    with transaction(database) as connection:
        store_runs(connection, runs)


def store_two_months(database: Engine) -> None:
    """In September 2 of 20 runs of vision fail, and 1 of 5 of audio; in October 6 of 20 of vision."""
    september = OCTOBER - 30 * DAY
    store(
        database,
        *(ended(september + n * DAY, Status.FAILED if n < 3 else Status.SUCCEEDED) for n in range(1, 21)),
        *(
            ended(september + n * DAY, Status.LOST if n < 2 else Status.SUCCEEDED, team="audio")
            for n in range(1, 6)
        ),
        *(ended(OCTOBER + n * DAY, Status.FAILED if n < 7 else Status.SUCCEEDED) for n in range(1, 21)),
    )


def test_a_month_is_that_of_the_time_zone(database: Engine, database_url: str) -> None:
    store(database, ended(datetime(2025, 10, 31, 23, 30, tzinfo=UTC)))
    for zone, month in (("UTC", "2025-10"), ("Europe/Berlin", "2025-11")):
        found = objectives(database_url, "--window", month, "--time-zone", zone)
        assert counts(found)["production",] == (1, 0)
        assert found[0]["window"]["duration"] == "1M"
    other = objectives(database_url, "--window", "2025-10", "--time-zone", "Europe/Berlin")
    assert counts(other)["production",] == (0, 0)
    assert other[0]["window"]["from"] == "2025-09-30T22:00:00Z"


@pytest.mark.parametrize("window", ["2025", "2025-Q4", "2025-10", "2025-10-05", "30d"])
def test_every_way_to_name_a_window_is_one(database: Engine, database_url: str, window: str) -> None:
    store(database, ended(datetime(2025, 10, 5, 12, tzinfo=UTC)), ended(OCTOBER - 300 * DAY))
    found = objectives(database_url, "--window", window, "--as-of", "2025-10-20")
    assert counts(found)["production",] == (1, 0)


def test_a_report_of_the_past_knows_what_is_known_today_of_what_had_ended(
    database: Engine, database_url: str
) -> None:
    # Corrected since: then it was thought to have succeeded.
    store(database, ended(OCTOBER + 2 * HOUR, Status.FAILED), ended(OCTOBER + 30 * HOUR))
    for as_of, known in (
        ("2025-10-01T01:59:59Z", (0, 0)),
        ("2025-10-01T02:00:00Z", (0, 1)),
        ("2025-10-01", (0, 1)),
        ("2025-10-02", (1, 1)),
    ):
        assert counts(objectives(database_url, "--as-of", as_of))["production",] == known


def test_groups_are_those_that_are_asked_for(database: Engine, database_url: str) -> None:
    store_two_months(database)
    found = objectives(database_url, "--window", "2025-09", "--group-by", "team")
    assert counts(found) == {
        ("production", "audio"): (4, 1),
        ("production", "vision"): (18, 2),
        ("experiment",): (0, 0),
    }
    both = objectives(database_url, "--window", "2025-09", "--group-by", "team,job")
    assert {tuple(each["group"]) for each in both if each["total"]} == {("tier", "team", "job")}


def test_an_objective_is_beside_the_window_before(database: Engine, database_url: str) -> None:
    store_two_months(database)
    found = objectives(database_url, "--window", "2025-10", "--group-by", "team", "--compare", "previous")
    vision, audio = (
        next(each for each in found if each["name"] == SUCCESS and each["group"].get("team") == team)
        for team in ("vision", "audio")
    )
    assert (vision["previous"]["good"], vision["previous"]["bad"]) == (18, 2)
    assert vision["previous"]["window"]["from"] == "2025-09-01T00:00:00Z"
    assert vision["change"]["sli"] == -0.2
    assert vision["change"]["summary"] == (
        "SLI down 20 points from 90 %; still breached; budget left -2900 % after -900 %"
    )
    # It had no run in October, and does not vanish.
    assert (audio["total"], audio["previous"]["total"]) == (0, 5)
    assert audio["change"] == {
        "sli": None,
        "budget_remaining": None,
        "summary": "80 % in the window before, uncertain",
    }


def test_the_windows_that_are_compared_share_no_run(database: Engine, database_url: str) -> None:
    as_of = OCTOBER + 7 * DAY
    store(database, ended(OCTOBER), ended(as_of), ended(OCTOBER - timedelta(microseconds=1)))
    found = objectives(
        database_url, "--window", "7d", "--as-of", "2025-10-08T00:00:00Z", "--compare", "previous"
    )
    assert (found[0]["total"], found[0]["previous"]["total"]) == (2, 1)


def test_people_read_the_same_as_programs(database: Engine, database_url: str, tmp_path: Path) -> None:
    store_two_months(database)
    asked = ("--window", "2025-10", "--compare", "previous")
    sentence = "6 of 20 runs failed; the budget allows 0"
    table = report(database_url, *asked)
    assert sentence in table.stdout
    assert "Since the window before" in table.stdout
    assert "\x1b" not in table.stdout
    assert f"| {sentence} |" in report(database_url, *asked, "--format", "markdown").stdout
    rows = list(csv.DictReader(io.StringIO(report(database_url, *asked, "--format", "csv").stdout)))
    assert (rows[0]["summary"], rows[0]["bad"], rows[0]["previous_bad"]) == (sentence, "6", "3")
    for form in ("table", "markdown", "json", "csv", "html"):
        file = tmp_path / f"report.{form}"
        assert report(database_url, *asked, "--format", form, "-o", str(file)).stdout == f"wrote {file}\n"
        assert sentence in file.read_text()


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
        good: {metricSource: {type: Prometheus, spec: {query: good}}}
        total: {metricSource: {type: Prometheus, spec: {query: total}}}
  timeWindow: [{duration: 28d, isRolling: true}]
  budgetingMethod: Occurrences
  objectives: [{target: 0.9}]
"""


def test_people_are_told_of_which_moment_and_window_a_report_is(database: Engine, database_url: str) -> None:
    store(database, *(ended(OCTOBER + n * DAY) for n in range(1, 4)))
    asked = ("--window", "2025-10", "--time-zone", "Europe/Berlin")
    said = "Objectives as of 2025-10-31 23:59 Europe/Berlin, over 1M (2025-10-01 00:00 to 2025-11-01 00:00)"
    assert report(database_url, *asked).stdout.splitlines()[0] == said
    told = report(database_url, *asked, "--format", "markdown")
    assert told.stdout.splitlines()[0] == f"# {said}"
    warnings = [line.removeprefix("warning: ") for line in told.stderr.splitlines()]
    assert told.stdout.splitlines()[-len(warnings) :] == [f"- {each}" for each in warnings]


def test_what_cannot_be_evaluated_is_told_of_in_every_format(
    database_url: str, database: Engine, tmp_path: Path
) -> None:
    file = tmp_path / "elsewhere.yaml"
    file.write_text(ELSEWHERE)
    asked = ("-f", str(file), "--format")
    assert report(database_url, *asked, "csv").stdout.startswith("objective,indicator,job,")
    assert "\n- elsewhere cannot be evaluated" in report(database_url, *asked, "markdown").stdout
    assert report(database_url, *asked, "table").stdout.startswith("Objectives as of ")


def test_a_file_gets_no_colours_whatever_the_environment_asks_for(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    store_two_months(database)
    command = ["slo", "report", "--db", database_url, "--window", "2025-10"]
    colours = {"FORCE_COLOR": "1", "COLUMNS": "60"}
    assert "\x1b[" in CliRunner().invoke(main, command, env=colours).stdout
    file = tmp_path / "report.txt"
    CliRunner().invoke(main, [*command, "-o", str(file)], env=colours)
    assert file.read_text() == CliRunner().invoke(main, command).stdout


STEPS = """
apiVersion: openslo/v1
kind: SLO
metadata: {name: steps}
spec:
  service: training
  indicator:
    metadata: {name: healthy-steps}
    spec:
      ratioMetric:
        rawType: failure
        raw:
          metricSource:
            type: gradwatch
            spec: {unit: step, measure: unhealthy, where: {tier: [production]}}
  timeWindow: [{duration: 28d, isRolling: true}]
  budgetingMethod: Occurrences
  objectives: [{target: 0.9}]
"""


def tell_all_due(database: Engine, runs: Sequence[StoredRun]) -> None:
    with transaction(database) as connection:
        tell_due(connection, [each["run_id"] for each in runs], nanos(OCTOBER))


def test_runs_that_are_still_to_be_summarised_are_warned_of(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    runs = [
        *(ended(OCTOBER + n * DAY, run_id=f"due-{n}") for n in (1, 2, 3)),
        ended(OCTOBER + DAY, run_id="summarised"),
        # None of these counts: elsewhere, before the window, after the moment, going on.
        ended(OCTOBER + DAY, run_id="experiment", tier="experiment"),
        ended(OCTOBER - 40 * DAY, run_id="before"),
        ended(OCTOBER + 27 * DAY, run_id="after"),
        run(Status.RUNNING, started=OCTOBER, run_id="running"),
    ]
    store(database, *runs)
    tell_all_due(database, runs)
    tell_all_due(database, runs)  # of a run more may have become known
    with transaction(database) as connection:
        connection.execute(insert(schema.run_summary).values(run_id="summarised"))
    file = tmp_path / "steps.yaml"
    file.write_text(STEPS)
    asked = ("-f", str(file), "--as-of", "2025-10-20")
    warning = (
        "3 ended runs are not summarised yet: "
        "the objectives of steps, devices and checkpoints do not count them"
    )
    told = report(database_url, *asked, "--format", "json")
    assert json.loads(told.stdout)["warnings"] == [warning]
    assert told.stderr == f"warning: {warning}\n"
    checked = CliRunner().invoke(main, ["slo", "check", "--db", database_url, *asked])
    assert (checked.exit_code, checked.stderr) == (4, f"warning: {warning}\n")
    one = report(database_url, *asked[:2], "--as-of", "2025-10-02")
    assert one.stderr.startswith("warning: 1 ended run is not summarised yet: ")
    file.write_text(SLICED)
    assert "not summarised" not in report(database_url, *asked).stderr
    file.write_text(STEPS)
    many = [ended(OCTOBER) for _ in range(998)]
    store(database, *many)
    tell_all_due(database, many)
    assert "warning: more than 1000 ended runs are not summarised yet" in report(database_url, *asked).stderr


@pytest.mark.parametrize(
    ("measure", "metric", "bound", "lacks"),
    [
        ("convergence", "ratioMetric: {rawType: success, raw", "", "time to a target"),
        ("step_cost_ratio", "thresholdMetric: {metricSource", "op: lte, value: 1.2, ", "step_cost_ratio"),
    ],
)
def test_a_baseline_of_which_too_little_is_known_is_warned_of(
    database: Engine, database_url: str, tmp_path: Path, measure: str, metric: str, bound: str, lacks: str
) -> None:
    source = f"{{type: gradwatch, spec: {{unit: run, measure: {measure}, baseline: {{run: nobody}}}}}}"
    metric += f": {{metricSource: {source}}}}}" if measure == "convergence" else f": {source}}}"
    file = tmp_path / "pinned.yaml"
    file.write_text(
        f"""
apiVersion: openslo/v1
kind: SLO
metadata: {{name: pinned}}
spec:
  service: training
  indicator: {{metadata: {{name: pinned}}, spec: {{{metric}}}}}
  timeWindow: [{{duration: 28d, isRolling: true}}]
  budgetingMethod: Occurrences
  objectives: [{{{bound}target: 0.9}}]
"""
    )
    warning = f"warning: pinned: the baseline nobody has no known {lacks}, so that nothing is held against it\n"
    assert report(database_url, "-f", str(file)).stderr == warning
    checked = CliRunner().invoke(main, ["slo", "check", "--db", database_url, "-f", str(file)])
    assert (checked.exit_code, checked.stderr) == (4, warning)


def test_a_budget_that_one_failure_spends_is_warned_of(database: Engine, database_url: str) -> None:
    store_two_months(database)
    told = report(database_url, "--window", "2025-10", "--format", "json")
    (warning,) = json.loads(told.stdout)["warnings"]
    assert warning == (
        "training-success-rate (tier=production): 20 events in the window, and one failure spends the budget; "
        "with a target of 99 % it takes 100 to allow one"
    )
    assert f"warning: {warning}\n" in told.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("--window", "2025-13"),
            "'--window': found '2025-13', expected a duration such as 7d, or a period",
        ),
        (("--window", "2199"), "'--window': found a period that is still to come, expected one that"),
        (("--as-of", "yesterday"), "'--as-of': found 'yesterday', expected a date or a moment with its zone"),
        (("--time-zone", "Mars"), "'--time-zone': found 'Mars', expected an IANA time zone such as UTC"),
        (("--group-by", "tema"), "some of job, model, dataset, team, tier, with commas; did you mean 'team'?"),
        (("--group-by", "team,team"), "found 'team,team', expected each field once"),
        (("--compare", "last"), "'last' is not 'previous'"),
        (("--url", "javascript:alert(1)"), "expected an address such as https://"),
    ],
)
def test_what_is_wrong_is_one_line_that_says_what_is_expected(options: tuple[str, str], expected: str) -> None:
    result = report("sqlite:///nowhere.db", *options)
    assert result.exit_code == 2
    assert expected in result.output.splitlines()[-1]


def test_the_page_is_one_file_with_pictures_that_can_be_read_aloud(database: Engine, database_url: str) -> None:
    store_two_months(database)
    store(
        database,
        *(
            ended(OCTOBER + n * DAY, job="digits", reached=20 * n * HOUR / 60, baseline=3 * HOUR / 2)
            for n in range(1, 10)
        ),
        ended(OCTOBER + 12 * DAY, run_id="slow", reached=HOUR, baseline=HOUR / 2),
    )
    text, told = page(database_url, "--window", "2025-10", "--compare", "previous")
    assert {each.partition(":")[0] for each in told.fetched if not each.startswith("#")} <= {"data"}
    assert {each.removeprefix("#") for each in told.fetched if each.startswith("#")} <= set(told.ids)
    assert not told.links
    assert "@import" not in text
    assert len(told.ids) == len(set(told.ids))
    assert set(told.labels) <= set(told.ids)
    # Budget and weeks of both objectives of production, and the times to target of one.
    assert told.tags.count("svg") == told.tags.count("figure") == 5
    assert "script" not in told.tags
    assert "prefers-color-scheme: dark" in text
    texts = " ".join(each.strip() for each in told.texts)
    assert "6 of 30 runs failed; the budget allows 0" in texts
    assert "SLI down 8 points from 88 %; still breached;" in texts
    assert "From 100 % at the start of the window to -1900 %. It was overspent by 2025-10-02" in texts
    assert "digits: median 1h30m of 10 runs, usual 20m00s." in texts
    assert "1h00m to its target, 30m00s granted" in texts
    assert "gradwatch runs report slow" in texts
    assert "Left out: there are no prices (--prices FILE)." in texts


def test_no_end_of_an_interval_is_rounded_up_to_all(database: Engine, database_url: str) -> None:
    each = ended(OCTOBER + DAY)
    store(database, each)
    steps = {"observed_steps": 100_000, "unhealthy_steps": 1, "checkpoints": 0, "failed_checkpoints": 0}
    with transaction(database) as connection:
        connection.execute(insert(schema.run_summary), {"run_id": each["run_id"], **steps})
    _, told = page(database_url, "--window", "2025-10")
    said = "99999 of 100000, 99.99 %; the true rate may be 99.99 % to 99.99 %"
    assert said in [each.strip() for each in told.texts]


def test_no_picture_of_runs_contradicts_what_is_told_of_slices(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    store_two_months(database)
    of_runs = SLICED.replace("Timeslices", "Occurrences")
    of_runs = of_runs.replace(", timeSliceTarget: 0.5, timeSliceWindow: 1d", "")
    file = tmp_path / "objectives.yaml"
    for text, pictures in ((SLICED, 0), (of_runs, 2)):
        file.write_text(text)
        _, told = page(database_url, "-f", str(file), "--window", "2025-10")
        assert told.tags.count("svg") == pictures
        said = any("the pictures of its budget and weeks" in each for each in told.texts)
        assert said is (pictures == 0)


def test_what_is_lost_of_slices_is_told_with_its_part_in_every_format(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    store_two_months(database)
    file = tmp_path / "objectives.yaml"
    file.write_text(SLICED.replace("Timeslices", "RatioTimeslices").replace(", timeSliceTarget: 0.5", ""))
    asked = ("-f", str(file), "--window", "2025-09", "--compare", "previous")
    # On one day the runs of both teams failed, on another one of the two did; on 20 days some ended.
    (only,) = objectives(database_url, *asked)
    assert (only["good"], only["bad"], only["total"], only["sli"]) == (18.5, 1.5, 20, 0.925)
    assert (only["previous"]["bad"], only["verdict"]) == (0, "met")
    said = "1.5 of 20 slices were lost in all (3 of 25 runs failed); the budget allows 8"
    assert only["summary"] == said
    (row,) = csv.DictReader(io.StringIO(report(database_url, *asked, "--format", "csv").stdout))
    assert (row["good"], row["bad"], row["budget_allows"]) == ("18.5", "1.5", "8.0")
    assert said in report(database_url, *asked, "--format", "markdown").stdout
    _, told = page(database_url, *asked)
    assert any(text.strip().startswith("18.5 of 20, 92.5 %") for text in told.texts)
    assert any(text.strip().startswith("8 bad events allowed, 1.5 seen: 81 % left") for text in told.texts)


def test_nothing_in_telemetry_is_more_than_text(database: Engine, database_url: str) -> None:
    texts = dict.fromkeys(("job", "model", "dataset", "team"), HOSTILE)
    store(
        database,
        ended(OCTOBER, Status.FAILED, reason=HOSTILE, **texts),
        *(ended(OCTOBER, reached=HOUR / 2, baseline=HOUR / 4, **texts) for _ in range(9)),
    )
    asked = ("--window", "2025-10", "--group-by", "job,team", "--compare", "previous")
    text, told = page(database_url, *asked)
    assert "script" not in told.tags
    assert text.count("alert(1)") > 5
    assert not live(report(database_url, *asked, "--format", "markdown").stdout)
    for form in ("html", "markdown", "table", "csv"):
        printed = report(database_url, *asked, "--format", form).output
        assert "\x1b" not in printed
        assert "\u202e" not in printed


def test_an_empty_database_has_a_page(database: Engine, database_url: str) -> None:
    _, told = page(database_url)
    assert "svg" not in told.tags
    assert "None." in told.texts


def test_the_pieces_of_a_window_add_up_to_it(database: Engine) -> None:
    store_two_months(database)
    start, end = nanos(OCTOBER - 30 * DAY), nanos(OCTOBER + 31 * DAY)
    first = Indicator.of(default_objectives().objectives[0])
    with database.connect() as connection:
        tallies = Tallies(connection)
        for edges in (pieces(start, end), [start, nanos(OCTOBER), end]):
            course = Courses(tallies, first, edges).of(("production",))
            assert (course.edges[0], course.edges[-1]) == (start, end)
            assert sum(course.counts, Counts()) == tallies.over(first, start, end)["production",]


@pytest.mark.parametrize(
    ("days", "weeks", "first"),
    [(28, 8, "2025-09-07T22:00"), (70, 10, "2025-08-24T22:00"), (330, 26, "2025-05-04T22:00")],
)
def test_weeks_begin_on_mondays_of_the_time_zone(days: int, weeks: int, first: str) -> None:
    end = datetime(2025, 10, 31, 12, tzinfo=UTC)
    *begins, last = mondays(end - days * DAY, end, ZoneInfo("Europe/Berlin"))
    assert (len(begins), last) == (weeks, end)
    assert begins[0] == datetime.fromisoformat(f"{first}+00:00")
    # Clocks went back on the Sunday before.
    assert begins[-1] == datetime(2025, 10, 26, 23, tzinfo=UTC)
