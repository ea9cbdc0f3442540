"""The newest numbers of runs, in memory."""

from __future__ import annotations

from gradwatch import conventions as c
from gradwatch_collector.records import ProcessKey, Received
from gradwatch_collector.runs.live import LiveRuns
from tests.batches import batch, frame, source

KEY = ProcessKey("run", 1, 0, "one")


def test_what_is_sent_twice_is_added_once() -> None:
    live = LiveRuns()

    def nonfinite(second: int, steps: int) -> None:
        sent = frame(c.NONFINITE, [{}], [second], [[steps]])
        live.update([Received(KEY, batch(source(), frames=[sent]), 0)])

    nonfinite(1, 2)
    nonfinite(1, 2)
    nonfinite(2, 3)
    nonfinite(2, 3)
    assert live.gauge("run", c.NONFINITE) == 5
