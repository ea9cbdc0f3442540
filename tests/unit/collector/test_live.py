"""The newest numbers of runs, of senders that say what cannot be."""

from __future__ import annotations

import math

import pytest

from gradwatch import conventions as c
from gradwatch_collector.live import LiveRuns
from gradwatch_collector.records import ProcessKey
from tests.batches import batch, scalar, source


@pytest.mark.parametrize(
    ("peak", "limit"),
    [
        (math.inf, 1.0),
        (math.nan, 1.0),
        (1.0, math.nan),
        (1.0, 0.0),
        (1.0, -1.0),
        (1e308, 5e-324),
        (-math.inf, 1.0),
    ],
)
def test_headroom_that_cannot_be_is_unknown(peak: float, limit: float) -> None:
    live = LiveRuns()
    frames = [scalar(c.DEVICE_MEMORY_PEAK, [1], [peak]), scalar(c.DEVICE_MEMORY_LIMIT, [1], [limit])]
    live.update([(ProcessKey("run", 1, 0, "one"), batch(source(), frames=frames), 0)])
    assert live.memory_headroom("run") is None
