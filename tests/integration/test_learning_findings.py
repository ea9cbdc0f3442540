"""Rules about how runs learn, over numbers in real databases: as they come in, and beside earlier runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch_collector.findings import Detection, Observation, reconcile
from gradwatch_collector.findings.precedents import load_precedents
from gradwatch_collector.findings.run_view import Levels
from gradwatch_collector.runs.facts import RunRow, load_runs
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.database import transaction
from tests.batches import at, batch, event, scalar, source
from tests.told_runs import tell, tell_run

FALLING = tuple(0.1 + 2.2 * np.exp(-np.arange(200) / 40))


def run_row(database: Engine, run_id: str) -> RunRow:
    with database.connect() as connection:
        return load_runs(connection, schema.run.c.run_id == run_id)[0]


def look(detection: Detection, database: Engine, run_id: str, seconds: float) -> dict[str, Observation]:
    with database.connect() as connection:
        runs = load_runs(connection, schema.run.c.run_id == run_id)
        found = detection.look(connection, runs, at(seconds), lambda: True).observations
    return {each.rule: each for each in found}


def precedents(database: Engine, run_id: str) -> Sequence[Levels]:
    with database.connect() as connection:
        return load_precedents(connection, run_row(database, run_id))


def test_a_run_that_diverges_is_found_while_it_trains_and_again_by_another_collector(database: Engine) -> None:
    sender, detection = source("run", model="net", dataset="digits", seed="1"), Detection()
    losses = np.concatenate([FALLING, np.full(100, 2.0)])

    def told(first: int, last: int) -> None:
        seconds = [float(second) for second in range(first, last)]
        frames = [
            scalar(c.STEP_INDEX, seconds, seconds),
            scalar(c.LOSS, seconds, losses[first:last].tolist()),
        ]
        tell(database, batch(sender, event(c.RUN_STARTED, 1), frames=frames), last)

    told(1, 200)
    assert look(detection, database, "run", 200) == {}
    told(200, 210)
    assert look(detection, database, "run", 210) == {}
    told(210, 260)
    found = look(detection, database, "run", 260)
    assert found.keys() == {c.RULE_DIVERGENCE}
    assert found[c.RULE_DIVERGENCE].step == 200
    assert look(Detection(), database, "run", 260) == found


def test_earlier_runs_that_went_well_are_what_a_run_is_held_against(database: Engine) -> None:
    for number in range(7):
        tell_run(database, f"good-{number}", 1_000 * number, losses=FALLING)
    tell_run(database, "other", 7_000, losses=FALLING, resource={c.SERVICE_NAME: "letters"})
    tell_run(database, "failed", 7_100, losses=FALLING, ending={"STATUS": "failed"})
    tell_run(database, "now", 10_000, losses=FALLING)
    known = precedents(database, "now")
    assert len(known) == 5
    for each in known:
        assert each.after.tolist() == [20 * place for place in range(1, 11)]
        assert each.values[0] == pytest.approx(np.median(FALLING[:20]))
        assert 0 < each.times[0] < each.times[-1] < 20e9
    assert precedents(database, "good-2")[0].values.tolist() == known[0].values.tolist()
    assert len(precedents(database, "good-2")) == 2


def test_a_run_with_a_finding_about_how_it_learned_is_no_example(database: Engine) -> None:
    tell_run(database, "ill", 0, losses=(2.3,) * 200)
    tell_run(database, "now", 1_000, losses=FALLING)
    found = look(Detection(), database, "ill", 100)
    assert found.keys() == {c.RULE_PLATEAU}
    assert len(precedents(database, "now")) == 1
    with transaction(database) as connection:
        reconcile(connection, found.values(), at(100))
    assert precedents(database, "now") == []


def test_a_run_far_behind_earlier_ones_is_slow(database: Engine) -> None:
    for number in range(3):
        tell_run(database, f"good-{number}", 1_000 * number, losses=FALLING)
    tell_run(database, "now", 10_000, losses=tuple(2.3 - 0.002 * np.arange(200)))
    found = look(Detection(), database, "now", 10_020)
    assert found.keys() == {c.RULE_SLOW_CONVERGENCE}
    assert found[c.RULE_SLOW_CONVERGENCE].evidence["runs"] == 3
