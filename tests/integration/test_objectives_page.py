"""The page of objectives: the sickest first, the runs that made them so, what the teams cost, on any screen."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, insert

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_collector.objectives.counting import Tallies
from gradwatch_collector.objectives.courses import Courses
from gradwatch_collector.objectives.exclusions import What, exclude
from gradwatch_collector.objectives.indicator import Indicator
from gradwatch_collector.objectives.spending import spending
from gradwatch_collector.objectives.worst_runs import worst_runs
from gradwatch_collector.runs.facts import nanos
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_slo.cost import PriceTable
from gradwatch_slo.objective import objectives_of
from gradwatch_slo.reader import parse_documents
from gradwatch_slo.runs import Status
from tests.browser import SCREENSHOTS, chromium, needs_chromium
from tests.pages import Page
from tests.stored_runs import DAY, HOUR, MINUTE, StoredRun, run, store_runs

OCTOBER = datetime(2025, 10, 1, tzinfo=UTC)
WINDOW = ("--window", "2025-10")
LONG = 256 * "W"
SUCCESS = "ratioMetric: {rawType: success, raw: {metricSource: SOURCE}}"
FAULTS = SUCCESS.replace("success", "failure")
VALUE = "thresholdMetric: {metricSource: SOURCE}"


def objective(
    measure: str, metric: str = SUCCESS, asked: str = "target: 0.9", *, name: str = "mine", unit: str = "run",
    method: str = "Occurrences",
) -> str:  # fmt: skip
    """An objective of runs of tier production."""
    source = f"{{type: gradwatch, spec: {{unit: {unit}, measure: {measure}, where: {{tier: [production]}}}}}}"
    return f"""
---
apiVersion: openslo/v1
kind: SLO
metadata: {{name: {name}}}
spec:
  service: training
  indicator: {{metadata: {{name: {name}}}, spec: {{{metric.replace("SOURCE", source)}}}}}
  timeWindow: [{{duration: 28d, isRolling: true}}]
  budgetingMethod: {method}
  objectives: [{{{asked}}}]
