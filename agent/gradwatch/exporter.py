"""The export thread: the only one that talks to the outside, in slices, and never at training's expense."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from gradwatch.safety import Throttle, internal_error, log
from gradwatch.telemetry import Attributes, Event, Exporter, Metrics, RefusedError, count_points

T = TypeVar("T")

HEARTBEAT_SECONDS: Final = 5.0

# Kept for a collector that is away; past these the oldest go, and are counted. About 20 MB together.
_EVENTS_KEPT: Final = 10_000
_POINTS_KEPT: Final = 50_000
# Python threads share one lock: hold it for about this long, then let training have it.
_SLICE_SECONDS: Final = 0.0003
_REST_SECONDS: Final = 0.0005


class Pacer:
    """Called between small pieces of background work; rests when a slice is used up.

    A slice is processor time: on the clock, a wait for training to let go of the lock would be taken for one.
    That clock is a system call, so it is read once a slice.
    """

    def __init__(self) -> None:
        self._until = 0.0
        self._rested = 0.0

    def __call__(self) -> None:
        """Rest if it is time."""
        if time.perf_counter() < self._until:
            return
        used = time.thread_time() - self._rested
        if used >= _SLICE_SECONDS:
            time.sleep(_REST_SECONDS)
            self._rested = time.thread_time()
            used = 0.0
        # Less than none was used by another thread than the last.
        self._until = time.perf_counter() + _SLICE_SECONDS - max(0.0, used)


class ExportThread:
    """Delivers events at once and metrics once an interval; keeps what could not be delivered, within a bound.

    Args:
        exporter: Where to.
        resource: Called at each delivery, so that a model added later is in it.
        collect: Makes the points of the interval; gets the number of items dropped, and the nanoseconds of
            processor time this thread took, since the last call.
        heartbeat: Emits a sign of life.
        interval: Seconds between deliveries of metrics.
        destination: Named in the one warning a minute about a collector that is away.
    """

    def __init__(
        self,
        exporter: Exporter,
        resource: Callable[[], Attributes],
        collect: Callable[[int, int], Metrics],
        heartbeat: Callable[[], None],
        interval: float,
        destination: str,
    ) -> None:
        self._exporter = exporter
        self._resource = resource
        self._collect = collect
        self._heartbeat = heartbeat
        self._interval = interval
        self._destination = destination
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()
        self._metrics: deque[Metrics] = deque()
        self._kept_points = 0
        self._dropped = 0
        self._cpu = 0
        self._away = Throttle()
        self._refused = Throttle()
        self._wake = threading.Event()
        self._flushes: deque[threading.Event] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="gradwatch-export", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def emit(self, event: Event) -> None:
        """Deliver an event as soon as possible. Never waits."""
        with self._lock:
            if len(self._events) >= _EVENTS_KEPT:
                self._events.popleft()
                self._dropped += 1
            self._events.append(event)
        self._wake.set()

    def flush(self, timeout: float) -> bool:
        """Have all sent, events first; wait at most ``timeout`` seconds. True when the attempt is over."""
        done = threading.Event()
        self._flushes.append(done)
        self._wake.set()
        return done.wait(timeout)

    def send_last_words(self, timeout: float) -> None:
        """Have the waiting events sent within ``timeout`` seconds, then what else there is time for.

        The export thread may be at a long delivery, so the events go from a thread of their own.
        """
        deadline = time.monotonic() + timeout
        sender = threading.Thread(target=self._send_events, name="gradwatch-last-words", daemon=True)
        sender.start()
        sender.join(timeout)
        self.flush(max(0.0, deadline - time.monotonic()))

    def close(self, timeout: float) -> None:
        """Flush, and end the thread, within ``timeout`` seconds."""
        if not self._thread.is_alive():
            return  # never started, or this is a forked child
        deadline = time.monotonic() + timeout
        self.flush(timeout)
        self._closing = True
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        next_beat = time.monotonic() + HEARTBEAT_SECONDS
        next_metrics = time.monotonic() + self._interval
        while not self._closing:
            self._wake.wait(max(0.0, min(next_beat, next_metrics) - time.monotonic()))
            self._wake.clear()
            flushes = [self._flushes.popleft() for _ in range(len(self._flushes))]
            now = time.monotonic()
            try:
                if now >= next_beat:
                    next_beat = now + HEARTBEAT_SECONDS
                    self._heartbeat()
                self._send_events()
                if flushes or now >= next_metrics:
                    next_metrics = now + self._interval
                    self._send_metrics()
            except Exception as error:  # noqa: BLE001 - rule 2: this thread must live as long as training
                for done in flushes:
                    done.set()
                internal_error(error, "export thread")
            for done in flushes:
                done.set()
        try:
            self._exporter.close()
        except Exception as error:  # noqa: BLE001
            internal_error(error, "closing the exporter")

    def _send_events(self) -> None:
        with self._lock:
            batch, self._events = self._events, deque()
        if not batch:
            return
        try:
            if not self._delivered(self._exporter.send_events, tuple(batch)):
                with self._lock:
                    self._events.extendleft(reversed(batch))
        except RefusedError as refusal:
            if len(batch) == 1:
                self._give_up(1, refusal)
            else:  # whichever it was that is not taken, the ending must not go with it
                for event in batch:
                    self._send_alone(event)

    def _send_alone(self, event: Event) -> None:
        try:
            if not self._delivered(self._exporter.send_events, (event,)):
                with self._lock:
                    self._events.append(event)
        except RefusedError as refusal:
            self._give_up(1, refusal)

    def _give_up(self, items: int, refusal: RefusedError) -> None:
        self._dropped += items
        if self._refused.allows():
            log.warning("%s refuses telemetry (%s): dropped; training goes on", self._destination, refusal)

    def _send_metrics(self) -> None:
        dropped, self._dropped = self._dropped, 0
        cpu = time.thread_time_ns()
        points = self._collect(dropped, cpu - self._cpu)
        self._cpu = cpu
        self._metrics.append(points)
        self._kept_points += count_points(points)
        while self._kept_points > _POINTS_KEPT and len(self._metrics) > 1:
            lost = count_points(self._metrics.popleft())
            self._kept_points -= lost
            self._dropped += lost
        while self._metrics:
            size = count_points(self._metrics[0])
            try:
                if not self._delivered(self._exporter.send_metrics, self._metrics[0]):
                    return
            except RefusedError as refusal:
                self._give_up(size, refusal)
            self._metrics.popleft()
            self._kept_points -= size

    def _delivered(self, send: Callable[[Attributes, Sequence[T]], bool], batch: Sequence[T]) -> bool:
        if send(self._resource(), batch):
            return True
        if self._away.allows():
            log.warning(
                "cannot deliver telemetry to %s; training goes on, and up to %d points are kept for it",
                self._destination, _POINTS_KEPT,
            )  # fmt: skip
        return False
