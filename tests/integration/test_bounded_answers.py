"""What pages ask of the API: chosen, sorted and counted by the database, of a size to look at."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch_collector.api.curves import CurvesQuery, list_curves
from gradwatch_collector.api.findings import FindingsQuery, list_findings
from gradwatch_collector.api.last_steps import last_steps_json
from gradwatch_collector.api.layer_maps import LayerMapQuery, layer_map_json
from gradwatch_collector.api.run_list import SORTS, RunsQuery, count_runs, list_runs, of_team
from gradwatch_collector.api.shapes import BadCursorError
from gradwatch_collector.api.slo_courses import list_courses
from gradwatch_collector.api.views import SECTIONS, show_run
from gradwatch_collector.objectives.evaluation import evaluate_objectives
from gradwatch_slo.objectives import default_objectives
from tests.batches import at, event, scalar
from tests.fleet import store_fleet
from tests.schemas import valid
from tests.told_runs import flight_record, look, tell_run

NAN = math.nan
BAD = event(c.NONFINITE_STEP, 5, 1, STEP=1, LAYER_NAME="fc.weight")
# Of the same form as ours: of a list in another order, and with a key of another kind.
FOREIGN_CURSORS = ("", "x", "W10=", "WyItbG9zcyIsICJ4IiwgMSwgInkiXQ==", "WyJzdGFydGVkIiwgMSwgMSwgInkiXQ==")


def runs(database: Engine, team: str | None = None, **asked: Any) -> list[dict[str, Any]]:
    """All runs that are asked for, two a page."""
    found: list[dict[str, Any]] = []
    cursor = None
    with database.connect() as connection:
        while True:
            page = valid(list_runs(connection, RunsQuery(limit=2, cursor=cursor, **asked), team), "run-list")
            found += page["runs"]
            if (cursor := page["next_cursor"]) is None:
                return found


def ids(found: Iterable[dict[str, Any]]) -> list[str]:
    return [run["run_id"] for run in found]


# --- Lists of runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sort", SORTS)
def test_pages_in_any_order_have_every_run_once_and_equals_newest_first(database: Engine, sort: str) -> None:
    store_fleet(database, 13)
    tell_run(database, "unknown", 0, losses=[NAN, NAN])
    found = runs(database, sort=sort)
    assert sorted(ids(found)) == sorted([*(f"fleet-{number:05}" for number in range(13)), "unknown"])
    of_fleet = [run for run in found if run["run_id"] != "unknown"]
    by = {
        "started": lambda run: run["started_at"],
        "seen": lambda run: run["last_seen_at"],
        "run": lambda run: run["run_id"],
        "job": lambda run: run["job"],
        "model": lambda run: run["model"],
        "step": lambda run: run["last_step"],
        "loss": lambda run: run["last_loss"],
        "status": lambda run: ["failed", "lost", "running", "cancelled", "succeeded"].index(run["status"]),
        "duration": lambda run: 3600,
    }[sort.removeprefix("-")]
    newest_first = sorted(of_fleet, key=lambda run: run["started_at"], reverse=True)
    assert ids(of_fleet) == ids(sorted(newest_first, key=by, reverse=sort.startswith("-")))
    if "loss" in sort:
        assert found[-1]["run_id"] == "unknown"


def test_runs_are_found_by_what_they_contain_status_and_tier(database: Engine) -> None:
    store_fleet(database, 24)
    tell_run(database, "100%_sure", 0, resource={c.TIER: "experiment"})
    assert ids(runs(database, text="BERT", statuses=["failed", "cancelled"])) == ["fleet-00010", "fleet-00022"]
    assert ids(runs(database, tier="experiment")) == ["100%_sure"]
    assert ids(runs(database, text="0%_")) == ["100%_sure"]
    assert ids(runs(database, job="gpt", statuses=["lost"])) == ["fleet-00011", "fleet-00023"]
    assert runs(database, team="speech") == []


@pytest.mark.parametrize("cursor", FOREIGN_CURSORS)
def test_a_cursor_of_another_list_is_refused(database: Engine, cursor: str) -> None:
    with database.connect() as connection, pytest.raises(BadCursorError):
        list_runs(connection, RunsQuery(sort="-loss", cursor=cursor))


def test_runs_and_their_open_findings_are_counted(database: Engine) -> None:
    store_fleet(database, 12)
    tell_run(database, "sick", 0, BAD, resource={c.TIER: "production", c.TEAM: "speech"})
    look(database, 20)
    with database.connect() as connection:
        all_runs = valid(count_runs(connection, RunsQuery()), "run-counts")
        assert all_runs["total"] == 13
        assert all_runs["statuses"] == {"running": 0, "succeeded": 10, "failed": 1, "cancelled": 1, "lost": 1}
        of_teams = [count_runs(connection, RunsQuery(), team) for team in ("vision", "speech")]
        assert [each["total"] for each in of_teams] == [12, 1]
        assert sum(of_teams[1]["open_findings"].values()) > 0
        for severity, count in all_runs["open_findings"].items():
            assert sum(each["open_findings"][severity] for each in of_teams) == count
        assert count_runs(connection, RunsQuery(text="sick"))["total"] == 1


def test_findings_of_several_runs_are_asked_for_at_once(database: Engine) -> None:
    for name in ("a", "b", "c"):
        tell_run(database, name, 0, BAD)
    look(database, 20)
    with database.connect() as connection:
        found = list_findings(connection, FindingsQuery(run_ids=("a", "c")))["findings"]
    assert {each["run_id"] for each in found} == {"a", "c"}


def test_of_a_run_only_the_sections_are_read_that_are_asked_for(database: Engine) -> None:
    tell_run(database, "run", 0)
    with database.connect() as connection:
        some = valid(show_run(connection, "run", sections=["findings", "history"]), "run-detail")
        every = valid(show_run(connection, "run"), "run-detail")
    assert every.keys() - some.keys() == {*SECTIONS} - {"findings", "history"}
    assert every["history"] == some["history"]


# --- Curves ----------------------------------------------------------------------------------------------


def curves(database: Engine, *metrics: c.Metric, **asked: Any) -> list[Any]:
    names = [metric.name for metric in metrics]
    with database.connect() as connection:
        answer = list_curves(connection, CurvesQuery(run_id="run", metrics=names, **asked))
    found: list[Any] = valid(answer, "curve-list")["curves"]
    return found


def test_a_short_curve_has_every_step(database: Engine) -> None:
    tell_run(database, "run", 0, losses=[3.0, NAN, 1.0], first_step=7)
    loss, norm = curves(database, c.LOSS, c.GRADIENT_NORM)
    assert (loss["metric"], loss["steps"], loss["values"]) == ("training.loss", [7, 8, 9], [3.0, None, 1.0])
    assert loss["nonfinite"] == [0, 1, 0]
    assert (norm["values"], norm["rank"], norm["attempt"]) == ([9.0, None, 3.0], 0, 1)


def test_a_long_curve_keeps_what_sticks_out_and_what_is_not_finite(database: Engine) -> None:
    losses = [1.0] * 1_000
    losses[500], losses[501], losses[900] = 50.0, NAN, -2.0
    tell_run(database, "run", 0, losses=losses)
    (loss,) = curves(database, c.LOSS, points=10)
    assert loss["steps"] == list(range(99, 1_000, 100))
    assert [each for each in loss["most"] if each != 1.0] == [50.0]
    assert [each for each in loss["least"] if each != 1.0] == [-2.0]
    assert loss["nonfinite"] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert loss["values"][5] == pytest.approx((98 + 50) / 99, rel=1e-5)
    assert loss["values"][0] == 1.0


def test_every_rank_is_told_of_only_if_asked_for(database: Engine) -> None:
    for rank in range(3):
        tell_run(database, "run", 0, rank=rank)
    assert [each["rank"] for each in curves(database, c.DEVICE_MEMORY_HEADROOM)] == [0]
    assert [each["rank"] for each in curves(database, c.DEVICE_MEMORY_HEADROOM, every_rank=True)] == [0, 1, 2]


def test_curves_of_one_process_are_in_the_order_in_which_they_appeared(database: Engine) -> None:
    rates = [scalar(c.LEARNING_RATE, [1], [0.1], **{c.OPTIMIZER: number}) for number in range(1, 9)]
    tell_run(database, "run", 0, frames=rates)
    found = [curve["labels"].get(c.OPTIMIZER) for curve in curves(database, c.LEARNING_RATE)]
    assert found == [None, *range(1, 9)]


def test_a_metric_that_was_never_sent_has_no_curve(database: Engine) -> None:
    tell_run(database, "run", 0)
    assert curves(database, c.LOGGED) == []


# --- Layers ----------------------------------------------------------------------------------------------


def layers(database: Engine, **asked: Any) -> Any:
    with database.connect() as connection:
        return valid(layer_map_json(connection, LayerMapQuery(run_id="run", **asked)), "layer-map")


def test_a_map_of_layers_has_the_largest_norm_of_each_stretch(database: Engine) -> None:
    tell_run(database, "run", 0, losses=[4.0, 3.0, 2.0, 1.0], layers=("a", "b"))
    found = layers(database, stretches=2)
    assert [row["layer"] for row in found["rows"]] == ["a", "b"]
    assert found["values"] == [[4.0, 2.0], [8.0, 4.0]]
    assert (found["layer_count"], found["nonfinite_count"], found["first_step"]) == (2, 0, 0)
    assert found["ends"][-1] == pytest.approx(3, abs=0.01)


def test_many_layers_share_rows_and_a_text_chooses_among_them(database: Engine) -> None:
    names = [f"Block.{number}" for number in range(10)]
    tell_run(database, "run", 0, losses=[1.0, 1.0], layers=names)
    found = layers(database, rows=4, stretches=1)
    assert [(row["layer"], row["last_layer"], row["layer_count"]) for row in found["rows"]] == [
        ("Block.0", "Block.2", 3),
        ("Block.3", "Block.5", 3),
        ("Block.6", "Block.7", 2),
        ("Block.8", "Block.9", 2),
    ]
    assert found["values"] == [[3.0], [6.0], [8.0], [10.0]]
    chosen = layers(database, rows=4, text="block.7")
    assert ([row["layer"] for row in chosen["rows"]], chosen["layer_count"]) == (["Block.7"], 10)
    assert layers(database, text="none")["rows"] == []


def test_what_was_not_finite_is_marked_whoever_told_of_it(database: Engine) -> None:
    told = event(c.NONFINITE_STEP, 5, 1, STEP=2, LAYER_NAME="event", BORN_IN="backward")
    record = flight_record([1.0, NAN], layers=("box",))
    box = event(c.FLIGHT_RECORD, 6, 2, FLIGHT_TRIGGER="nonfinite", FLIGHT_DATA=record)
    odd = event(c.FLIGHT_RECORD, 7, 3, FLIGHT_TRIGGER="nonfinite", FLIGHT_DATA="no box")
    tell_run(database, "run", 0, told, box, odd, losses=[1.0, 2.0, NAN, 4.0], layers=("norm",))
    found = layers(database)
    # An event and a box tell the step; a norm the end of its stretch. Layers without any norm are at the end.
    assert [row["layer"] for row in found["rows"]] == ["norm", "box", "event"]
    marks = {(mark["layer"], mark["row"], mark["step"]) for mark in found["nonfinite"]}
    assert {("box", 1, 1), ("event", 2, 2)} <= marks
    assert {(layer, row) for layer, row, _ in marks} == {("norm", 0), ("box", 1), ("event", 2)}
    assert found["nonfinite_count"] == 3
    assert found["values"][1] == [None] * len(found["ends"])


def test_steps_whose_loss_or_norm_was_not_finite_are_told_of_though_no_layer_is(database: Engine) -> None:
    losses = [1.0] * 100
    losses[21:80] = [NAN] * 59
    losses[90] = NAN
    born = event(c.NONFINITE_STEP, 5, 1, STEP=20, LAYER_NAME="block", BORN_IN="forward")
    tell_run(database, "run", 0, born, losses=losses, layers=("norm",))
    found = layers(database)
    assert found["nonfinite_steps"] == {"first": 20, "last": 90, "count": 61}
    assert found["nonfinite_spans"] == [[20, 79], [90, 90]]
    # Values are born in a module's output: that is no gradient, and no row.
    assert [row["layer"] for row in found["rows"]] == ["norm"]
    assert layers(database, text="none")["nonfinite_steps"] == found["nonfinite_steps"]


def test_the_first_bad_step_is_told_to_the_step_however_few_points_a_curve_has(database: Engine) -> None:
    told = event(c.NONFINITE_STEP, 5, 1, STEP=503, LAYER_NAME="fc.weight", BORN_IN="backward")
    tell_run(database, "run", 0, told, losses=[*[1.0] * 504, *[NAN] * 96])
    tell_run(database, "run", 900, losses=[1.0, 2.0], attempt=2)
    with database.connect() as connection:
        asked = CurvesQuery(run_id="run", metrics=[c.LOSS.name, c.GRADIENT_NORM.name], points=6)
        answer = valid(list_curves(connection, asked), "curve-list")
        of_loss = list_curves(connection, CurvesQuery(run_id="run", metrics=[c.LOSS.name]))
        by_layer = layer_map_json(connection, LayerMapQuery(run_id="run", attempt=1))
    loss, _, norm, _ = answer["curves"]
    assert loss["nonfinite_steps"] == {"first": 504, "last": 599, "count": 96}
    assert norm["nonfinite_steps"] == loss["nonfinite_steps"]
    assert answer["nonfinite_gradients"] == [{"attempt": 1, "first": 503, "last": 599, "count": 97}]
    assert by_layer["nonfinite_steps"] == {"first": 503, "last": 599, "count": 97}
    assert of_loss["nonfinite_gradients"] == []


def test_of_several_attempts_the_newest_is_shown_unless_told_otherwise(database: Engine) -> None:
    tell_run(database, "run", 0, layers=("old",), ending={"STATUS": "failed", "WILL_RETRY": True})
    tell_run(database, "run", 30, layers=("new",), attempt=2)
    assert layers(database)["rows"][0]["layer"] == "new"
    assert layers(database, attempt=1)["rows"][0]["layer"] == "old"


def test_a_run_without_layers_has_an_empty_map(database: Engine) -> None:
    assert layers(database)["rows"] == []


# --- The black box ---------------------------------------------------------------------------------------


def test_the_last_steps_are_numbers_and_those_that_are_none_are_named(database: Engine) -> None:
    box = event(c.FLIGHT_RECORD, 6, 2, FLIGHT_TRIGGER="nonfinite", FLIGHT_DATA=flight_record([2.0, NAN]))
    tell_run(database, "run", 0, box)
    with database.connect() as connection:
        found = valid(last_steps_json(connection, "run"), "last-steps")
        none = valid(last_steps_json(connection, "other"), "last-steps")
    assert (found["trigger"], found["step_count"]) == ("nonfinite", 2)
    first, last = found["steps"]
    assert first == {
        "step": 0, "loss": 2.0, "gradient_norm": 6.0, "learning_rate": 0.1, "duration": 1.0,
        "layer": "fc.weight", "norm": 4.0, "nonfinite": {},
    }  # fmt: skip
    assert (last["loss"], last["nonfinite"]["loss"], last["nonfinite"]["norm"]) == (None, "NaN", "NaN")
    assert (none["trigger"], none["steps"]) == (None, [])


# --- Budgets ---------------------------------------------------------------------------------------------


def test_the_course_of_a_budget_ends_where_its_report_stands(database: Engine) -> None:
    for number in range(6):
        ending = {"STATUS": "failed", "REASON": "ValueError"} if number in (1, 4) else None
        tell_run(database, f"run-{number}", 3_600 * 24 * number, seconds=600, ending=ending)
    now = at(3_600 * 24 * 6)
    chosen = [each for each in default_objectives().objectives if each.name == "training-success-rate"]
    with database.connect() as connection:
        reports = {str(report.group): report for report in evaluate_objectives(connection, chosen, now)}
        found = valid(list_courses(connection, chosen, now), "slo-course-list")["courses"]
        others = list_courses(connection, chosen, now, *of_team("speech"))["courses"]
    assert {each["bad"][-1] for each in others} == {0}
    by_tier = {course["group"]["tier"]: course for course in found}
    course = by_tier["experiment"]
    assert course["bad"][0] == 0
    assert course["bad"][-1] == 2
    assert course["bad"] == sorted(course["bad"])
    assert len(course["times"]) == len(course["bad"]) == len(course["budget_remaining"])
    report = next(report for report in reports.values() if report.group["tier"] == "experiment")
    assert course["budget_remaining"][-1] == report.budget_remaining
    assert by_tier["production"]["budget_remaining"] == [1.0] * len(by_tier["production"]["times"])
