"""What the machinery below the rules promises, on every database: nothing is missed, and nothing is made up."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, select

from gradwatch import conventions as c
from gradwatch_collector.findings import RULES, Detection, Observation, Severity, reconcile, run_reader
from gradwatch_collector.findings.observation import Scene
from gradwatch_collector.findings.overrides import Override, OverridesError, parameters_of, read_overrides
from gradwatch_collector.findings.rule import ParametersOf, Rule, RunRule, SceneRule, Sighting
from gradwatch_collector.findings.rules import data_starvation, missing_instrumentation
from gradwatch_collector.findings.run_reader import RunReader
from gradwatch_collector.findings.run_view import RunView
from gradwatch_collector.records import Frame
from gradwatch_collector.runs.facts import load_runs
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.compaction import compact
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.reading import read_after, read_series
from tests.batches import at, batch, event, frame, scalar, source
from tests.run_views import RUNNING
from tests.told_runs import tell

SETTINGS = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
STARTED = event(c.RUN_STARTED, 0)
LAYERS = [{c.LAYER_NAME: f"layer{index}.weight"} for index in range(3)]
_ids = count()


def look(reader: RunReader, database: Engine, run_id: str, seconds: float) -> RunView:
    with database.connect() as connection:
        runs = load_runs(connection, schema.run.c.run_id == run_id)
        (view,) = reader.read(connection, runs, at(seconds), lambda: True)
    return view


def told(view: RunView) -> dict[str, Any]:
    """Everything that was read, as plain lists: NaN is what it is, and equal to itself."""
    return {
        **{
            name: [
                (each.rank, each.attributes, *map(_listed, _arrays(each.recent, each.course)))
                for each in numbers
            ]
            for name, numbers in view.numbers.items()
        },
        **{
            name: [(each.rank, each.names, _listed(each.times), _listed(each.values)) for each in layers]
            for name, layers in view.layers.items()
        },
    }


def _arrays(*held: Any) -> list[Any]:
    return [getattr(each, name) for each in held for name in each.__slots__]


def _listed(values: Any) -> str:
    return repr(np.asarray(values).tolist())


def frames(first: int, last: int) -> list[Frame]:
    """Steps, one a second, with losses of which some are NaN, and what their layers told in this interval."""
    seconds = range(first + 1, last + 1)
    losses = [float("nan") if each % 17 == 0 else 1.0 / each for each in seconds]
    norms = [[float(first * index)] for index in range(len(LAYERS))]
    return [
        scalar(c.STEP_INDEX, seconds, range(first, last)),
        scalar(c.LOSS, seconds, losses),
        frame(c.LAYER_GRADIENT_NORM, LAYERS, [last], norms, "sum"),
        frame(c.LAYER_GRADIENT_NORM, LAYERS, [last], [[float(last - first)]] * len(LAYERS), "count"),
    ]


@SETTINGS
@given(st.lists(st.tuples(st.integers(1, 90), st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_what_is_read_bit_by_bit_is_what_is_read_at_once(
    database: Engine, chunks: Sequence[tuple[int, bool, bool]]
) -> None:
    """Chunks of so many steps; frames may become blocks, and the reader may look, after each."""
    run_id, reader, edges = f"run{next(_ids)}", RunReader(), [0]
    tell(database, batch(source(run_id), STARTED), 0)
    for steps, compacts, looks in chunks:
        edges.append(edges[-1] + steps)
        tell(database, batch(source(run_id), frames=frames(*edges[-2:])), edges[-1])
        if compacts:
            with transaction(database) as connection:
                compact(connection, at(10**6))
        if looks:
            look(reader, database, run_id, 1000.0 * len(edges))
    tell(database, batch(source(run_id), frames=frames(edges[-1], edges[-1] + 1)), edges[-1] + 1)
    seen = told(look(reader, database, run_id, 10**6))
    assert seen == told(look(RunReader(), database, run_id, 10**6))
    assert seen[c.STEP_INDEX.name][0][2] == repr([at(each) for each in range(1, edges[-1] + 2)][-512:])


@SETTINGS
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.data())
def test_what_is_read_after_a_time_is_the_rest_of_the_series(
    database: Engine, chunks: Sequence[int], data: st.DataObject
) -> None:
    run_id, edges = f"run{next(_ids)}", [0, *np.cumsum(chunks).tolist()]
    tell(database, batch(source(run_id), STARTED), 0)
    for first, last in pairwise(edges):
        tell(database, batch(source(run_id), frames=frames(first, last)), last)
        if data.draw(st.booleans()):
            with transaction(database) as connection:
                compact(connection, at(10**6))
    since = data.draw(st.sampled_from(edges))  # as far as somebody has read before
    with database.connect() as connection:
        whole = next(iter(read_series(connection, run_id, c.LOSS.name, since=at(since) + 1)), None)
        series = schema.series.c
        ids = connection.scalars(
            select(series.series_id)
            .join(schema.metric, schema.metric.c.metric_id == series.metric_id)
            .where(series.run_id == run_id, schema.metric.c.name == c.LOSS.name)
        ).all()
        rest = [part for _, parts in read_after(connection, dict.fromkeys(ids, at(since))) for part in parts]
    times = np.concatenate([part.times for part in rest]) if rest else np.empty(0)
    values = (
        np.concatenate([part.values[0] for part in rest if part.values is not None]) if rest else np.empty(0)
    )
    np.testing.assert_array_equal(times, [] if whole is None else whole.times)
    np.testing.assert_array_equal(values, [] if whole is None or whole.values is None else whole.values)


@pytest.mark.parametrize("number", [9.3e18, -9.3e18, 1e300, 0.5])
def test_a_step_that_no_database_can_hold_is_not_known(database: Engine, number: float) -> None:
    tell(database, batch(source(), STARTED, frames=[scalar(c.STEP_INDEX, [1, 2], [number] * 2)]), 2)
    assert look(RunReader(), database, "run", 3).step_at(at(2)) is None


def test_of_many_ranks_the_steps_of_all_are_read_and_all_that_the_lowest_tell(
    database: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = 6
    for rank in range(ranks):
        sent = [scalar(c.STEP_DURATION, [1], [0.1]), scalar(c.LOSS, [1], [2.0]), scalar(c.STEP_INDEX, [1], [0])]
        logged = [scalar(c.LOGGED, [1], [1.0], **{c.METRIC_NAME: f"name{each}"}) for each in range(4)]
        told_by = source(rank=rank, instance=str(rank))
        tell(database, batch(told_by, *([] if rank else [STARTED]), frames=[*logged, *sent]), 1)
    monkeypatch.setattr(run_reader, "_SERIES_OF", run_reader._SERIES_OF.limit(ranks + 2 * 4))
    seen = look(RunReader(), database, "run", 2).numbers
    assert [each.rank for each in seen[c.STEP_INDEX.name]] == list(range(ranks))
    assert [each.rank for each in seen[c.LOSS.name]] == list(range(4))
    assert [each.rank for each in seen[c.STEP_DURATION.name]] == list(range(4))
    assert c.LOGGED.name not in seen


def test_what_became_of_runs_that_went_on_beside_it_is_known_of_a_run(database: Engine) -> None:
    """They began before it, and end after it was first looked at."""
    reader = RunReader()
    for run_id in ("first", "second", "third"):
        begun = ("first", "second", "third").index(run_id)
        tell(database, batch(source(run_id, instance=run_id), event(c.RUN_STARTED, begun)), begun)
    assert predecessors_of("third", reader, database, 5) == []
    for run_id in ("first", "second"):
        ended = event(c.RUN_ENDED, 6, 1, STATUS="failed", EXCEPTION_TYPE="OSError")
        tell(database, batch(source(run_id, instance=run_id), ended), 6)
    tell(database, batch(source("third", instance="third"), frames=frames(6, 8)), 8)
    assert predecessors_of("third", reader, database, 9) == ["second", "first"]


def predecessors_of(run_id: str, reader: RunReader, database: Engine, seconds: float) -> list[str]:
    with database.connect() as connection:
        views = list(reader.read(connection, load_runs(connection), at(seconds), lambda: True))
    (view,) = [each for each in views if each.run.run_id == run_id]
    return [each.run.run_id for each in view.predecessors]


# --- Detection ---------------------------------------------------------------------------------------------


def starve(database: Engine, run_id: str, first: int, last: int, share: float = 0.9, **about: Any) -> None:
    """Steps of a second that wait for their data for so long."""
    seconds = range(first + 1, last + 1)
    tell(
        database,
        batch(
            source(run_id, instance=run_id, **about), STARTED,
            frames=[
                scalar(c.STEP_INDEX, seconds, range(first, last)),
                scalar(c.STEP_DURATION, seconds, [1.0] * len(seconds)),
                scalar(c.DATA_WAIT, seconds, [share] * len(seconds)),
            ],
        ),
        last,
    )  # fmt: skip


def observe(
    detection: Detection, database: Engine, seconds: float, more: Callable[[], bool] = lambda: True
) -> tuple[list[Observation], set[str]]:
    with database.connect() as connection:
        found = detection.look(connection, load_runs(connection), at(seconds), more)
    return sorted(found.observations, key=lambda each: each.run_id), set(found.unread)


def states(database: Engine) -> dict[str, str]:
    finding = schema.finding.c
    with database.connect() as connection:
        return {row.run_id: row.state for row in connection.execute(select(finding.run_id, finding.state))}


def test_whoever_judges_next_sees_what_was_seen_before(database: Engine) -> None:
    before = Detection()
    for first, last in pairwise(range(0, 80, 20)):
        starve(database, "starved", first, last)
        starve(database, "well", first, last, share=0.01)
        seen = observe(before, database, last)[0]
    assert [(each.run_id, each.rule) for each in seen] == [("starved", "data_starvation")]
    assert observe(Detection(), database, 60)[0] == seen


def test_what_was_not_read_for_want_of_time_is_as_it_was(database: Engine) -> None:
    for run_id in ("one", "two"):
        starve(database, run_id, 0, 40)
    seen, _ = observe(Detection(), database, 40)
    with transaction(database) as connection:
        reconcile(connection, seen, at(40))
    successor = Detection()
    for turns, unread in ((0, 2), (1, 1), (1, 0)):
        seen, left = observe(successor, database, 41, iter([True] * turns + [False]).__next__)
        assert len(left) == unread
        with transaction(database) as connection:
            reconcile(connection, seen, at(500), unread=left)
        assert set(states(database).values()) == {"open"}


def test_a_finding_is_resolved_once_its_rule_has_not_seen_it_for_as_long_as_it_says(database: Engine) -> None:
    seen = Observation(
        run_id="run", attempt=1, rule="plateau", severity=Severity.TICKET, first_seen=at(0), last_seen=at(0)
    )
    for seconds, observations, state in ((0, [seen], "open"), (59, [], "open"), (60, [], "resolved")):
        with transaction(database) as connection:
            reconcile(connection, observations, at(seconds), clears_after={"plateau": 60.0})
        assert states(database) == {"run": state}


def test_a_rule_that_raises_silences_no_other_rule_or_run_and_is_told_once(
    database: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(view: RunView, _: Any) -> Sighting | None:
        raise ZeroDivisionError(view.run.run_id)

    rule = RunRule(name="broken", severity=Severity.TICKET, cause="", action="", detect=broken)
    for run_id in ("one", "two"):
        starve(database, run_id, 0, 40)
    detection = Detection(run_rules=(rule, data_starvation.RULE))
    with caplog.at_level(logging.ERROR):
        seen, _ = observe(detection, database, 40)
    assert [each.run_id for each in seen] == ["one", "two"]
    assert len(caplog.records) == 1
    assert "rule broken failed on run" in caplog.text


def look_at(detection: Detection, database: Engine, seconds: float) -> list[str]:
    with database.connect() as connection:
        found = detection.look(connection, [RUNNING], at(seconds), lambda: True)
    return [each.rule for each in found.observations]


def of_all_runs(looks: list[int], *, every: float = 0.0) -> SceneRule:
    """A rule that sees something the first time, and fails the second."""

    def detect(scene: Scene, _: ParametersOf) -> list[Observation]:
        looks.append(scene.now)
        if len(looks) == 2:
            raise ZeroDivisionError
        seen = Observation(
            run_id="run", attempt=1, rule="of all", severity=Severity.TICKET, first_seen=scene.now,
            last_seen=scene.now,
        )  # fmt: skip
        return [seen]

    return SceneRule(name="of all", severity=Severity.TICKET, cause="", action="", detect=detect, every=every)


def test_what_a_rule_about_all_runs_saw_stands_where_it_fails_later(
    database: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    detection = Detection(scene_rules=[of_all_runs([])], run_rules=[])
    assert [look_at(detection, database, second) for second in range(3)] == [["of all"]] * 3
    assert [record.getMessage() for record in caplog.records] == ["rule of all failed on all runs; told once"]


def test_a_rule_that_takes_long_is_asked_as_often_as_it_says_and_again_when_the_clock_was_put_back(
    database: Engine,
) -> None:
    looks: list[int] = []
    detection = Detection(scene_rules=[of_all_runs(looks, every=60.0)], run_rules=[])
    assert [look_at(detection, database, second) for second in (0, 30, 59, 60, 90)] == [["of all"]] * 5
    assert looks == [at(0), at(60)]
    look_at(detection, database, 50)
    assert looks == [at(0), at(60), at(50)]


@pytest.mark.parametrize(("off", "seen"), [(False, ["missing_instrumentation"]), (True, [])])
def test_a_rule_without_parameters_is_on_until_it_is_turned_off(
    database: Engine, off: bool, seen: Sequence[str]
) -> None:
    tell(
        database,
        batch(source(), STARTED, event(c.INSTRUMENTATION_MISSING, 1, 1, MISSING_REASON="DeepSpeed")),
        2,
    )
    overrides = [Override(rule=missing_instrumentation.RULE.name, enabled=False)] if off else []
    assert [each.rule for each in observe(Detection(overrides), database, 3)[0]] == seen


@pytest.mark.parametrize(("alive_at", "severity"), [(7200, "page"), (60, "ticket")])
def test_a_hang_pages_if_the_run_was_heard_to_live_within_the_last_quarter_of_an_hour(
    database: Engine, alive_at: float, severity: str
) -> None:
    """Else it is of long ago, as its run is: both waited on a disk."""
    sender, hours_late = source(tier="production"), 7201
    tell(database, batch(sender, STARTED, event(c.STALLED, 60, 1, STEP=10)), hours_late)
    tell(database, batch(sender, event(c.RUN_HEARTBEAT, alive_at, 2)), hours_late)
    observations, _ = observe(Detection(), database, hours_late + 1)
    with transaction(database) as connection:
        reconcile(connection, observations, at(hours_late + 1))
        rows = connection.execute(select(schema.finding.c.rule, schema.finding.c.severity)).all()
    assert ("stalled", severity) in [tuple(row) for row in rows]


# --- Overrides ---------------------------------------------------------------------------------------------

OVERRIDES = """
- rule: data_starvation
  parameters: {share: 0.5}
