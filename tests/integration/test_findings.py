"""Findings open, change and resolve with what is wrong, on every database."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import Engine, insert, select

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_collector.findings import Detection, Observation, Severity, reconcile
from gradwatch_collector.findings.acknowledging import acknowledge
from gradwatch_collector.findings.rules.nonfinite import Parameters, is_repeated
from gradwatch_collector.records import Received
from gradwatch_collector.runs.facts import RunRow, load_runs
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from gradwatch_slo.runs import Status
from tests.batches import at, batch, event, frame, source

RUN = RunRow(
    run_id="run", job="digits", model=None, dataset=None, team=None, tier="production", status=Status.RUNNING,
    reason=None, attempt=1, rank_count=1, started_at=at(0), ended_at=None, last_seen_at=at(1), last_step=50,
    last_loss=1.0, last_loss_nonfinite=False, host=None, commit=None, target=None, deadline_seconds=None,
    target_reached_at=None, baseline=None, outage_at=None, will_retry=False, cause_rank=None,
)  # fmt: skip
EXPERIMENT = replace(RUN, tier="experiment")


def detect(database: Engine, runs: Sequence[RunRow]) -> list[Observation]:
    with database.connect() as connection:
        return list(Detection().look(connection, runs, at(100), lambda: True).observations)


def note_nonfinite(
    database: Engine,
    *reports: tuple[int, int],
    rank: int = 0,
    born_in: str | None = "backward",
    since: int | None = None,
) -> None:
    """Events by step and number. ``since``: first step in which it may have come, the step being the last."""
    with transaction(database) as connection:
        for step, count in reports:
            attributes = {
                **(
                    {c.STEP: step} if since is None else {c.NONFINITE_EARLIEST: since, c.NONFINITE_LATEST: step}
                ),
                c.NONFINITE_STEPS: count,
                c.LAYER_NAME: f"layer{count}.weight",
                **({c.BORN_IN: born_in} if born_in else {}),
            }
            connection.execute(
                insert(schema.event).values(
                    run_id="run", attempt=1, rank=rank, instance="one", sequence=count, severity=17, body=None,
                    name=c.NONFINITE_STEP.name, time=at(step), received_at=at(step), attributes=attributes,
                )
            )  # fmt: skip


def stored(database: Engine) -> list[Any]:
    with database.connect() as connection:
        return list(connection.execute(select(schema.finding)).mappings())


def test_a_healthy_run_has_no_findings(database: Engine) -> None:
    assert detect(database, [RUN, replace(RUN, status=Status.SUCCEEDED, ended_at=at(9))]) == []


@pytest.mark.parametrize(("status", "rule"), [(Status.FAILED, "run_failed"), (Status.LOST, "run_lost")])
@pytest.mark.parametrize(("run", "severity"), [(RUN, Severity.PAGE), (EXPERIMENT, Severity.TICKET)])
def test_a_sick_ending_pages_for_production_only(
    database: Engine, status: Status, rule: str, run: RunRow, severity: Severity
) -> None:
    (found,) = detect(database, [replace(run, status=status, reason="why", ended_at=at(9))])
    assert (found.rule, found.severity, found.evidence) == (rule, severity, {"reason": "why"})


def test_an_attempt_that_will_be_retried_wakes_nobody(database: Engine) -> None:
    assert detect(database, [replace(RUN, status=Status.FAILED, ended_at=at(9), will_retry=True)]) == []


def test_a_single_nan_is_a_ticket_at_its_step_and_layer(database: Engine) -> None:
    note_nonfinite(database, (40, 1))
    (found,) = detect(database, [RUN])
    assert (found.rule, found.severity) == ("nonfinite", Severity.TICKET)
    assert (found.step, found.layer, found.born_in, found.rank) == (40, "layer1.weight", "backward", 0)


@pytest.mark.parametrize("born_in", c.BIRTHPLACES)
def test_the_birthplace_of_a_nan_is_shown_with_its_step_layer_and_rank(
    database: Engine, database_url: str, born_in: str
) -> None:
    layer = None if born_in in ("input", "loss") else "blocks.1.fc1"
    told = {c.STEP: 40, c.NONFINITE_STEPS: 1, c.BORN_IN: born_in} | ({c.LAYER_NAME: layer} if layer else {})
    started = batch(source("run", rank=3), event(c.RUN_STARTED, 0))
    registry = Registry()
    with transaction(database) as connection:
        (key,) = registry.resolve(connection, [(started.source, at(0))])
        registry.apply(connection, [Received(key, started, at(0))])
        connection.execute(
            insert(schema.event).values(
                run_id="run", attempt=1, rank=3, instance="one", sequence=1, severity=17, body=None,
                name=c.NONFINITE_STEP.name, time=at(1), received_at=at(1), attributes=told,
            )
        )  # fmt: skip
        runs = list(load_runs(connection))
    observations = detect(database, runs)
    with transaction(database) as connection:
        reconcile(connection, observations, at(2))
    shown = CliRunner().invoke(main, ["runs", "show", "run", "--format", "json", "--db", database_url])
    assert shown.exit_code == 0, shown.output
    (finding,) = [one for one in json.loads(shown.output)["findings"] if one["rule"] == "nonfinite"]
    assert {name: finding[name] for name in ("step", "layer", "rank", "born_in")} == {
        "step": 40, "layer": layer, "rank": 3, "born_in": born_in,
    }  # fmt: skip


def test_of_several_ranks_the_one_that_saw_more_than_the_mean_gradient_is_blamed(database: Engine) -> None:
    note_nonfinite(database, (40, 1), rank=0, born_in=None)
    note_nonfinite(database, (40, 1), rank=1, born_in="input")
    (found,) = detect(database, [RUN])
    assert (found.step, found.rank, found.born_in) == (40, 1, "input")


@pytest.mark.parametrize("after", ["parameters", "loss"])
def test_what_the_next_optimizer_of_a_step_meets_is_no_birthplace(database: Engine, after: str) -> None:
    note_nonfinite(database, (40, 1), born_in=None)
    note_nonfinite(database, (40, 2), born_in=after)
    (found,) = detect(database, [RUN])
    assert (found.step, found.born_in, found.layer) == (40, None, "layer1.weight")


@pytest.mark.parametrize("after", ["parameters", None])
def test_a_step_that_is_not_known_is_told_as_the_steps_between_which_it_came(
    database: Engine, after: str | None
) -> None:
    note_nonfinite(database, (40, 1), born_in=None, since=39)
    note_nonfinite(database, (40, 2), born_in=after)  # what it left behind
    (found,) = detect(database, [RUN])
    assert (found.step, found.born_in, found.layer) == (None, None, "layer1.weight")
    assert (found.evidence["earliest_step"], found.evidence["latest_step"]) == (39, 40)


def test_a_rank_that_knows_the_step_and_the_birthplace_is_believed_before_one_that_does_not(
    database: Engine,
) -> None:
    note_nonfinite(database, (40, 1), born_in=None, since=39)
    note_nonfinite(database, (40, 1), rank=1, born_in="input")
    (found,) = detect(database, [RUN])
    assert (found.step, found.born_in, found.rank) == (40, "input", 1)


def test_repeated_nans_page_and_keep_the_first_step(database: Engine) -> None:
    note_nonfinite(database, (40, 1), (41, 2), (42, 3))
    (found,) = detect(database, [RUN])
    assert (found.severity, found.step, found.evidence["nonfinite_steps"]) == (Severity.PAGE, 40, 3)
    (found,) = detect(database, [EXPERIMENT])
    assert found.severity is Severity.TICKET


@pytest.mark.parametrize(
    ("reports", "repeated"),
    [
        ([(10, 1), (60, 2)], False),
        ([(10, 1), (60, 2), (109, 3)], True),
        ([(10, 1), (60, 2), (110, 3)], False),
        ([(10, 1), (1000, 2), (2000, 3)], False),
        ([(0, 10), (1000, 100)], True),
        ([(0, 10), (100_000, 100)], False),
        ([(20, 1), (20, 2), (20, 3)], False),  # three optimizers of one step
    ],
)
def test_repeated_means_three_bad_steps_in_a_hundred(
    database: Engine, reports: list[tuple[int, int]], repeated: bool
) -> None:
    note_nonfinite(database, *reports)
    with database.connect() as connection:
        rows = connection.execute(select(schema.event.c.rank, schema.event.c.attributes)).mappings().all()
    assert is_repeated(rows, Parameters()) is repeated


@pytest.mark.parametrize(
    ("reports", "last_step", "is_open"),
    [
        ([(40, 1)], 1039, True),
        ([(40, 1)], 1040, False),
        ([(0, 1), (9, 10)], 1009, False),
        # After the tenth the next that is told is the hundredth, which may be far.
        ([(0, 1), (900, 10)], 9_909, True),
        ([(0, 1), (900, 10)], 9_910, False),
    ],
)
def test_after_so_many_good_steps_it_is_over_however_the_run_ends(
    database: Engine, reports: list[tuple[int, int]], last_step: int, is_open: bool
) -> None:
    note_nonfinite(database, *reports)
    later = replace(RUN, last_step=last_step)
    for run in (later, replace(later, status=Status.SUCCEEDED, ended_at=at(9))):
        (found,) = detect(database, [run])
        assert found.is_over is not is_open
    (found,) = detect(database, [replace(later, last_loss_nonfinite=True)])
    assert not found.is_over


@pytest.mark.parametrize(
    ("reports", "step", "repeated"),
    [
        ([(40, 1), (41, 2), (42, 3), (1042, 4)], 40, True),
        ([(40, 1), (41, 2), (42, 3), (1043, 4)], 1043, False),
        ([(40, 1), (41, 2), (42, 3), (5000, 4), (5001, 5), (5002, 6)], 5000, True),
        # Ninety were bad between the last two.
        ([(40, 1), (49, 10), (5000, 100)], 40, True),
    ],
)
def test_what_comes_after_many_good_steps_is_judged_by_itself(
    database: Engine, reports: list[tuple[int, int]], step: int, repeated: bool
) -> None:
    note_nonfinite(database, *reports)
    (found,) = detect(database, [RUN])
    assert (found.step, found.evidence["repeated"]) == (step, repeated)


def test_steps_that_were_bad_for_another_rank_were_not_good(database: Engine) -> None:
    note_nonfinite(database, (40, 1), (5000, 2))
    note_nonfinite(database, (40, 1), (900, 2), (1800, 3), (2700, 4), (3600, 5), (4500, 6), rank=1)
    (found,) = detect(database, [RUN])
    assert found.step == 40


def test_what_an_earlier_attempt_did_is_over_and_kept(database: Engine) -> None:
    note_nonfinite(database, (40, 1), (41, 2), (42, 3))
    (first,) = detect(database, [RUN])
    (second,) = detect(database, [replace(RUN, attempt=2)])
    assert (first.is_over, second.is_over, second.attempt) == (False, True, 1)
    for observation, state in ((second, "resolved"), (first, "open"), (second, "resolved")):
        with transaction(database) as connection:
            reconcile(connection, [observation], at(100))
        (row,) = stored(database)
        assert (row["state"], row["resolved_at"] is None, row["step"]) == (state, state == "open", 40)


def test_bad_steps_of_different_ranks_do_not_add_up(database: Engine) -> None:
    for rank in range(3):
        note_nonfinite(database, (40 + rank, 1), rank=rank)
    (found,) = detect(database, [RUN])
    assert (found.severity, found.rank) == (Severity.TICKET, 0)


def tell_memory(
    database: Engine, peaks: Sequence[float], limits: Sequence[float], *, host: float = 0, rank: int = 0
) -> None:
    devices = [{c.DEVICE: f"cuda:{index}"} for index in range(len(peaks))]
    frames = [
        frame(c.PROCESS_MEMORY, [{}], [1], [[host]]),
        frame(c.HOST_MEMORY_LIMIT, [{}], [1], [[100]]),
    ]
    if devices:
        frames += [
            frame(c.DEVICE_MEMORY_PEAK, devices, [1], [[peak] for peak in peaks]),
            frame(c.DEVICE_MEMORY_LIMIT, devices, [1], [[limit] for limit in limits]),
        ]
    registry, told = Registry(), batch(source(rank=rank, attempt=1), event(c.RUN_STARTED, 0), frames=frames)
    with transaction(database) as connection:
        (key,) = registry.resolve(connection, [(told.source, at(1))])
        registry.apply(connection, [Received(key, told, at(1))])


def test_the_tightest_device_of_any_rank_decides_about_headroom(database: Engine) -> None:
    tell_memory(database, [50, 89], [100, 100], host=99)
    assert detect(database, [RUN]) == []
    tell_memory(database, [50, 91], [100, 100], rank=1)
    (found,) = detect(database, [RUN])
    assert (found.rule, found.severity, found.evidence["headroom"]) == (
        "memory_headroom",
        Severity.TICKET,
        0.09,
    )


def test_a_small_device_that_is_full_is_not_hidden_by_a_large_one(database: Engine) -> None:
    tell_memory(database, [500, 95], [1000, 100])
    (found,) = detect(database, [RUN])
    assert found.evidence["headroom"] == 0.05


def test_without_a_device_the_host_decides_about_headroom(database: Engine) -> None:
    tell_memory(database, [], [], host=93)
    (found,) = detect(database, [RUN])
    assert found.evidence["headroom"] == 0.07


SEEN = Observation(
    run_id="run",
    attempt=1,
    rule="nonfinite",
    severity=Severity.TICKET,
    first_seen=at(1),
    last_seen=at(1),
    step=4,
)


def test_a_finding_opens_once_changes_in_place_and_resolves(database: Engine) -> None:
    def tell(observations: list[Observation], seconds: float) -> None:
        with transaction(database) as connection:
            reconcile(connection, observations, at(seconds))

    tell([SEEN], 1)
    louder = replace(SEEN, severity=Severity.PAGE, last_seen=at(5))
    tell([louder], 5)
    (row,) = stored(database)
    assert (row["severity"], row["state"], row["first_seen"], row["last_seen"]) == (
        "page",
        "open",
        at(1),
        at(5),
    )
    tell([], 6)
    (row,) = stored(database)
    assert (row["state"], row["resolved_at"]) == ("resolved", at(6))
    tell([louder], 7)
    (row,) = stored(database)
    assert (row["state"], row["resolved_at"], row["first_seen"]) == ("open", None, at(1))


def test_a_finding_that_opens_again_is_in_nobodys_hands_and_as_loud_as_a_new_one(database: Engine) -> None:
    def tell(observations: list[Observation], seconds: float) -> None:
        with transaction(database) as connection:
            reconcile(connection, observations, at(seconds))

    page = replace(SEEN, severity=Severity.PAGE, first_seen=at(1), last_seen=at(1))
    tell([page], 2)
    (row,) = stored(database)
    with transaction(database) as connection:
        acknowledge(connection, row["finding_id"], "on it", now=at(3))
    tell([page], 4)
    assert stored(database)[0]["note"] == "on it"
    tell([], 5)
    tell([replace(page, first_seen=at(90), last_seen=at(90))], 90 + 16 * 60)
    (row,) = stored(database)
    assert [row[name] for name in ("acknowledged_at", "acknowledged_by", "note")] == [None] * 3
    assert (row["first_seen"], row["severity"]) == (at(90), "ticket")
