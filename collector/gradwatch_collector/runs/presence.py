"""Since when this collector has been there to hear. Pure: moments in Unix nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Of the longest gap between two ticks this much is remembered at the next: slow ticks may be one in twenty.
_REMEMBERED: Final = 0.95


@dataclass(frozen=True, slots=True)
class Presence:
    """``up_since``: nobody could be heard before. ``heard_at``: the last tick. ``usual_gap``: between two."""

    up_since: int
    heard_at: int
    usual_gap: int = 0

    def tick(self, now: int, lost_after: int, *, failed: bool) -> Presence:
        """Return what holds at the next tick. ``failed``: ticks since the last one failed.

        A gap of half of ``lost_after`` means that the database was away, or this process suspended, if ticks
        failed or the gap is out of the ordinary: ticks that always take that long are only slow, and ingest
        goes on beside them.
        """
        gap = now - self.heard_at
        was_away = gap >= lost_after // 2 and (failed or gap > 2 * self.usual_gap)
        usual_gap = int(self.usual_gap * _REMEMBERED)
        return Presence(now if was_away else self.up_since, now, usual_gap if failed else max(gap, usual_gap))