- rule: data_starvation
  job: "llm-*"
  parameters: {share: 0.7, steps: 20}
- rule: data_starvation
  job: "llm-*"
  tier: production
  parameters: {share: 0.9}
- rule: data_starvation
  job: toy
  enabled: false
"""


@pytest.mark.parametrize(
    ("job", "tier", "expected"),
    [
        ("digits", "experiment", {"share": 0.5}),
        ("llm-7b", "experiment", {"share": 0.7, "steps": 20}),
        ("llm-7b", "production", {"share": 0.9, "steps": 20}),
        ("toy", "experiment", None),
    ],
)
def test_later_entries_that_fit_a_run_go_before_earlier_ones(
    tmp_path: Path, job: str, tier: str, expected: Mapping[str, Any] | None
) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(OVERRIDES)
    rule = data_starvation.RULE
    found = parameters_of(rule, read_overrides(path, RULES.values()))(replace(RUNNING, job=job, tier=tier))
    assert found == (None if expected is None else replace(rule.parameters, **expected))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule: plateau", "1: expected a list of entries, each with `rule`"),
        ("- plateau", "1: [0]: found 'plateau', expected a mapping with `rule`"),
        ("- {rule: stalled}\n---\n- {rule: stalled}", "found another document"),
        ("- {rule: stalled, rule: plateau}", "1: [0].rule: found the field twice"),
        ("- {rule: data_starvatoin}", "there is no rule 'data_starvatoin': did you mean 'data_starvation'?"),
        ("- {rule: [stalled]}", "there is no rule a list"),
        ("- {rule: data_starvation, jobs: x}", "there is no `jobs`: did you mean 'job'?"),
        ("- {rule: data_starvation, job: 7}", "[0].job: found 7, expected a pattern such as 'llm-*'"),
        ("- {rule: data_starvation, tier: prod}", "found 'prod', expected production or experiment"),
        ("- {rule: data_starvation, enabled: maybe}", "found 'maybe', expected true or false"),
        ("- {rule: data_starvation, parameters: 0}", "found 0, expected a mapping of names to numbers"),
        ("- {rule: data_starvation, parameters: {shar: 1}}", "no parameter 'shar': did you mean 'share'?"),
        ("- {rule: data_starvation, parameters: {share: half}}", "found 'half', expected a number from 0 to 1"),
        ("- {rule: data_starvation, parameters: {share: true}}", "found true, expected a number from 0 to 1"),
        ("- {rule: data_starvation, parameters: {share: 30}}", "found 30, expected a number from 0 to 1"),
        ("- {rule: data_starvation, parameters: {share: .nan}}", "parameters.share: found .nan"),
        ("- rule: nonfinite\n  parameters: {steps: .inf}", "2: [0].parameters.steps: found .inf"),
        ("- {rule: nonfinite, parameters: {steps: 2.7}}", "found 2.7, expected a whole number from 1 to"),
        ("- {rule: nonfinite, parameters: {window: -5}}", "found -5, expected a whole number from 1 to"),
        ("- {rule: over_clipping, parameters: {window: 1000}}", "expected a whole number from 1 to 512"),
        ("- {rule: gradient_explosion, parameters: {ratio: 0.5}}", "expected a number from 1 to 1,000,000,000"),
        (f"- {{rule: checkpoint_failed, parameters: {{remembered: 1{'0' * 400}}}}}", "a very long number"),
        ("- {rule: checkpoint_failed, parameters: {remembered: 100000000000}}", "from 0 to 1,000,000,000"),
        ("- {rule: stalled, parameters: {share: 1}}", "stalled has no parameter 'share'"),
        ("- {rule: x\n  y", "is not valid YAML"),
        ("[" * 3000, "nested too deeply"),
    ],
)
def test_a_file_that_cannot_be_used_says_where_and_why_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(OverridesError) as raised:
        read_overrides(path, RULES.values())
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if dataclasses.fields(rule.parameters)])
def test_every_default_is_within_its_own_limits_and_keeps_its_kind(tmp_path: Path, rule: Rule) -> None:
    path, known = tmp_path / "rules.yaml", dataclasses.asdict(rule.parameters)
    path.write_text(yaml.safe_dump([{"rule": rule.name, "parameters": known}]))
    (found,) = read_overrides(path, RULES.values())
    assert found.parameters == known
    assert {name: type(value) for name, value in found.parameters.items()} == {
        name: type(value) for name, value in known.items()
    }


def test_a_file_that_is_not_there_says_so_and_an_empty_one_sets_nothing(tmp_path: Path) -> None:
    with pytest.raises(OverridesError, match="No such file"):
        read_overrides(tmp_path / "absent.yaml", RULES.values())
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_overrides(tmp_path / "empty.yaml", RULES.values()) == []
