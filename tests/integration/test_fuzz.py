"""Spoiled requests, a minute's worth; ``make soak-fuzz`` sends a million."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.soak.fuzz import fuzz

# Fixed, so that a failure can be repeated. Others are for the long form.
SEED: Final = 20_250_615
REQUESTS: Final = 2_000


def test_spoiled_requests_disturb_nobody_and_good_ones_between_them_are_stored(
    database_url: str, tmp_path: Path
) -> None:
    print(f"seed {SEED}")
    seen = fuzz(database_url, REQUESTS, SEED, tmp_path / "findings")
    assert seen.broken == []
    assert seen.missing == 0
    assert seen.is_met
    # Otherwise they were not spoiled, or too much to reach anything.
    assert {"taken", "in part", "refused"} <= seen.verdicts.keys()
    assert seen.good > REQUESTS / 4
