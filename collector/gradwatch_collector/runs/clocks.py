"""What is known of a sender's clock, learned from when its events arrive. Pure: moments in Unix nanoseconds.

Nothing arrives before it happened, so an event from the future proves a clock that is ahead. One from the past
proves nothing: it may have waited on a disk. A clock that is behind shows by being steady: its events stay
late by the same time for two heartbeats in a row, where what is replayed from a disk comes much faster than it
was written, but for a pause now and then. Until one of these is seen the clock is taken to be right.

What comes from a clock that is ahead may have waited on a disk, too: it is at least so far ahead. How far is
known once it is steady, and what its sender told before is corrected until then.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

_SECOND: Final = 1_000_000_000
# What sending may take, and what two clocks that are kept right may differ by.
TOLERANCE: Final = 2 * _SECOND
# Heartbeats come every 5 s.
_STEADY: Final = 4 * _SECOND
_ENOUGH: Final = 2


@dataclass(frozen=True, slots=True)
class Clock:
    """The clock of one process.

    ``lag``: how late its events arrive, ``steady`` heartbeats in a row, the last of them at ``lag_since``.
    ``offset``: its clock less ours. ``sure``: the offset was seen and not just assumed. ``settled``: it was
    steady once, so that a change is one of the clock and not of what we know. ``started``, ``ended`` and
    ``newest``: what it told, and the newest moment that it told of, by its own clock. ``told_at``: when its
    ending was received. ``reached``: the first moment at which its target held, by its own clock, received at
    ``reached_told_at``; ``reached_at``: the same by ours.
    """

    lag: int | None = None
    lag_since: int = 0
    steady: int = 0
    offset: int = 0
    sure: bool = False
    settled: bool = False
    started: int | None = None
    ended: int | None = None
    told_at: int | None = None
    newest: int | None = None
    reached: int | None = None
    reached_told_at: int | None = None
    reached_at: int | None = None

    def hear(self, moment: int, received_at: int) -> Clock:
        """Return what is known once an event of ``moment``, by the sender's clock, is received."""
        lag = received_at - moment
        heard = self
        if self.lag is None or abs(lag - self.lag) > TOLERANCE:
            heard = replace(self, lag=lag, lag_since=received_at, steady=0)
        elif received_at - self.lag_since >= _STEADY:
            heard = replace(self, lag_since=received_at, steady=self.steady + 1)
        is_steady = heard.steady >= _ENOUGH
        if is_steady or lag < -self.offset - TOLERANCE:
            offset = -lag if abs(lag) > TOLERANCE else 0
            return replace(heard, offset=offset, sure=True, settled=heard.settled or is_steady)
        return replace(heard, sure=heard.sure or abs(lag) <= TOLERANCE)

    def ours(self, moment: int, received_at: int) -> int:
        """Return a moment of the sender by our clock; nothing happened after it was received."""
        return min(moment - self.offset, received_at)
