"""How much each token may send: two token buckets for each, one of requests and one of bytes.

A bucket may go into debt. Whatever comes while anything is left is let through and paid back afterwards: a
request need not tell its size before it is read, and one larger than the bucket is not refused for ever.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from gradwatch_collector.otlp.errors import LimitedError

# A fleet's exports come in waves: what is allowed in this many seconds may come at once.
_BURST_SECONDS: Final = 10.0
# So that what is asked to come back finds something left.
_LEAST_WAIT: Final = 0.001


@dataclass(frozen=True, slots=True)
class Rates:
    """Requests a second and bytes a second, as they come over the wire; None is no limit."""

    requests: float | None = None
    bytes: float | None = None

    def over(self, other: Rates) -> Rates:
        """Return these, and the other's where these say nothing."""
        return Rates(
            other.requests if self.requests is None else self.requests,
            other.bytes if self.bytes is None else self.bytes,
        )


UNLIMITED: Final = Rates()


@dataclass(frozen=True, slots=True)
class Bucket:
    """``level`` of at most ten seconds' worth of ``rate``, as it was at ``at`` (seconds)."""

    rate: float
    level: float
    at: float

    @classmethod
    def full(cls, rate: float, now: float) -> Bucket:
        """Return a bucket nothing was taken from."""
        return cls(rate, rate * _BURST_SECONDS, now)

    def take(self, amount: float, now: float) -> Bucket:
        """Return what is left, which may be less than nothing."""
        filled = min(self.rate * _BURST_SECONDS, self.level + self.rate * (now - self.at))
        return replace(self, level=filled - amount, at=now)

    def wait(self, now: float) -> float:
        """Return the seconds until something is left; 0 if something is now."""
        level = self.take(0, now).level
        return 0.0 if level > 0 else -level / self.rate + _LEAST_WAIT


class Limits:
    """What every token has left in this process; each collector counts for itself. Thread-safe.

    Args:
        default: For tokens that have no limits of their own.
        clock: Seconds, monotonic.
    """

    def __init__(self, default: Rates = UNLIMITED, clock: Callable[[], float] = time.monotonic) -> None:
        self._default = default
        self._clock = clock
        self._lock = threading.Lock()
        # By name of the token. Only valid tokens get here, so there are no more than those.
        self._requests: dict[str, Bucket] = {}
        self._bytes: dict[str, Bucket] = {}

    def admit(self, name: str, own: Rates) -> None:
        """Count a request of the token ``name``, unless it has to wait.

        Raises:
            LimitedError: it sent too much; the error says how long to wait.
        """
        rates, now = own.over(self._default), self._clock()
        with self._lock:
            requests = _bucket(self._requests, name, rates.requests, now)
            received = _bucket(self._bytes, name, rates.bytes, now)
            wait = max((bucket.wait(now) for bucket in (requests, received) if bucket is not None), default=0.0)
            if not wait and requests is not None:
                self._requests[name] = requests.take(1, now)
        if wait:
            raise LimitedError(f"token {name!r} sends more than it may; try again in {wait:.3g} s", wait)

    def charge(self, name: str, own: Rates, size: int) -> None:
        """Count ``size`` bytes of a request that was let in."""
        rates, now = own.over(self._default), self._clock()
        with self._lock:
            received = _bucket(self._bytes, name, rates.bytes, now)
            if received is not None:
                self._bytes[name] = received.take(size, now)


def _bucket(held: dict[str, Bucket], name: str, rate: float | None, now: float) -> Bucket | None:
    if rate is None:
        return None
    bucket = held.get(name)
    return bucket if bucket is not None and bucket.rate == rate else Bucket.full(rate, now)
