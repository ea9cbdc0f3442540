"""One run of this process: everything between the hooks on the training thread and the exporter."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import multiprocessing.util
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gradwatch import conventions
from gradwatch.checkpoints import telling
from gradwatch.clock import Clock
from gradwatch.conventions import Event as EventName
from gradwatch.export.exporter import ExportThread, Pacer
from gradwatch.export.exporters import otlp_exporter
from gradwatch.export.interval import Interval
from gradwatch.identity import Identity, resource_attributes
from gradwatch.life.black_box import BlackBox, StallWatch, Trigger
from gradwatch.life.endings import CANCELLED, FAILED, Ending, EndingWatch, after_sigterm, ending_of
from gradwatch.life.flight_recorder import FlightRecorder, FlightStep
from gradwatch.life.oom import AllocatorWatch, OutOfMemory
from gradwatch.life.preemption import sigterm_reason
from gradwatch.life.sigterm import SigtermWatch
from gradwatch.life.stacks import stacks
from gradwatch.loop.calibration import thin_cost
from gradwatch.loop.observer import StepObserver
from gradwatch.loop.step_log import StepLog
from gradwatch.measures.memory import memory_points
from gradwatch.nonfinite.birthplace import is_reported
from gradwatch.redaction import redact
from gradwatch.safety import log, shielded
from gradwatch.settings import Settings
from gradwatch.supervisor import progress
from gradwatch.supervisor.progress import Told
from gradwatch.telemetry import (
    Attributes,
    AttributeValue,
    Event,
    Exporter,
    LoggedValue,
    Metrics,
    MetricSeries,
    NonfiniteStep,
    StepRecord,
)

if TYPE_CHECKING:
    from torch import nn

    from gradwatch.reproduction.capture import Capture
    from gradwatch.watching import Watch

# From SIGTERM to death, all told, and what of that is kept for the black box.
_SIGTERM_SECONDS: Final = 0.15
_BLACK_BOX_SECONDS: Final = 0.03
# How long a black box waits for what else is said of its step, and how often it is asked whether that is over.
_SETTLED_SECONDS: Final = 0.05
_ASK_SECONDS: Final = 0.02
_BAD_STEPS: Final = 16
# Steps in a black box after the one that it is about.
_STEPS_AFTER: Final = 3


class Run:
    """Ties the observer, the interval, the export thread and the endings of one run together.

    ``separate``: it is not the process's own. ``innermost`` returns the run that is open now, which may be one
    within this.
    """

    def __init__(
        self,
        settings: Settings,
        model: str | None,
        exporter: Exporter | None = None,
        *,
        separate: bool = False,
        innermost: Callable[[], Run | None] = lambda: None,
    ) -> None:
        clock = Clock()
        self.settings = settings
        self.watches: list[Watch] = []
        # The launcher's id, attempt and ear are those of the process's own run.
        self._is_separate = separate
        self._innermost = innermost
        self.identity = Identity.resolve(settings, separate=self._is_separate)
        self._resource: Attributes = redact(resource_attributes(settings, self.identity, model))
        self._clock = clock.branch()
        self._lock = threading.Lock()
        self._sequence = itertools.count()
        self._nonfinite = 0
        # The newest of them: several optimizers may each tell of one step.
        self._bad_steps: deque[int] = deque(maxlen=_BAD_STEPS)
        self._missing: set[str] = set()
        self._target_reached = False
        self._ended = False
        # When a SIGTERM came that the program handles, by the monotonic clock.
        self._sigterm_at: float | None = None
        pace = Pacer()
        self._pace = pace
        self._recorder = FlightRecorder(settings.flight_steps)
        self._box = BlackBox(
            self._recorder, self._tail, self._emit_black_box, settings.directory, self.identity
        )
        self._stall = StallWatch(
            self._recorder.median_duration, settings.start_step, limit=settings.stall_after
        )
        self._stalled_at: int | None = -1  # no step yet
        self._allocator = AllocatorWatch(self._ran_out_of_memory)
        self._out_of_memory = 0
        self._interval = Interval(clock.now(), self._record)
        self._interval.thin_cost = thin_cost()
        self.observer = StepObserver(
            self,
            clock,
            overhead_budget=settings.overhead_budget,
            # Of a step that is not observed a bad gradient would be known only after its update.
            every=settings.every or (None if settings.capture is None else 1),
            capture_loss=settings.capture_loss,
            start_step=settings.start_step,
            inputs=settings.inputs,
            collectives=settings.collectives,
            nvtx=settings.nvtx,
        )
        self.observer.roster.thin_cost = self._interval.thin_cost
        self._thread = ExportThread(
            exporter or otlp_exporter(settings, pace),
            lambda: self._resource,
            self._collect,
            self._heartbeat,
            self._tend_black_box,
            settings.export_interval,
            settings.heartbeat_interval,
        )
        self._capture: Capture | None = None
        if settings.capture is not None:
            from gradwatch.reproduction.capture import Capture

            self._capture = Capture(
                lambda: self.observer.roster.step,
                self.observer.progress,
                self.observer.roster.optimizers,
                self._bundle_saved,
                settings.directory,
                self.identity,
                settings.replay,
            )
            self.observer.compile_watch.tell(self._capture.compiles)
        self._endings = EndingWatch(self._end_uncaught)
        self._sigterm = SigtermWatch(self._note_sigterm, self.die_of_sigterm)

    def begin(self) -> None:
        """Install everything and say that the run started."""
        self._thread.start()
        self._emit(conventions.RUN_STARTED, {})
        for event, found in telling.take():
            self._emit(event, found)
        self._tell_progress()
        self.observer.install()
        self._endings.install()
        self._sigterm.install()
        self._allocator.attach()
        atexit.register(self._at_exit)
        if multiprocessing.parent_process() is not None:
            # A forked child of multiprocessing leaves by os._exit, past atexit, but not past its finalizers.
            multiprocessing.util.Finalize(None, self._at_child_exit, exitpriority=0)

    @shielded(None)
    def close(self, ending: Ending) -> None:
        """End the run and leave nothing behind."""
        with contextlib.ExitStack() as undo:  # last in, first out, each even where another fails
            undo.callback(atexit.unregister, self._at_exit)
            undo.callback(self._sigterm.remove)
            # What waits for a collector that does not answer is kept if SIGTERM ends the waiting.
            undo.callback(self._thread.close, self.settings.exit_timeout)
            undo.callback(self._endings.remove)
            undo.callback(self.end, ending)
            undo.callback(self._sigterm.settle)
            if self._capture is not None:
                undo.callback(self._capture.remove)
            undo.callback(self._allocator.silence)
            self.observer.remove()

    def abandon_in_child(self) -> None:
        """After a fork: the run is the parent's. Say nothing, and take our hooks off."""
        self._ended = True
        self.observer.remove_in_child()
        self._allocator.silence()
        if self._capture is not None:
            self._capture.remove()
        self._thread.forget_in_child()
        self._endings.remove()
        self._sigterm.forget_in_child()
        atexit.unregister(self._at_exit)

    def add_model(self, model: nn.Module, name: str) -> bool:
        """Watch this module too. False when it is watched already."""
        is_new = self.observer.add_model(model, name)
        if is_new and self._capture is not None:
            self._capture.add_model(model, name)
        return is_new

    # --- StepSink: called on the training thread --------------------------------------------------------

    def open_log(self, optimizer: int, first_step: int) -> StepLog:
        """See ``StepSink``."""
        return self._interval.open_log(optimizer, first_step)

    def step(self, record: StepRecord) -> None:
        """See ``StepSink``."""
        self._interval.logs[record.optimizer].add(record)

    def logged(self, value: LoggedValue) -> None:
        """See ``StepSink``."""
        if value.name == "loss":
            self._interval.logs[0].column(conventions.LOSS).append(value.time, value.value)
            return
        self._interval.add_logged(value)
        target = self.settings.target
        if target is not None and not self._target_reached and target.metric == value.name:
            self._check_target(value.value, self.observer.roster.last_step)

    @property
    def nonfinite_seen(self) -> bool:
        """See ``StepSink``."""
        return self._nonfinite > 0

    def wants_nonfinite_detail(self) -> bool:
        """See ``StepSink``."""
        return is_reported(self._nonfinite) or is_reported(self._nonfinite + 1)

    def nonfinite(self, step: NonfiniteStep) -> None:
        """See ``StepSink``."""
        # One of an unknown step came before that in which it was seen.
        if step.since is not None or step.step not in self._bad_steps:
            if step.since is None:
                self._bad_steps.append(step.step)
            self._nonfinite += 1
            self._interval.nonfinite += 1
        self._ask_black_box("nonfinite", step.step)
        if self._capture is not None:
            self._capture.nonfinite(step)
        if is_reported(self._nonfinite):
            known: dict[str, AttributeValue | None] = {
                conventions.STEP: step.step if step.since is None else None,
                conventions.NONFINITE_EARLIEST: step.since,
                conventions.NONFINITE_LATEST: None if step.since is None else step.step,
                conventions.LAYER_NAME: step.layer,
                conventions.BORN_IN: step.born_in,
                conventions.NONFINITE_STEPS: self._nonfinite,
                conventions.NONFINITE_LAYERS: step.layers,
                conventions.NONFINITE_ELEMENTS: step.elements,
                conventions.LOSS_VALUE: step.loss,
            }
            self._emit(conventions.NONFINITE_STEP, known)

    def missing(self, step: int, reason: str) -> None:
        """See ``StepSink``."""
        if reason not in self._missing:
            self._missing.add(reason)
            log.warning("missing instrumentation: %s", reason)
            self._emit(
                conventions.INSTRUMENTATION_MISSING,
                {conventions.STEP: step, conventions.MISSING_REASON: reason},
            )

    def _check_target(self, value: float, step: int | None, time: int | None = None) -> None:
        target = self.settings.target
        if target is not None and math.isfinite(value) and target.holds(value):
            self._target_reached = True
            self._emit(
                conventions.TARGET_REACHED,
                {
                    conventions.STEP: step,
                    conventions.TARGET: str(target),
                    conventions.TARGET_VALUE: value,
                },
                time,
            )

    def _check_losses(self, metrics: Metrics) -> None:
        """A target for the captured loss: asked here, so that no step has to."""
        target = self.settings.target
        if target is None or self._target_reached or target.metric != "loss":
            return
        steps = {
            time: int(step)
            for batch in metrics
            if isinstance(batch, MetricSeries) and batch.metric is conventions.STEP_INDEX
            for time, step in zip(batch.times, batch.values, strict=True)
        }
        for batch in metrics:
            if isinstance(batch, MetricSeries) and batch.metric is conventions.LOSS:
                reached = (
                    (time, loss)
                    for time, loss in zip(batch.times, batch.values, strict=True)
                    if math.isfinite(loss) and target.holds(loss)
                )
                for time, loss in itertools.islice(reached, 1):
                    self._check_target(loss, steps.get(time), time)
                    return

    def _check_waiting(self, waiting: StepLog) -> None:
        """The same of losses that were not drained yet, so that the target comes before the ending."""
        target = self.settings.target
        if target is None or self._target_reached or target.metric != "loss":
            return
        for step in waiting.last_steps(len(waiting.ends)):
            if step.loss is not None and not self._target_reached:
                self._check_target(step.loss, step.step, step.time)

    # --- Events ------------------------------------------------------------------------------------------

    @shielded(None)
    def report(self, event: EventName, attributes: Mapping[str, AttributeValue | None]) -> None:
        """Report what the watch's own methods did, such as saving a checkpoint."""
        self._emit(event, attributes)

    def _emit(
        self, event: EventName, attributes: Mapping[str, AttributeValue | None], time: int | None = None
    ) -> None:
        with self._lock:  # time and sequence in the same order
            known = redact({name: value for name, value in attributes.items() if value is not None})
            known[conventions.EVENT_SEQUENCE] = next(self._sequence)
            now = self._clock.now()
            self._thread.emit(Event(event.name, now if time is None else time, known))

    def _heartbeat(self) -> None:
        if not self._ended:
            last = self.observer.roster.last_step
            self._emit(conventions.RUN_HEARTBEAT, {conventions.STEP: last})
            self._tell_progress()
            stalled = self._stall.stalled(last, paused=self.observer.progress.pauses > 0)
            if stalled and last != self._stalled_at:
                self._stalled_at = last
                self._emit(conventions.STALLED, {conventions.STEP: last, conventions.STACKS: stacks()})
                self._box.write("stalled", last)

    def _tell_progress(self, ending: Ending | None = None) -> None:
        attempt = self.identity.attempt
        if self._is_separate or attempt is None:
            return
        told = Told(
            self.identity.run_id,
            attempt,
            self.observer.roster.last_step,
            self._recorder.median_duration() if ending is None else None,
            ending.reason if ending is not None and ending.status == FAILED else None,
        )
        progress.tell(told, self.identity.instance)

    def end(self, ending: Ending) -> None:
        """Report the ending; only the first one counts."""
        if not self._ended:
            for waiting in self._interval.logs:
                self._check_waiting(waiting)
        with self._lock:
            if self._ended:
                return
            self._ended = True
        if self._sigterm_at is not None:
            waited = time.monotonic() - self._sigterm_at
            ending = after_sigterm(ending, self._sigterm_reason(), waited)
        self._tell_progress(ending)
        if ending.status == FAILED:
            self.observer.tell_unfinished()
            if ending.out_of_memory is not None and not self._allocator.attached:
                self._ran_out_of_memory(ending.out_of_memory)
        self._emit(
            conventions.RUN_ENDED,
            {
                conventions.STEP: self.observer.roster.last_step,
                conventions.STATUS: ending.status,
                conventions.REASON: ending.reason,
                conventions.EXIT_CODE: ending.exit_code,
                conventions.EXCEPTION_TYPE: ending.exception_type,
                conventions.EXCEPTION_MESSAGE: ending.exception_message,
                conventions.WILL_RETRY: ending.will_retry or None,
            },
        )
        # The ending is on its way: only now what takes longer. A launcher that stops the rest of a failed job
        # may leave little time.
        self._box.write_if_due()
        if ending.status == FAILED:
            self._box.write("oom" if ending.out_of_memory else "exception", self.observer.roster.last_step)

    def _end_uncaught(self, ending: Ending) -> None:
        self._sigterm.settle()  # it may be of the handler of a SIGTERM that was not noted yet
        self.end(ending)

    def _at_exit(self) -> None:
        self.close(self._endings.at_exit())

    def _at_child_exit(self) -> None:
        # Called while the exception that ends the child, if any, is on its way out.
        error = sys.exc_info()[1]
        self.close(self._endings.at_exit() if error is None else ending_of(error))

    def _sigterm_reason(self) -> str:
        return sigterm_reason(self.settings.preemptible, self._sigterm.seen)

    def _note_sigterm(self) -> None:
        self._sigterm_at = time.monotonic()
        self._ask_black_box("SIGTERM", None)

    def die_of_sigterm(self, deadline: float | None = None) -> None:
        """Say so by the deadline (monotonic clock, default: very soon): the process is about to go."""
        if deadline is None:
            deadline = time.monotonic() + _SIGTERM_SECONDS
        inner = self._innermost()
        if inner is not None and inner is not self:  # it has only taken note
            inner.die_of_sigterm(deadline)
        self.end(Ending(CANCELLED, self._sigterm_reason(), 128 + 15))
        self._thread.send_last_words(max(0.0, deadline - _BLACK_BOX_SECONDS - time.monotonic()))
        # The ending is out: only now what takes longer.
        self._box.write("SIGTERM", self.observer.roster.last_step)
        self._thread.send_last_words(max(0.0, deadline - time.monotonic()))

    def _ran_out_of_memory(self, what: OutOfMemory) -> None:
        self._out_of_memory += 1
        if is_reported(self._out_of_memory):  # a loop that tries again and again is one story, not a thousand
            self._emit(
                conventions.OUT_OF_MEMORY,
                {
                    conventions.STEP: self.observer.roster.step,
                    conventions.DEVICE: what.device,
                    conventions.OOM_DURING: what.during,
                    conventions.OOM_REQUESTED: what.requested,
                },
            )

    def _bundle_saved(self, step: int, path: Path) -> None:
        self._emit(conventions.BUNDLE_SAVED, {conventions.STEP: step, conventions.BUNDLE_PATH: str(path)})

    def _emit_black_box(self, attributes: Mapping[str, AttributeValue | None]) -> None:
        self._emit(conventions.FLIGHT_RECORD, attributes)

    def _ask_black_box(self, trigger: Trigger, step: int | None) -> None:
        if self._box.ask(trigger, step):
            self._thread.wake()

    def _tail(self, step: int | None) -> Iterator[FlightStep]:
        """Steps that the export thread has not drained yet, up to a few after this one.

        However many have ended since: those before it are what a black box is for.
        """
        until = None if step is None else self._end_of(step + _STEPS_AFTER)
        for each in list(self._interval.logs):
            yield from each.last_steps(self.settings.flight_steps, until)

    def _end_of(self, step: int) -> int | None:
        """When this step of the run ended, Unix nanoseconds, or the last one drained after it; None before."""
        leading = (each.end_of(step) for each in list(self._interval.logs) if each.leads)
        return next((end for end in leading if end is not None), None)

    def _record(self, drained: StepLog) -> None:
        """Keep what is about to be drained."""
        for step in drained.last_steps(self.settings.flight_steps):
            self._recorder.add(step)
            self._pace()

    # --- Export thread -----------------------------------------------------------------------------------

    def _tend_black_box(self) -> float | None:
        self._box.write_if_due(self.observer.roster.last_step, _SETTLED_SECONDS)
        return _ASK_SECONDS if self._box.is_due else None

    def _collect(self, dropped: int, background: int) -> Metrics:
        # What is drained now would push what came before that step out of the recorder.
        self._box.write_if_due(self.observer.roster.last_step)
        now = self._clock_now()
        points = self._interval.points(
            now, self.observer.roster.optimizer_count, dropped, background, self._pace
        )
        self._check_losses(points)
        self.observer.note_background(self._interval.background_a_step)
        return [*points, *self.observer.measures.points(now, self._pace), *memory_points(now)]

    def _clock_now(self) -> int:
        with self._lock:
            return self._clock.now()
