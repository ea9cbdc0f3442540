"""What is known of a sender's clock, learned from when its events arrive. Pure: moments in Unix nanoseconds.

Nothing arrives before it happened, so an event from the future proves a clock that is ahead. One from the past
proves nothing: it may have waited on a disk. A clock that is behind shows by being steady: its events stay
late by the same time for as long as a heartbeat takes, where what is replayed from a disk comes much faster
than it was written. Until one of these is seen the clock is taken to be right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

_SECOND: Final = 1_000_000_000
# What sending may take, and what two clocks that are kept right may differ by.
TOLERANCE: Final = 2 * _SECOND
# Heartbeats come every 5 s: two of them are enough.
_STEADY: Final = 4 * _SECOND


@dataclass(frozen=True, slots=True)
class Clock:
    """The clock of one process.

    ``lag``: how late its events arrive, since ``lag_since``. ``offset``: its clock less ours. ``sure``: the
    offset was seen and not just assumed. ``started`` and ``ended``: what it told, by its own clock.
    ``told_at``: when its ending was received. ``newest``: the newest moment that it told of, by its own clock.
    """

    lag: int | None = None
    lag_since: int = 0
    offset: int = 0
    sure: bool = False
    started: int | None = None
    ended: int | None = None
    told_at: int | None = None
    newest: int | None = None

    def hear(self, moment: int, received_at: int) -> Clock:
        """Return what is known once an event of ``moment``, by the sender's clock, is received."""
        lag = received_at - moment
        changed = self.lag is None or abs(lag - self.lag) > TOLERANCE
        heard = replace(self, lag=lag, lag_since=received_at) if changed else self
        if lag < -self.offset - TOLERANCE or received_at - heard.lag_since >= _STEADY:
            return replace(heard, offset=-lag if abs(lag) > TOLERANCE else 0, sure=True)
        return replace(heard, sure=heard.sure or abs(lag) <= TOLERANCE)

    def ours(self, moment: int, received_at: int) -> int:
        """Return a moment of the sender by our clock; nothing happened after it was received."""
        return min(moment - self.offset, received_at)
