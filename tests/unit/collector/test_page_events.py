"""What differs between two ticks, and who is told of it."""

from __future__ import annotations

from dataclasses import replace

from gradwatch_collector.findings import Observation, Severity
from gradwatch_collector.page.events import changes
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.service.snapshot import Snapshot
from gradwatch_slo.runs import Status
from tests.batches import at
from tests.run_views import RUNNING

A, B = (replace(RUNNING, run_id=name, team=team) for name, team in (("a", "vision"), ("b", "speech")))


def snapshot(*runs: RunRow, findings: tuple[tuple[RunRow, Observation], ...] = ()) -> Snapshot:
    return Snapshot(evaluated_at=0, runs=runs, findings=findings)


def observation(run_id: str) -> Observation:
    return Observation(
        run_id=run_id,
        attempt=1,
        rule="nonfinite",
        severity=Severity.TICKET,
        first_seen=at(1),
        last_seen=at(1),
    )


def told(before: Snapshot, after: Snapshot, team: str | None = None, run_id: str | None = None) -> object:
    message = changes(before, after).json(team, run_id)
    return message and ([run["run_id"] for run in message["runs"]], message["findings"])


def test_nothing_is_told_where_nothing_changed() -> None:
    assert told(snapshot(A, B), snapshot(A, B)) is None


def test_runs_are_told_of_that_are_new_or_stand_otherwise() -> None:
    ended = replace(A, status=Status.SUCCEEDED)
    assert told(snapshot(A), snapshot(ended, B)) == (["a", "b"], [])
    assert told(snapshot(A), snapshot(ended, B), run_id="b") == (["b"], [])


def test_a_team_is_told_of_its_own_only() -> None:
    assert told(snapshot(), snapshot(A, B), team="vision") == (["a"], [])
    found = snapshot(A, B, findings=((B, observation("b")),))
    assert told(snapshot(A, B), found, team="vision") is None
    assert told(snapshot(A, B), found, team="speech") == ([], ["b"])


def test_findings_are_told_of_when_they_open_and_when_they_are_over() -> None:
    none, one = snapshot(A), snapshot(A, findings=((A, observation("a")),))
    assert told(none, one) == told(one, none) == ([], ["a"])


def test_of_very_many_some_are_told_and_that_there_are_more() -> None:
    many = [replace(RUNNING, run_id=f"{number}") for number in range(500)]
    message = changes(snapshot(), snapshot(*many)).json(None, None)
    assert message is not None
    assert (len(message["runs"]), message["more"]) == (100, True)
