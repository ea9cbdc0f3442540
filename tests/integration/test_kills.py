"""A collector that is killed with SIGKILL while data comes in: acknowledged means committed, and once."""

from __future__ import annotations

from tests.soak.kills import kills


def test_what_a_killed_collector_acknowledged_is_stored_once(database_url: str) -> None:
    seen = kills(database_url, 5)
    assert seen.kills == 5
    assert seen.unanswered > 0, "no request met a dead collector"
    assert seen.acknowledged > 0
    assert (seen.lost, seen.twice) == (0, 0)
