"""Tells on standard error how long it will take, and on a terminal how far it is."""

from __future__ import annotations

import sys
import time

from overhead.blocks import Tell


class Progress:
    """Of a run that is expected to take ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._left = self._whole = seconds
        self._start = time.perf_counter()
        print(f"this takes about {_long(seconds)}", file=sys.stderr)

    def part(self, name: str, seconds: float) -> Tell:
        """Begin with a part of it; the returned function says what of the part is under way."""
        begun = time.perf_counter()
        finished = self._whole - self._left
        pace = (begun - self._start) / finished if finished else 1.0  # as slow as it was up to here
        left = self._left * pace
        self._left -= seconds

        def tell(text: str) -> None:
            if sys.stderr.isatty():
                remaining = max(0.0, left - (time.perf_counter() - begun))
                print(f"\r\x1b[K{name}: {text}; {_long(remaining)} left", end="", file=sys.stderr, flush=True)

        return tell

    def end(self) -> None:
        """Wipe the line away."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _long(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
