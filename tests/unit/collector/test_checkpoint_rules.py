"""Rules about checkpoints that failed or are old: what they see, and what they leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from gradwatch_collector.findings.rules import checkpoint_failed, checkpoint_stale
from gradwatch_collector.findings.run_view import CheckpointSeen
from gradwatch_slo.runs import Status
from tests.batches import at
from tests.run_views import RUNNING, view

FULL = "OSError: No space left on device"


def tried(seconds: float, state: str = "saved", *, name: str | None = None, rank: int = 0) -> CheckpointSeen:
    """One attempt to save, or to verify; its step is its second, its name its step's."""
    error = FULL if state == "failed" else None
    return CheckpointSeen(rank, at(seconds), state, name or f"{seconds}.pt", int(seconds), 10, 0.1, error)


def every(seconds: int, until: int, state: str = "saved") -> list[CheckpointSeen]:
    return [tried(each, state) for each in range(seconds, until + 1, seconds)]


def test_a_failure_is_told_with_its_error_until_a_good_one_has_followed_for_a_while() -> None:
    attempts = [tried(100), tried(200, "failed")]
    for given, saved_since in ((attempts, False), ([*attempts, tried(300)], True)):
        sighting = checkpoint_failed.detect(
            view(seconds=700, checkpoints=given), checkpoint_failed.Parameters()
        )
        assert sighting is not None
        assert (sighting.step, sighting.since) == (200, at(200))
        assert sighting.evidence == {
            "failed": 1,
            "attempted": len(given),
            "checkpoint": "200.pt",
            "error": FULL,
            "saved_since": saved_since,
        }
    for given, is_seen in ((attempts, True), ([*attempts, tried(300)], False)):
        sighting = checkpoint_failed.detect(
            view(seconds=900, checkpoints=given), checkpoint_failed.Parameters()
        )
        assert (sighting is not None) is is_seen


def test_a_run_whose_checkpoints_are_saved_has_none_that_failed() -> None:
    given = view(checkpoints=[tried(10), tried(20, "verified"), tried(30, "corrupt")])
    assert checkpoint_failed.detect(given, checkpoint_failed.Parameters()) is None


@pytest.mark.parametrize(
    ("seconds", "attempts"),
    [
        pytest.param(5000, every(300, 1500), id="no more since"),
        pytest.param(5000, [*every(300, 1500), *every(700, 4900, "failed")], id="all failed since"),
        pytest.param(
            1000, [tried(300), *(tried(900 + each, "failed") for each in range(3))], id="failures in a row"
        ),
        pytest.param(1000, [tried(900 + each, "failed") for each in range(3)], id="none was ever good"),
        pytest.param(
            5000,
            [*every(300, 4800), *(tried(each, "corrupt") for each in range(1800, 4801, 300))],
            id="corrupt ones",
        ),
    ],
)
def test_a_last_good_checkpoint_that_is_older_than_any_before_is_stale(
    seconds: int, attempts: Sequence[CheckpointSeen]
) -> None:
    given = view(seconds=seconds, checkpoints=attempts)
    sighting = checkpoint_stale.detect(given, checkpoint_stale.Parameters())
    assert sighting is not None
    assert sighting.evidence["age_seconds"] is None or sighting.evidence["age_seconds"] <= seconds


@pytest.mark.parametrize(
    ("seconds", "attempts"),
    [
        pytest.param(9000, [], id="never saved any"),
        pytest.param(9000, [tried(100)], id="no rhythm yet"),
        pytest.param(2000, every(300, 1500), id="not much older than usual"),
        pytest.param(100, every(2, 20), id="a short run"),
        pytest.param(
            9000, [tried(each) for each in (10, 500, 2500, 4000)], id="ever more rarely, as it gets better"
        ),
        pytest.param(5000, [*every(300, 4800), tried(4900, "failed"), tried(4950, "failed")], id="two failed"),
        pytest.param(
            2000,
            [
                *every(300, 1800),
                tried(1900, "corrupt", name="1800.pt"),
                tried(1950, "verified", name="1800.pt"),
            ],
            id="found good again",
        ),
        pytest.param(
            5000, [tried(each, rank=rank) for each in (1600, 3200, 4800) for rank in range(9)], id="many parts"
        ),
    ],
)
def test_a_run_that_saves_as_it_always_did_has_no_stale_checkpoint(
    seconds: int, attempts: Sequence[CheckpointSeen]
) -> None:
    given = view(seconds=seconds, checkpoints=attempts)
    assert checkpoint_stale.detect(given, checkpoint_stale.Parameters()) is None


def test_a_run_that_is_over_or_hangs_loses_nothing_more() -> None:
    over = replace(RUNNING, status=Status.SUCCEEDED, ended_at=at(5000))
    ended = view(seconds=5000, run=over, checkpoints=every(300, 1500))
    assert checkpoint_stale.detect(ended, checkpoint_stale.Parameters()) is None
    hanging = replace(view(seconds=1600, checkpoints=every(300, 1500)), now=at(9000))
    assert checkpoint_stale.detect(hanging, checkpoint_stale.Parameters()) is None
