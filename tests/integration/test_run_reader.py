"""What the machinery below the rules promises, on every database: nothing is missed, and nothing is made up."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, select

from gradwatch import conventions as c
from gradwatch_collector.findings import RULES, Detection, Observation, Severity, reconcile
from gradwatch_collector.findings.observation import Scene
from gradwatch_collector.findings.overrides import Override, OverridesError, parameters_of, read_overrides
from gradwatch_collector.findings.rule import ParametersOf, RunRule, SceneRule, Sighting
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


@pytest.mark.parametrize("status", ["failed", "lost"])
def test_what_was_over_when_it_became_known_pages_only_if_the_collector_concluded_it(
    database: Engine, status: str
) -> None:
    rule = f"run_{status}"
    for minutes, severity in ((14, "page"), (16, "page" if status == "lost" else "ticket")):
        seen = Observation(
            run_id=f"run{minutes}", attempt=1, rule=rule, severity=Severity.PAGE,
            first_seen=at(0), last_seen=at(0), concluded=status == "lost",
        )  # fmt: skip
        with transaction(database) as connection:
            reconcile(connection, [seen], at(60 * minutes))
            row = connection.execute(
                select(schema.finding.c.severity).where(schema.finding.c.run_id == seen.run_id)
            ).one()
        assert row.severity == severity


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
        ("rule: plateau", "a list of entries is expected"),
        ("- plateau", "entry 1: a mapping with `rule` is expected"),
        ("- {rule: data_starvatoin}", "there is no rule 'data_starvatoin': did you mean 'data_starvation'?"),
        ("- {rule: data_starvation, jobs: x}", "there is no `jobs`: did you mean 'job'?"),
        ("- {rule: data_starvation, job: 7}", "`job` is a pattern such as 'llm-*', not 7"),
        ("- {rule: data_starvation, tier: prod}", "`tier` is production or experiment, not 'prod'"),
        ("- {rule: data_starvation, enabled: maybe}", "`enabled` is true or false, not 'maybe'"),
        ("- {rule: data_starvation, parameters: 3}", "`parameters` is a mapping of names to numbers"),
        ("- {rule: data_starvation, parameters: {shar: 1}}", "no parameter 'shar': did you mean 'share'?"),
        ("- {rule: data_starvation, parameters: {share: half}}", "share is a number, not 'half'"),
        ("- {rule: data_starvation, parameters: {share: true}}", "share is a number, not True"),
        ("- {rule: stalled, parameters: {share: 1}}", "stalled has no parameter 'share'"),
        ("- {rule: x\n  y", "while parsing"),
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


def test_a_file_that_is_not_there_says_so_and_an_empty_one_sets_nothing(tmp_path: Path) -> None:
    with pytest.raises(OverridesError, match="No such file"):
        read_overrides(tmp_path / "absent.yaml", RULES.values())
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_overrides(tmp_path / "empty.yaml", RULES.values()) == []
