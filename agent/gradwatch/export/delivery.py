"""From encoded requests to a collector that may be away: a bounded queue, then the spool, then patience.

What cannot be delivered goes to disk at once, so that a process that is killed leaves it behind. Everything
here happens on the export thread, but for the last words of a dying process.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from gradwatch import conventions
from gradwatch.export.spool import Lane, Spool
from gradwatch.export.spool_records import Request, gzipped
from gradwatch.export.transport import REPLY_SECONDS, Away, Outcome, Taken
from gradwatch.safety import Throttle, internal_error, log
from gradwatch.telemetry import Attributes, Event, Metrics

# Encoded requests kept in memory where there is no place on disk; past this the oldest go, and are counted.
_MEMORY_BYTES: Final = 16 << 20
_FIRST_PAUSE: Final = 1.0
# Half of the silence after which a collector that is back calls a run lost.
_LONGEST_PAUSE: Final = 15.0


class Encoder(Protocol):
    """Turns telemetry into requests."""

    def events(self, resource: Attributes, events: Sequence[Event], *, urgent: bool) -> Request:
        """A request of events, oldest first."""

    def metrics(self, resource: Attributes, metrics: Metrics) -> Request:
        """A request of points."""


class Sender(Protocol):
    """Sends a request, and says what became of it."""

    def send(self, request: Request, seconds: float) -> Outcome:
        """Send; ``seconds`` bounds each wait."""

    def close(self) -> None:
        """Release what the sender holds."""


class Delivery:
    """A ``gradwatch.telemetry.Exporter`` that loses nothing while its collector is away.

    Endings and the first non-finite event overtake what waits; everything else keeps its order. The requests of
    dead processes are sent when there is nothing else to send.

    Args:
        encoder: Makes requests.
        sender: Sends them.
        spool: Where they are kept; None keeps them in memory only.
        destination: Named in warnings.
        clock: Monotonic seconds.
        chance: From 0 to 1: the many ranks of a run must not come back all at once.
    """

    def __init__(
        self,
        encoder: Encoder,
        sender: Sender,
        spool: Spool | None,
        destination: str,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] | None = None,
    ) -> None:
        self._encoder = encoder
        self._sender = sender
        self._spool = spool
        self._destination = destination
        self._clock = clock
        # A generator of its own: the one that everybody shares is training's.
        self._chance = chance or random.Random().random  # noqa: S311 - not for secrets
        self._lock = threading.Lock()
        self._urgent, self._normal = _Queue(), _Queue()
        self._in_flight: list[Request] = []
        self._lost = 0
        self._failures = 0
        self._not_before = self._asked = -math.inf
        self._adopted = False
        self._closed = False
        self._away, self._refused = Throttle(), Throttle()

    # --- Exporter ----------------------------------------------------------------------------------------

    def send_events(self, resource: Attributes, events: Sequence[Event]) -> None:
        """See ``gradwatch.telemetry.Exporter``."""
        urgent = [event for event in events if is_urgent(event)]
        if not urgent or not self._waiting():
            # Alone and in order: there is nothing to overtake.
            self._put(self._encoder.events(resource, events, urgent=bool(urgent)))
            return
        self._put(self._encoder.events(resource, urgent, urgent=True))
        others = [event for event in events if not is_urgent(event)]
        if others:
            self._put(self._encoder.events(resource, others, urgent=False))

    def send_metrics(self, resource: Attributes, metrics: Metrics) -> None:
        """See ``gradwatch.telemetry.Exporter``."""
        self._put(self._encoder.metrics(resource, metrics))

    def deliver(self, seconds: float, *, at_once: bool = False) -> float:
        """See ``gradwatch.telemetry.Exporter``."""
        deadline = self._clock() + seconds
        self._adopt(self._clock() + seconds / 2)  # the other half is for delivery
        pause = 0.0
        while pause <= 0 and (now := self._clock()) < deadline:
            pause = (self._asked if at_once else self._not_before) - now
            if pause <= 0:
                taken = self._next()
                wait = min(REPLY_SECONDS, deadline - now) if at_once else REPLY_SECONDS
                pause = math.inf if taken is None else self._send(*taken, wait)
        if 0 < pause < math.inf:
            self.keep()
        return pause

    def send_last_words(self, seconds: float) -> None:
        """See ``gradwatch.telemetry.Exporter``."""
        deadline = self._clock() + seconds
        with self._lock:
            urgent = list(self._urgent.requests)
        for request in urgent:
            left = deadline - self._clock()
            if left > 0 and self._asked <= self._clock() and self._takes(request):
                self._send(self._urgent, request, left)

    def keep(self) -> None:
        """See ``gradwatch.telemetry.Exporter``."""
        with self._lock:
            self._spill()

    def take_lost(self) -> int:
        """See ``gradwatch.telemetry.Exporter``."""
        with self._lock:
            lost, self._lost = self._lost, 0
            return lost if self._spool is None else lost + self._spool.take_lost()

    def close(self) -> None:
        """See ``gradwatch.telemetry.Exporter``."""
        with self._lock:
            if self._closed:
                return
            self._spill()
            self._closed = True
            if self._spool is not None:
                self._spool.close()
        self._sender.close()

    def forget_in_child(self) -> None:
        """See ``gradwatch.telemetry.Exporter``."""
        self._closed = True
        if self._spool is not None:
            self._spool.forget_in_child()

    # --- Queue and spool ---------------------------------------------------------------------------------

    def _put(self, request: Request) -> None:
        with self._lock:
            (self._urgent if request.urgent else self._normal).append(request)
            if self._urgent.size + self._normal.size > _MEMORY_BYTES:
                self._spill()
            while self._urgent.size + self._normal.size > _MEMORY_BYTES:
                self._lost += (self._normal if self._normal.requests else self._urgent).popleft().items

    def _spill(self) -> None:
        """Move what is in memory to the spool, as far as that takes it."""
        if self._spool is None or self._closed:
            return
        for queue in (self._urgent, self._normal):
            while queue.requests and self._spool.append(_compressed(queue.requests[0])):
                queue.popleft()

    def _waiting(self) -> bool:
        with self._lock:
            spool = self._spool
            return bool(
                self._urgent.requests
                or self._normal.requests
                or (spool is not None and (spool.urgent.segments or spool.normal.segments))
            )

    def _adopt(self, deadline: float) -> None:
        with self._lock:
            if not self._adopted and self._spool is not None and not self._closed:
                self._adopted = self._spool.adopt(lambda: self._clock() >= deadline)

    def _sources(self) -> Iterator[_Queue | Lane]:
        """In the order of delivery. What is on disk is older than what is in memory."""
        spool = self._spool
        if spool is None:
            yield from (self._urgent, self._normal)
        else:
            yield from (spool.urgent, self._urgent, spool.adopted_urgent)
            # A run that replayed another one's hour before its own heartbeats would be called lost.
            yield from (spool.normal, self._normal, spool.adopted)

    def _next(self) -> tuple[_Queue | Lane, Request] | None:
        with self._lock:
            for source in () if self._closed else self._sources():
                request = source.head()
                if request is not None and request not in self._in_flight:
                    self._in_flight.append(request)
                    return source, request
        return None

    def _takes(self, request: Request) -> bool:
        """Whether this urgent request is still to be sent, and nobody else is at it: it is ours then."""
        with self._lock:
            if request in self._in_flight or request not in self._urgent.requests:
                return False
            self._in_flight.append(request)
            return True

    # --- Sending -----------------------------------------------------------------------------------------

    def _send(self, source: _Queue | Lane, request: Request, seconds: float) -> float:
        """Send one request, and return the seconds to wait before the next."""
        try:
            outcome = self._sender.send(request, seconds)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the next one may be delivered
            internal_error(error, "delivery")
            outcome = Taken(request.items, repr(error))
        finally:
            with self._lock:
                self._in_flight.remove(request)
        if isinstance(outcome, Away):
            return self._wait(outcome)
        with self._lock:
            source.pop(request)
            self._lost += outcome.rejected
            self._failures = 0
            self._not_before = self._asked = -math.inf
        if (outcome.rejected or outcome.reason) and self._refused.allows():
            log.warning(
                "%s refuses telemetry (%s): %d items dropped; training goes on",
                self._destination, outcome.reason, outcome.rejected,
            )  # fmt: skip
        return 0.0

    def _wait(self, outcome: Away) -> float:
        now = self._clock()
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._failures, 10))
        pause *= 0.5 + 0.5 * self._chance()
        if outcome.after is not None:
            pause = max(pause, outcome.after * (1 + 0.1 * self._chance()))
            self._asked = now + pause
        self._failures += 1
        self._not_before = now + pause
        if self._away.allows():
            log.warning(
                "cannot deliver telemetry to %s (%s); training goes on, and what is not delivered is kept",
                self._destination, outcome.reason,
            )  # fmt: skip
        return pause


class _Queue:
    """Requests in memory, oldest first."""

    def __init__(self) -> None:
        self.requests: deque[Request] = deque()
        self.size = 0

    def append(self, request: Request) -> None:
        self.requests.append(request)
        self.size += len(request.body)

    def popleft(self) -> Request:
        request = self.requests.popleft()
        self.size -= len(request.body)
        return request

    def head(self) -> Request | None:
        return self.requests[0] if self.requests else None

    def pop(self, request: Request) -> None:
        """The request was delivered; it may have been spilled or dropped meanwhile."""
        if request in self.requests:
            self.requests.remove(request)
            self.size -= len(request.body)


def is_urgent(event: Event) -> bool:
    """Whether the event overtakes what waits: it is an ending, or the first that was not finite."""
    return event.name == conventions.RUN_ENDED.name or (
        event.name == conventions.NONFINITE_STEP.name and event.attributes.get(conventions.NONFINITE_STEPS) == 1
    )


def _compressed(request: Request) -> Request:
    if request.gzipped:
        return request
    return request._replace(body=gzipped(request.body), gzipped=True)