"""


def page(database_url: str, file: Path, objectives: str, *options: str) -> str:
    """The page as HTML; ``file`` for the objectives."""
    file.write_text(objectives, encoding="utf-8")
    asked = ["slo", "report", "--db", database_url, "-f", str(file), "--format", "html", *WINDOW, *options]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    return result.stdout


def ended(at: datetime, status: Status = Status.SUCCEEDED, **columns: Any) -> StoredRun:
    """A run of an hour that ended then."""
    return run(status, started=at - HOUR, **columns)


def failed(at: datetime, **columns: Any) -> StoredRun:
    return ended(at, Status.FAILED, **columns)


def store(database: Engine, *runs: StoredRun) -> None:
    with transaction(database) as connection:
        store_runs(connection, runs)


def summarised(database: Engine, values: dict[str, dict[str, float]]) -> None:
    """Store what is known of runs by their ids."""
    with transaction(database) as connection:
        for run_id, known in values.items():
            connection.execute(insert(schema.run_summary), {"run_id": run_id, **known})


def looked_at(text: str) -> dict[str, list[str]]:
    """The runs to look at in their order, and what each is bad for."""
    sections = re.findall(r'<section class="run">(.*?)</section>', text, re.DOTALL)
    found = {}
    for each in sections:
        (run_id,) = re.findall(r"<h3>(?:<a [^>]*>)?(.*?)(?:</a>)? <span", each)
        whys = re.findall(r'<p>([^<]*: )<span class="bad">(.*?)</span></p>', each)
        found[html.unescape(run_id)] = [html.unescape("".join(why)) for why in whys]
    assert len(found) == len(sections)
    return found


def rows(text: str) -> list[tuple[str, str, int]]:
    """Verdict, group and per cent of the budget left of what is listed."""
    (table,) = re.findall(r"<tbody>(.*?)</tbody>", text, re.DOTALL)
    row = r'badge \w+">(.*?)</span>.*?<span class="soft">(.*?)</span>.*?</span></span>(-?\d+) %'
    return [(verdict, group, int(left)) for verdict, group, left in re.findall(row, table, re.DOTALL)]


# --- What is listed ------------------------------------------------------------------------------------


def test_the_sickest_groups_are_listed_first_and_what_is_left_out_is_told_by_verdict(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    """However their names are sorted: those of teams that stand well come first."""
    store(
        database,
        *(ended(OCTOBER + HOUR, team=f"a{n:03}") for n in range(500)),
        *(ended(OCTOBER + n * HOUR, team="fine") for n in range(5)),
        # Of 5 to 10 runs each fail 3; of the last one 1.
        *(
            ended(OCTOBER + n * HOUR, Status.FAILED if n < 3 else Status.SUCCEEDED, team=f"sick-{runs:02}")
            for runs in range(5, 11)
            for n in range(runs)
        ),
        *(
            ended(OCTOBER + n * HOUR, Status.FAILED if n < 1 else Status.SUCCEEDED, team="who")
            for n in range(5)
        ),
    )
    text = page(database_url, tmp_path / "mine.yaml", objective("success"), "--group-by", "team")
    listed = rows(text)
    assert len(listed) == 500
    assert [(verdict, group) for verdict, group, _ in listed[:8]] == [
        *(("breached", f"team=sick-{runs:02}") for runs in range(5, 9)),
        *(("uncertain", f"team={name}") for name in ("sick-09", "sick-10", "who")),
        ("met", "team=fine"),
    ]
    assert [left for *_, left in listed[:4]] == sorted(left for *_, left in listed[:4])
    assert {verdict for verdict, *_ in listed[8:]} == {"insufficient data"}
    told = Page(text)
    assert "The sickest are listed. Left out: 8 insufficient data." in told.texts
    assert "Pictures are of the 12 that stand worst." in told.texts
    pictured = re.findall(r'<h2>mine <span class="soft">(.*?)</span>', text)
    assert pictured == [group for _, group, _ in listed[:12]]
    assert told.tags.count("svg") == 24
    assert len(text) < 700_000


def test_where_all_are_listed_nothing_is_said_to_be_left_out(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    store(database, ended(OCTOBER + HOUR))
    assert "Left out: there are no prices" in (
        text := page(database_url, tmp_path / "mine.yaml", objective("success"))
    )
    assert text.count("Left out") == 1


def test_files_of_which_nothing_can_be_evaluated_have_a_page(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("currency: EUR\ndevices:\n  NVIDIA H200: 3.40\n")
    other = objective("success").replace("type: gradwatch", "type: Prometheus")
    text = page(database_url, tmp_path / "mine.yaml", other, "--prices", str(prices))
    assert "mine cannot be evaluated" in text
    assert not looked_at(text)


# --- Runs to look at -----------------------------------------------------------------------------------


def test_the_newest_runs_that_failed_are_to_be_looked_at(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    soon_after = OCTOBER + 9 * DAY + MINUTE
    store(
        database,
        *(failed(OCTOBER + n * DAY, run_id=f"failed-{n}", reason="OSError") for n in (1, 3, 9)),
        ended(OCTOBER + 2 * DAY, Status.LOST, run_id="lost-2"),
        ended(OCTOBER + 8 * DAY, Status.LOST, run_id="lost-8"),
        # None of these: well, excused, elsewhere, and not of the window.
        ended(soon_after),
        ended(soon_after, Status.CANCELLED),
        failed(soon_after, reason="preempted"),
        failed(soon_after, run_id="excluded"),
        failed(soon_after, tier="experiment"),
        failed(OCTOBER - HOUR),
        failed(OCTOBER + 32 * DAY),
    )
    with transaction(database) as connection:
        exclude(connection, What(single_run="excluded"), "maintenance", now=nanos(OCTOBER))
    found = looked_at(page(database_url, tmp_path / "mine.yaml", objective("success")))
    assert list(found.items()) == [
        ("failed-9", ["mine: failed (OSError) after 1h00m"]),
        ("lost-8", ["mine: lost after 1h00m"]),
        ("failed-3", ["mine: failed (OSError) after 1h00m"]),
        ("lost-2", ["mine: lost after 1h00m"]),
    ]


def test_a_run_that_is_slow_by_the_objectives_own_deadline_is_to_be_looked_at(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    store(
        database,
        *(ended(OCTOBER + n * HOUR, run_id=f"slow-{n}", reached=50 * MINUTE) for n in (1, 2)),
        # In time, by its own deadline, and without a target.
        ended(OCTOBER + HOUR, reached=9 * MINUTE),
        ended(OCTOBER + HOUR, reached=50 * MINUTE, deadline=HOUR),
        failed(OCTOBER + HOUR),
        failed(OCTOBER + 30 * MINUTE, run_id="never", target="val_loss<=0.5"),
        ended(OCTOBER, run_id="just", reached=10 * MINUTE + 0.2 * MINUTE / 60),
    )
    convergence = objective("convergence, deadline: 10m")
    assert looked_at(page(database_url, tmp_path / "mine.yaml", convergence)) == {
        "slow-2": ["mine: 50m00s to its target, 10m00s granted"],
        "slow-1": ["mine: 50m00s to its target, 10m00s granted"],
        "never": ["mine: failed after 1h00m without its target, 10m00s granted"],
        "just": ["mine: 600.2 s to its target, 600.0 s granted"],
    }


def test_a_run_that_goes_on_and_is_late_is_the_first_to_be_looked_at(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    late = run(Status.RUNNING, started=now - 2 * HOUR - MINUTE, run_id="late", target="val_loss<=0.5")
    new = run(Status.RUNNING, started=now - MINUTE, run_id="new", target="val_loss<=0.5")
    slow = [ended(now - n * MINUTE, run_id=f"slow-{n}", reached=50 * MINUTE) for n in (1, 30)]
    store(database, late, new, *slow)
    asked = objective("convergence, deadline: 10m")
    text = page(database_url, tmp_path / "mine.yaml", asked, "--window", "7d")
    assert list(looked_at(text).items()) == [
        ("late", ["mine: running for 2h01m without its target, 10m00s granted"]),
        *((f"slow-{n}", ["mine: 50m00s to its target, 10m00s granted"]) for n in (1, 30)),
    ]
    assert "Goes on." in text
    # A window that has been knows nothing of what goes on.
    before = f"{now - 5 * MINUTE:%Y-%m-%dT%H:%M:%SZ}"
    earlier = page(database_url, tmp_path / "mine.yaml", asked, "--window", "7d", "--as-of", before)
    assert list(looked_at(earlier)) == ["slow-30"]


@pytest.mark.parametrize(
    ("measure", "metric", "asked", "values", "why"),
    [
        (
            "nonfinite_steps", VALUE, "op: lte, value: 0",
            [{"nonfinite_steps": 0}, {"nonfinite_steps": 72}], "nonfinite steps 72, at most 0 wanted",
        ),
        (
            "memory_headroom", VALUE, "op: gt, value: 0.1",
            [{"memory_headroom": 0.5}, {"memory_headroom": 0.1}], "memory headroom 0.1, more than 0.1 wanted",
        ),
        (
            # It must not read as if it were what was wanted.
            "gpu_utilization", VALUE, "op: gte, value: 0.9",
            [{"gpu_utilization": 0.95}, {"gpu_utilization": 0.899999}],
            "gpu utilization 0.899999, at least 0.9 wanted",
        ),
        (
            "quality_delta", VALUE, "op: gt, value: 0",
            [{"quality_delta": 1.0}, {"quality_delta": -1.7976931348623157e308}],
            "quality delta not finite, more than 0 wanted",
        ),
        (
            "step_cost_ratio, baseline: {run: good}", VALUE, "op: lte, value: 1.2",
            [{"step_cost": 2.0, "step_cost_ratio": 9.0}, {"step_cost": 2.5, "step_cost_ratio": 0.1}],
            "step cost 2.5, at most 2.4 wanted by that of good",
        ),
        (
            "unhealthy", FAULTS, "",
            [{"observed_steps": 48, "unhealthy_steps": 0}, {"observed_steps": 48, "unhealthy_steps": 10}],
            "10 of 48 steps unhealthy",
        ),
        (
            "failed", FAULTS, "",
            [{"checkpoints": 4, "failed_checkpoints": 0}, {"checkpoints": 1, "failed_checkpoints": 1}],
            "1 of 1 checkpoint failed",
        ),
    ],
)  # fmt: skip
def test_runs_that_are_bad_by_what_is_known_of_them_are_to_be_looked_at(
    database: Engine, database_url: str, tmp_path: Path, measure: str, metric: str, asked: str,
    values: Sequence[dict[str, float]], why: str,
) -> None:  # fmt: skip
    store(database, *(ended(OCTOBER + DAY, run_id=each) for each in ("good", "bad", "unknown")))
    summarised(database, dict(zip(("good", "bad"), values, strict=True)))
    unit = {"unhealthy": "step", "failed": "checkpoint"}.get(measure, "run")
    wanted = objective(measure, metric, ", ".join(filter(None, (asked, "target: 0.9"))), unit=unit)
    assert looked_at(page(database_url, tmp_path / "mine.yaml", wanted)) == {"bad": [f"mine: {why}"]}


def test_a_run_that_is_slow_beside_a_pinned_one_is_to_be_looked_at(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    for run_id, minutes in (("pinned", 20), ("slow", 31), ("quick", 30)):
        store(database, ended(OCTOBER + DAY, run_id=run_id, reached=minutes * MINUTE, baseline=HOUR))
    pinned = objective("convergence, baseline: {run: pinned}")
    assert looked_at(page(database_url, tmp_path / "mine.yaml", pinned)) == {
        "slow": ["mine: 31m00s to its target, 30m00s granted"]
    }


def test_what_matched_as_bad_is_to_be_looked_at(database: Engine, database_url: str, tmp_path: Path) -> None:
    store(database, ended(OCTOBER + DAY, Status.CANCELLED, run_id="stopped", reason="SIGTERM"))
    source = "{metricSource: {type: gradwatch, spec: {unit: run, where: {status: [STATUS]}}}}"
    total = source.replace("STATUS", "succeeded, failed, cancelled")
    ratio = f"ratioMetric: {{counter: true, bad: {source.replace('STATUS', 'cancelled')}, total: {total}}}"
    assert looked_at(page(database_url, tmp_path / "mine.yaml", objective("", ratio))) == {
        "stopped": ["mine: cancelled (SIGTERM) after 1h00m, counted as bad"]
    }


def test_a_run_is_looked_at_once_for_all_that_it_is_bad_for_and_the_sickest_objective_is_first(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    store(
        database,
        *(ended(OCTOBER + n * HOUR, run_id=f"slow-{n}", reached=50 * MINUTE) for n in range(1, 7)),
        failed(OCTOBER + 9 * HOUR, run_id="broken", target="val_loss<=0.5"),
        failed(OCTOBER + 8 * HOUR, run_id="aimless"),
    )
    both = objective("success", name="success") + objective("convergence, deadline: 10m", name="speed")
    found = looked_at(page(database_url, tmp_path / "mine.yaml", both))
    assert list(found) == ["broken", "slow-6", "slow-5", "slow-4", "aimless"]
    assert found["broken"] == [
        "speed: failed after 1h00m without its target, 10m00s granted",
        "success: failed after 1h00m",
    ]


def test_the_runs_to_look_at_are_of_the_group_that_stands_badly(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    store(
        database,
        *(
            failed(OCTOBER + n * HOUR, run_id=f"{team}-{n}", team=team)
            for n in range(1, 6)
            for team in ("a", None)
        ),
        *(ended(OCTOBER + n * HOUR, team="a") for n in range(1, 6)),
        *(ended(OCTOBER + n * HOUR, team="b") for n in range(1, 6)),
    )
    text = page(database_url, tmp_path / "mine.yaml", objective("success"), "--group-by", "team,tier")
    assert list(looked_at(text)) == [f"{team}-{n}" for team in (None, "a") for n in (5, 4, 3, 2)]


def test_objectives_of_time_slices_have_runs_to_look_at(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    store(
        database, failed(OCTOBER + 10 * HOUR, run_id="broken"), *(ended(OCTOBER + n * HOUR) for n in range(9))
    )
    asked = "target: 0.9, timeSliceTarget: 0.95, timeSliceWindow: 1d"
    text = page(database_url, tmp_path / "mine.yaml", objective("success", asked=asked, method="Timeslices"))
    assert looked_at(text) == {"broken": ["mine: failed after 1h00m"]}


@pytest.mark.parametrize("method", ["Timeslices", "RatioTimeslices"])
def test_of_slices_the_runs_of_bad_ones_are_shown(
    database: Engine, database_url: str, tmp_path: Path, method: str
) -> None:
    runs = [
        ended(OCTOBER + day * DAY + (n + 1) * HOUR, run_id=f"day-{day}-{n}")
        | ({"status": Status.FAILED} if day == 3 or n == 0 else {})
        for day in range(8)
        for n in range(10)
    ]
    store(database, *runs)
    asked = "target: 0.95, timeSliceWindow: 1d" + (", timeSliceTarget: 0.9" if method == "Timeslices" else "")
    shown = list(
        looked_at(page(database_url, tmp_path / "mine.yaml", objective("success", asked=asked, method=method)))
    )
    # A single failure spends nothing of a day that is good with nine of ten.
    newest = [f"day-{day}-0" for day in (7, 6, 5, 4)]
    assert shown == ([f"day-3-{n}" for n in (9, 8, 7, 6)] if method == "Timeslices" else newest)


def test_a_budget_that_is_nearly_as_it_was_is_told_so(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    store(
        database, *(ended(OCTOBER + n * MINUTE, run_id=f"run-{n}") for n in range(3000)), failed(OCTOBER + DAY)
    )
    told = Page(page(database_url, tmp_path / "mine.yaml", objective("success"))).texts
    assert any("300 bad events allowed, 1 seen: 99.7 % left" in each for each in told)
    assert any("From 100 % at the start of the window to 99.7 %" in each for each in told)


def test_whatever_the_stretches_the_newest_bad_runs_are_found_or_those_with_most_bad_steps(
    database: Engine,
) -> None:
    ends = [OCTOBER + n * HOUR for n in range(12)]
    store(database, *(ended(at, run_id=f"run-{n:02}") for n, at in enumerate(ends)))
    summarised(database, {f"run-{n:02}": {"observed_steps": 100} for n in range(12)})
    asked = objective("unhealthy", FAULTS, unit="step")
    asked += objective("nonfinite_steps", VALUE, "op: lte, value: 0, target: 0.9", name="finite")
    objectives = objectives_of(parse_documents(asked.encode(), "both")).objectives

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.integers(0, 4), min_size=12, max_size=12),
        st.sets(st.integers(nanos(OCTOBER), nanos(ends[-1])), max_size=6),
    )
    def check(bad: list[int], inner: set[int]) -> None:
        edges = sorted({nanos(OCTOBER), *inner, nanos(ends[-1]) + 1})
        with transaction(database) as connection:
            for n, count in enumerate(bad):
                change = schema.run_summary.update().where(schema.run_summary.c.run_id == f"run-{n:02}")
                connection.execute(change.values(unhealthy_steps=count, nonfinite_steps=count))
            by_most, newest = (
                worst_runs(
                    connection, each, {"tier": "production"},
                    Courses(Tallies(connection), Indicator.of(each), edges).of(()).stretches,
                    going_on=0, now=edges[-1],
                )
                for each in objectives
            )  # fmt: skip
        assert [each.bad for each in by_most] == sorted(filter(None, bad), reverse=True)[:4]
        assert all(bad[int(each.run_id[4:])] == each.bad for each in by_most)
        assert [each.run_id for each in newest] == [f"run-{n:02}" for n in range(11, -1, -1) if bad[n]][:4]

    check()


def test_runs_are_linked_to_their_page_where_a_collector_is_named(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    ids = ["a/b c'd", "100%", "..", "."]
    store(database, *(failed(OCTOBER + DAY - n * HOUR, run_id=run_id) for n, run_id in enumerate(ids)))
    text = page(database_url, tmp_path / "mine.yaml", objective("success"), "--url", "http://127.0.0.1:4318/")
    # A browser takes the last two for folders, however they are spelled.
    told = Page(text)
    assert told.links == [f"http://127.0.0.1:4318/runs/{each}" for each in ("a%2Fb%20c%27d", "100%25")]
    assert list(looked_at(text)) == ids
    assert """gradwatch runs report 'a/b c'"'"'d'""" in told.texts


# --- Costs ---------------------------------------------------------------------------------------------


def tell_process(database: Engine, told: StoredRun, device: str) -> None:
    """One process that held a device for all of the run."""
    with transaction(database) as connection:
        connection.execute(
            insert(schema.process).values(
                run_id=told["run_id"], attempt=1, rank=0, instance="one", status=told["status"], evidence={},
                started_at=told["started_at"], ended_at=told["ended_at"], last_seen_at=told["ended_at"],
                last_loss_nonfinite=False, heard_at=told["ended_at"], clock={}, will_retry=False, is_run=True,
                resource={c.HOST_NAME: "node", c.DEVICE_NAME: device},
            )
        )  # fmt: skip


def test_costs_are_those_of_the_teams_whether_an_objective_counts_the_runs_or_not(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    teams = ["vision", "vision", "audio", None, "audio"]
    runs = [ended(OCTOBER + n * DAY, team=team) for n, team in enumerate(teams, 1)]
    runs[0]["status"] = runs[2]["status"] = Status.CANCELLED
    store(database, *runs, ended(OCTOBER + DAY, tier="experiment"))
    prices = tmp_path / "prices.yaml"
    prices.write_text("currency: EUR\ndevices:\n  NVIDIA H200: 3.40\n")
    asked = (tmp_path / "mine.yaml", objective("success"), "--prices", str(prices))
    assert "none has a known cost" in page(database_url, *asked)
    devices = [*("NVIDIA H200",) * 3, "abacus", "NVIDIA H200"]
    for each, device in zip(runs, devices, strict=True):
        tell_process(database, each, device)
    with transaction(database) as connection:
        for excluded in (runs[1], runs[4]):
            exclude(connection, What(single_run=excluded["run_id"]), "a sweep", now=nanos(OCTOBER))
    told = Page(page(database_url, *asked))
    assert "audio: 6.80 EUR; vision: 6.80 EUR." in told.texts
    assert (
        "Of 5 runs that ended, 2025-10-01 00:00 to 2025-11-01 00:00; the cost of 1 is not known."
        " Runs that no objective counts (cancelled, excluded) are among them."
    ) in told.texts


def test_of_too_many_runs_the_longest_are_added_up(database: Engine) -> None:
    prices = PriceTable("EUR", {"NVIDIA H200": Decimal(2)})
    runs = [run(started=OCTOBER, lasted=lasted * HOUR, team="vision") for lasted in (3, 1, 2)]
    store(database, *runs)
    for each in runs:
        tell_process(database, each, "NVIDIA H200")
    with database.connect() as connection:
        found = spending(connection, schema.run.c.tier == "production", prices, most=2)
    assert (found.by_team, found.seen, found.total) == ({"vision": Fraction(10)}, 2, 3)
    assert found.seen_time == Fraction(5, 6)


# --- On a screen ---------------------------------------------------------------------------------------


@needs_chromium
def test_however_long_names_are_the_page_is_no_wider_than_the_screen(
    database: Engine, database_url: str, tmp_path: Path
) -> None:
    names = dict.fromkeys(("job", "team", "model", "dataset"), LONG)
    store(
        database,
        *(failed(OCTOBER + n * DAY, run_id=f"{n}{LONG[1:]}", reason=LONG, **names) for n in range(1, 7)),
        *(ended(OCTOBER + n * DAY, reached=HOUR / 2, baseline=HOUR / 4, **names) for n in range(1, 7)),
        *(ended(OCTOBER + n * DAY, reached=HOUR / 2, baseline=HOUR, team="vision") for n in range(1, 7)),
        ended(OCTOBER + DAY, team="audio"),
        *(
            ended(OCTOBER + n * DAY, Status.FAILED if n > 5 else Status.SUCCEEDED, team="b")
            for n in range(1, 7)
        ),
    )
    both = objective("success", name=63 * "n") + objective("convergence", name="speed")
    grouped = ("--group-by", "team,job,model,dataset", "--compare", "previous", "--url", "http://localhost")
    file = tmp_path / "page.html"
    file.write_text(page(database_url, tmp_path / "mine.yaml", both, *grouped), encoding="utf-8")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for width in (375, 768, 1024, 1366):
            shown = browser.new_page(viewport={"width": width, "height": 900})
            shown.goto(file.as_uri())
            # The headline is as long as it gets.
            assert shown.locator("h1").inner_text().endswith("insufficient data")
            assert shown.locator("h1").inner_text().count(",") == 3
            assert shown.locator("section.run").count() > 0
            wide = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            assert shown.evaluate(wide) == [width, width]
            shown.screenshot(path=SCREENSHOTS / f"objectives-{width}.png", full_page=True)
