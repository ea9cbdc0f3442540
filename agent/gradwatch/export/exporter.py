"""The export thread: the only one that talks to the outside, in slices, and never at training's expense."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from gradwatch.safety import internal_error
from gradwatch.telemetry import Attributes, Event, Exporter, Metrics

# Kept while this thread is at a long delivery; past these the oldest go, and are counted.
_EVENTS_KEPT: Final = 10_000
# A long backlog is delivered in turns with signs of life and fresh telemetry.
_TURN_SECONDS: Final = 1.0
# At the end of the process, for a collection under way.
_COLLECT_SECONDS: Final = 0.2
# What the events get to be handed over, and so kept, where there is no time to send them.
_HAND_OVER_SECONDS: Final = 0.02
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
    """Hands events over at once and metrics once an interval, and has the exporter deliver them.

    Args:
        exporter: Where to.
        resource: Called at each delivery, so that a model added later is in it.
        collect: Makes the points of the interval; gets the number of items dropped, and the nanoseconds of
            processor time this thread took, since the last call.
        heartbeat: Emits a sign of life.
        errand: Called whenever the thread is awake, before anything is collected; returns the seconds after
            which it wants to be called again, None if that has time.
        interval: Seconds between deliveries of metrics.
        beat: Seconds between signs of life.
    """

    def __init__(
        self,
        exporter: Exporter,
        resource: Callable[[], Attributes],
        collect: Callable[[int, int], Metrics],
        heartbeat: Callable[[], None],
        errand: Callable[[], float | None],
        interval: float,
        beat: float,
    ) -> None:
        self._exporter = exporter
        self._resource = resource
        self._collect = collect
        self._heartbeat = heartbeat
        self._errand = errand
        self._interval = interval
        self._beat = beat
        self._lock = threading.Lock()
        self._collecting = threading.Lock()
        self._handing_over = threading.Lock()
        self._events: deque[Event] = deque()
        self._dropped = 0
        self._cpu = 0
        self._wake = threading.Event()
        self._flushes: deque[tuple[threading.Event, float]] = deque()
        self._collected_last = self._closing = False
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

    def wake(self) -> None:
        """There is an errand to run. Never waits."""
        self._wake.set()

    def flush(self, timeout: float) -> bool:
        """Have all sent, events first; wait at most ``timeout`` seconds. True when the attempt is over."""
        done = threading.Event()
        # The rest of the time is for keeping what could not be sent.
        self._flushes.append((done, time.monotonic() + 0.9 * timeout))
        self._wake.set()
        return done.wait(timeout)

    def send_last_words(self, timeout: float) -> None:
        """Have the waiting events sent within ``timeout`` seconds, then what else there is time for.

        The export thread may be at a long delivery, so the events go from a thread of their own. What cannot
        be sent is kept.
        """
        deadline = time.monotonic() + timeout
        sender = threading.Thread(
            target=self._send_events, args=(timeout,), name="gradwatch-last-words", daemon=True
        )
        sender.start()
        sender.join(max(timeout, _HAND_OVER_SECONDS))
        self.flush(max(0.0, deadline - time.monotonic()))
        self._exporter.keep()

    def close(self, timeout: float) -> None:
        """Flush, and end the thread, within ``timeout`` seconds; what could not be sent is kept."""
        if not self._thread.is_alive():
            return  # never started, or this is a forked child
        deadline = time.monotonic() + timeout
        try:
            # At once: the thread may be at a delivery that takes long, and the process be ended meanwhile.
            self._hand_over_last()
            self.flush(max(0.0, deadline - time.monotonic()))
            self._hand_over_events()
        finally:
            self._closing = True
            self._wake.set()
            if self._thread is not threading.current_thread():
                self._thread.join(max(0.0, deadline - time.monotonic()))
            self._exporter.close()

    def forget_in_child(self) -> None:
        """After a fork: everything is the parent's."""
        self._exporter.forget_in_child()

    def _run(self) -> None:
        now = time.monotonic()
        next_beat, next_metrics, next_delivery = now + self._beat, now + self._interval, now
        next_errand = math.inf
        while not self._closing:
            next_time = min(next_beat, next_metrics, next_delivery, next_errand)
            self._wake.wait(max(0.0, next_time - time.monotonic()))
            self._wake.clear()
            flushes = [self._flushes.popleft() for _ in range(len(self._flushes))]
            now = time.monotonic()
            next_errand = math.inf
            try:
                again = self._errand()
                if again is not None:
                    next_errand = now + again
                if now >= next_beat:
                    next_beat = now + self._beat
                    self._heartbeat()
                self._hand_over_events()
                if flushes or now >= next_metrics:
                    next_metrics = now + self._interval
                    with self._collecting:
                        if not self._collected_last:
                            self._hand_over_metrics()
                    self._hand_over_events()  # those that the points gave rise to
                turn = max((until - now for _, until in flushes), default=_TURN_SECONDS)
                next_delivery = self._exporter.deliver(turn, at_once=bool(flushes)) + time.monotonic()
            except Exception as error:  # noqa: BLE001 - rule 2: this thread must live as long as training
                next_delivery = time.monotonic() + self._interval
                for done, _ in flushes:
                    done.set()
                internal_error(error, "export thread")
            for done, _ in flushes:
                done.set()
        try:
            self._exporter.close()
        except Exception as error:  # noqa: BLE001
            internal_error(error, "closing the exporter")

    def _send_events(self, seconds: float) -> None:
        self._hand_over_events()
        self._exporter.send_last_words(seconds)

    def _hand_over_last(self) -> None:
        if self._collecting.acquire(timeout=_COLLECT_SECONDS):
            try:
                self._hand_over_metrics()
                self._collected_last = True
            finally:
                self._collecting.release()
        self._hand_over_events()

    def _hand_over_events(self) -> None:
        with self._handing_over:  # in the order in which they were emitted, whichever thread does it
            with self._lock:
                batch, self._events = self._events, deque()
            if batch:
                self._exporter.send_events(self._resource(), tuple(batch))

    def _hand_over_metrics(self) -> None:
        dropped = self._exporter.take_lost()
        with self._lock:
            dropped, self._dropped = dropped + self._dropped, 0
        used = 0
        if threading.current_thread() is self._thread:
            cpu = time.thread_time_ns()
            used, self._cpu = cpu - self._cpu, cpu
        metrics = self._collect(dropped, used)
        if metrics:
            self._exporter.send_metrics(self._resource(), metrics)
