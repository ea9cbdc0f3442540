"""Time stamps that never repeat and never go back."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Unix nanoseconds of one stream, strictly increasing.

    One wall-clock anchor plus the monotonic clock: a wall clock that jumps cannot make two steps share a
    time stamp. Not thread-safe: a stream has one writer, or a lock of its own.

    Attributes:
        anchor: What to add to the monotonic clock's nanoseconds to get Unix nanoseconds.
    """

    __slots__ = ("_last", "_monotonic", "anchor")

    def __init__(
        self,
        wall: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._monotonic = monotonic
        self.anchor = wall() - monotonic()
        self._last = 0

    def branch(self) -> Clock:
        """Another stream on the same anchor, so that both agree on what time it is."""
        # A wall clock that reads the anchor back, whatever the machine's clock says by now.
        return Clock(lambda: self.anchor + self._monotonic(), self._monotonic)

    def now(self) -> int:
        """The present, later than every earlier answer."""
        now = self.anchor + self._monotonic()
        if now <= self._last:
            now = self._last + 1
        self._last = now
        return now
