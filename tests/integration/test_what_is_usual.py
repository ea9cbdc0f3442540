"""What the values of a run are compared with: the runs before it, looked up once."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import Engine, insert, select

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_collector.objectives import summaries
from gradwatch_collector.objectives.baselines import quality_before, usual
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_collector.objectives.exclusions import What, exclude
from gradwatch_collector.objectives.summaries import summarise_due
from gradwatch_collector.runs.facts import RunRow, load_runs, moment
from gradwatch_collector.runs.quality import WORST
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_slo.cost import PriceTable
from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import Selection, Threshold
from gradwatch_slo.objective import Objective
from gradwatch_slo.report import ObjectiveReport
from gradwatch_slo.runs import Status
from gradwatch_slo.windows import TimeWindow
from tests.batches import at, batch, frame, source
from tests.stored_runs import DAY as A_DAY
from tests.stored_runs import HOUR, NOW, StoredRun, run, store_runs
from tests.told_runs import tell, tell_run

DAY = 86_400
GPU = {c.DEVICE_NAME: "NVIDIA H200"}


# --- Which runs it is made of ----------------------------------------------------------------------------


def history(values: Sequence[float], **columns: Any) -> list[StoredRun]:
    """Runs of an hour one after the other, with these step costs, oldest first."""
    return [
        run(started=NOW - 10 * A_DAY + 2 * number * HOUR, summary=value, **columns)
        for number, value in enumerate(values)
    ]


def store(database: Engine, runs: Sequence[StoredRun], name: str = "step_cost") -> None:
    with transaction(database) as connection:
        store_runs(connection, [{key: each[key] for key in each if key != "summary"} for each in runs])
        told = [{"run_id": each["run_id"], name: each["summary"]} for each in runs if "summary" in each]
        if told:
            connection.execute(insert(schema.run_summary), told)


def this_run(database: Engine, **columns: Any) -> RunRow:
    """A run of now, stored."""
    store(database, [mine := run(started=NOW, **columns)])
    with database.connect() as connection:
        (found,) = load_runs(connection, schema.run.c.run_id == mine["run_id"])
    return found


def usual_cost(database: Engine, runs: Sequence[StoredRun], **columns: Any) -> float | None:
    store(database, runs)
    mine = this_run(database, **columns)
    with database.connect() as connection:
        return usual(connection, mine, "step_cost")


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([1, 2, 3, 4], None),
        ([1, 2, 3, 4, 5], 3),
        ([1, 2, 3, 4, 5, 6], 3.5),
        # The newest twenty, neither more nor fewer.
        ([100] * 30 + [4] * 10 + [2] * 10, 3),
    ],
)
def test_the_median_of_the_newest_twenty_is_usual_once_there_are_five(
    database: Engine, costs: Sequence[float], expected: float | None
) -> None:
    assert usual_cost(database, history(costs)) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"job": "another"},
        {"model": "another"},
        {"dataset": None},
        {"status": Status.FAILED},
        {"status": Status.CANCELLED},
        {"lasted": 20 * A_DAY},  # still running when the run started
    ],
)
def test_only_good_runs_of_the_same_work_that_had_ended_are_usual(
    database: Engine, other: dict[str, Any]
) -> None:
    assert usual_cost(database, [*history([1] * 5), *history([9] * 9, **other)]) == 1


def test_a_run_that_ended_as_this_one_started_had_ended(database: Engine) -> None:
    just_ended = run(started=NOW - HOUR, summary=5.0)
    assert usual_cost(database, [*history([1, 2, 3, 4]), just_ended]) == 3


def test_a_run_that_took_no_time_is_not_usual_for_itself(database: Engine) -> None:
    store(database, history([1, 2, 3, 4]))
    mine = this_run(database, lasted=timedelta(0), summary=5.0)
    with database.connect() as connection:
        assert usual(connection, mine, "step_cost") is None


def test_quality_is_that_of_the_last_run_of_the_same_aim_however_many_had_another(database: Engine) -> None:
    store(
        database,
        [
            *history([-0.5, -0.4, WORST], target="val_loss<=0.5"),
            *(
                {**each, "started_at": each["started_at"] + 1, "ended_at": each["ended_at"] + 1}
                for target in ("accuracy>=0.9", "val_loss>1", "val_losses<1", None)
                for each in history([0.9] * 30, target=target)
            ),
        ],
        "quality",
    )
    mine = this_run(database, target="val_loss < 0.1"), this_run(database, target="loss<1"), this_run(database)
    with database.connect() as connection:
        assert [quality_before(connection, each) for each in mine] == [-0.4, None, None]


# --- Looked up once ------------------------------------------------------------------------------------------


def euros(price: str, currency: str = "EUR") -> PriceTable:
    return PriceTable(currency, {"NVIDIA H200": Decimal(price)}, None)


def summarise(database: Engine, prices: PriceTable | None = None, *, days: float = 100) -> None:
    while not summarise_due(database, lambda: transaction(database), prices, at(days * DAY)):
        pass


def judged(database: Engine, measure: Threshold) -> ObjectiveReport:
    """Of the runs of a day."""
    asked = Objective(
        name="cost",
        indicator="cost",
        target=Decimal("0.9"),
        window=TimeWindow(Duration(28, "d")),
        measure=measure,
        selection=Selection(),
    )
    with database.connect() as connection:
        (report,) = evaluate_objectives(connection, [asked], at(DAY))
    return report


def told(database: Engine, run_id: str) -> Any:
    with database.connect() as connection:
        rows = connection.execute(select(schema.run_summary).where(schema.run_summary.c.run_id == run_id))
        return rows.one()


def tell_history(database: Engine, count: int, *, first: int = 0, seconds: float = 1000) -> None:
    """Runs of 100 steps on one device, one after the other."""
    for number in range(first, first + count):
        tell_run(
            database, f"run-{number}", 2000 * number, seconds=seconds, losses=[1.0] * 100, devices=["cuda:0"],
            resource=GPU,
        )  # fmt: skip


def _day(number: int) -> str:
    return f"{moment(at(number * DAY)):%Y-%m-%d}"


def tell_more(database: Engine, run_id: str) -> None:
    """A packet that comes late."""
    tell(database, batch(source(run_id, instance=f"{run_id}-1-0", attempt=1)), 90 * DAY)


def test_what_becomes_of_others_later_changes_nothing(database: Engine) -> None:
    tell_history(database, 6)
    summarise(database, euros("3.60"))
    assert told(database, "run-5").step_cost_ratio == 1
    with transaction(database) as connection:
        for number in range(3):
            exclude(connection, What(single_run=f"run-{number}"), "a broken switch", now=at(50 * DAY))
    tell_more(database, "run-5")
    summarise(database, euros("3.60"))
    assert told(database, "run-5").step_cost_ratio == 1


def test_what_was_told_too_late_to_be_usual_never_is(database: Engine) -> None:
    tell_history(database, 1, first=6)
    summarise(database, euros("3.60"))
    tell_history(database, 6)
    tell_more(database, "run-6")
    summarise(database, euros("3.60"))
    assert told(database, "run-6").step_cost_ratio is None


def test_a_run_that_is_told_more_of_is_compared_with_what_was_usual_at_first(database: Engine) -> None:
    tell_history(database, 6)
    summarise(database, euros("3.60"))
    sender = source("run-5", instance="run-5-1-1", attempt=1, rank=1)
    memory = frame(c.DEVICE_MEMORY_LIMIT, [{c.DEVICE: "cuda:1"}], [10_100], [[80e9]])
    tell(database, batch(sender, frames=[memory]), 90 * DAY)
    with transaction(database) as connection:
        for number in range(3):
            exclude(connection, What(single_run=f"run-{number}"), "a broken switch", now=at(50 * DAY))
    summarise(database, euros("7.20"))
    assert (told(database, "run-5").step_cost_usual, told(database, "run-5").step_cost_ratio) == (10, 2)


# --- Prices that come, and change ----------------------------------------------------------------------------


def test_a_cost_is_compared_with_those_of_its_own_currency_only(database: Engine) -> None:
    tell_history(database, 6)
    summarise(database, euros("3.60"))
    tell_history(database, 5, first=6)
    summarise(database, euros("580", "JPY"))
    assert (told(database, "run-6").currency, told(database, "run-6").step_cost_ratio) == ("JPY", None)
    tell_history(database, 1, first=11)
    summarise(database, euros("580", "JPY"))
    assert told(database, "run-11").step_cost_ratio == 1
    # What was told in euros before is not held against yen.
    tell_more(database, "run-5")
    summarise(database, euros("580", "JPY"))
    assert (told(database, "run-5").currency, told(database, "run-5").step_cost_ratio) == ("JPY", None)


def test_a_cost_that_is_just_so_many_times_the_usual_is_no_more(database: Engine) -> None:
    """6/5 of 17/3600 a step: neither is a number with 16 digits."""
    for number, seconds in enumerate([100] * 5 + [120] * 6):
        tell_run(
            database, f"run-{number}", 2000 * number, seconds=seconds, losses=[1.0] * 20, devices=["cuda:0"],
            resource=GPU,
        )  # fmt: skip
    summarise(database, euros("3.40"))
    for measure, good in (
        (Threshold("step_cost_ratio", "lte", Decimal("1.2")), 6),
        (Threshold("step_cost_ratio", "gt", Decimal("1.2")), 0),
        (Threshold("step_cost_ratio", "lte", Decimal("1.2"), baseline_run="run-0"), 10),
        (Threshold("step_cost_ratio", "gt", Decimal("1.2"), baseline_run="run-0"), 0),
        (Threshold("step_cost_ratio", "gte", Decimal("1.2"), baseline_run="run-0"), 6),
        (Threshold("step_cost_ratio", "lt", Decimal("1.2"), baseline_run="run-0"), 4),
    ):
        assert judged(database, measure).good == good, measure


def test_a_run_of_before_currencies_were_kept_is_read_again_by_what_was_usual_then(database: Engine) -> None:
    tell_history(database, 6)
    summarise(database, euros("3.60"))
    with transaction(database) as connection:
        connection.execute(schema.run_summary.update().values(currency=None))
        for number in range(3):
            exclude(connection, What(single_run=f"run-{number}"), "a broken switch", now=at(50 * DAY))
    tell_more(database, "run-5")
    summarise(database, euros("3.60"))
    assert told(database, "run-5").step_cost_ratio == 1


def test_a_cost_from_before_currencies_were_kept_is_taken_for_one_of_today(database: Engine) -> None:
    tell_history(database, 6)
    summarise(database, euros("3.60"))
    with transaction(database) as connection:
        connection.execute(schema.run_summary.update().values(currency=None))
    tell_history(database, 1, first=6)
    summarise(database, euros("3.60"))
    assert told(database, "run-6").step_cost_ratio == 1


@pytest.mark.parametrize("currency", ["EUR", "JPY"])
def test_a_pinned_run_is_compared_with_costs_of_its_own_currency_only(database: Engine, currency: str) -> None:
    tell_history(database, 2)
    summarise(database, euros("3.60"))
    tell_history(database, 3, first=2)
    summarise(database, euros("3.60", currency))
    pinned = Threshold("step_cost_ratio", "lte", Decimal("1.2"), baseline_run="run-0")
    report = judged(database, pinned)
    assert (report.good, report.total) == ((4, 4) if currency == "EUR" else (1, 1))


def test_prices_that_were_not_there_count_for_the_past_once_runs_are_summarised_anew(
    database: Engine, database_url: str
) -> None:
    tell_history(database, 7)
    summarise(database)
    assert told(database, "run-6").step_cost is None
    words = ("slo", "summarise", "--from", _day(0), "--to", _day(0), "--db", database_url)
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, done.stdout) == (0, "7 runs to be summarised anew by the collector\n")
    assert told(database, "run-6").steps == 100  # what is known counts until then
    summarise(database, euros("3.60"), days=10_000)
    assert (told(database, "run-4").step_cost_ratio, told(database, "run-6").step_cost_ratio) == (None, 1)
    log = CliRunner().invoke(main, ["audit", "list", "--db", database_url])
    assert "slo.summarised" in log.stdout


def test_what_is_usual_is_looked_up_anew_with_the_rest(database: Engine, database_url: str) -> None:
    tell_history(database, 6)
    summarise(database, euros("3.60"))
    with transaction(database) as connection:
        exclude(connection, What(single_run="run-0"), "a broken switch", now=at(50 * DAY))
    words = ("slo", "summarise", "--from", _day(0), "--to", _day(0), "--db", database_url)
    assert CliRunner().invoke(main, words).exit_code == 0
    assert told(database, "run-5").step_cost_ratio == 1
    summarise(database, euros("3.60"), days=10_000)
    assert told(database, "run-5").step_cost_ratio is None


def test_what_is_due_already_is_summarised_anew_in_its_turn(database: Engine, database_url: str) -> None:
    tell_history(database, 6)
    summarise(database, euros("3.60"))
    tell_more(database, "run-5")
    words = ("slo", "summarise", "--from", _day(0), "--to", _day(0), "--db", database_url)
    assert CliRunner().invoke(main, words).exit_code == 0
    summarise(database, euros("7.20"), days=10_000)
    assert told(database, "run-5").step_cost_ratio == 1


def test_a_run_of_which_nothing_is_known_goes_before_those_that_are_read_again(
    database: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summaries, "_RUNS_AT_ONCE", 2)
    tell_history(database, 4)
    summarise(database, euros("3.60"))
    words = ("slo", "summarise", "--from", _day(0), "--to", _day(0), "--db", database_url)
    assert CliRunner().invoke(main, words).exit_code == 0
    tell_history(database, 1, first=4)
    assert not summarise_due(database, lambda: transaction(database), euros("7.20"), at(10_000 * DAY))
    assert [told(database, f"run-{number}").step_cost for number in (0, 1, 4)] == [20, 10, 20]


def test_only_runs_that_ended_within_the_days_are_summarised_anew(database: Engine, database_url: str) -> None:
    tell_history(database, 2)
    summarise(database)
    words = ("slo", "summarise", "--from", _day(1), "--to", _day(1), "--db", database_url)
    assert CliRunner().invoke(main, words).stdout == "0 runs to be summarised anew by the collector\n"
    summarise(database, euros("3.60"), days=10_000)
    assert told(database, "run-1").step_cost is None


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        (("--from", "2026-10-02", "--to", "2026-10-01"), "expected"),
        (("--from", "yesterday", "--to", "2026-10-01"), "found 'yesterday'"),
        (("--from", "2026-10-02"), "Missing option '--to'"),
    ],
)
def test_days_that_are_none_are_refused(database_url: str, dates: tuple[str, ...], message: str) -> None:
    done = CliRunner().invoke(main, ["slo", "summarise", *dates, "--db", database_url])
    assert done.exit_code == 2
    assert message in done.stderr
