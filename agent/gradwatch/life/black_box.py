"""When the black box is written and sent: at the first NaN, a failure, a stall, SIGTERM; once for each."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

from gradwatch import conventions
from gradwatch.identity import Identity
from gradwatch.life.flight_recorder import FlightRecorder, FlightStep, compress_for_file, fitting
from gradwatch.local_files import file_name, keep
from gradwatch.safety import log, shielded
from gradwatch.telemetry import AttributeValue

Trigger = Literal["nonfinite", "exception", "oom", "stalled", "SIGTERM"]

# Receivers refuse bodies of a few MiB; the file has all of it.
_LARGEST_SENT: Final = 512 << 10


class BlackBox:
    """The recorder of a run and what becomes of it.

    Args:
        recorder: Fed by the export thread.
        tail: Steps that the export thread has not drained yet, up to a few after the one given, if any.
        emit: Sends the event's attributes.
        directory: Where files go.
    """

    def __init__(
        self,
        recorder: FlightRecorder,
        tail: Callable[[int | None], Iterable[FlightStep]],
        emit: Callable[[Mapping[str, AttributeValue | None]], None],
        directory: Path,
        identity: Identity,
    ) -> None:
        self.recorder = recorder
        self._tail = tail
        self._emit = emit
        self._directory = directory
        self._identity = identity
        self._lock = threading.Lock()
        self._written: set[str] = set()
        # By trigger, in the order asked: the step, and when it was asked for.
        self._due: dict[Trigger, tuple[int | None, float]] = {}

    def ask(self, trigger: Trigger, step: int | None) -> bool:
        """Have it written by the export thread once this step is over; False if that was asked before.

        Costs the training thread nothing.
        """
        if trigger in self._due or _story(trigger, step) in self._written:
            return False
        self._due[trigger] = step, time.monotonic()
        return True

    @property
    def is_due(self) -> bool:
        """Whether something that was asked for is not written yet."""
        return bool(self._due)

    @shielded(None)
    def write_if_due(self, last_step: float | None = math.inf, settled: float = 0.0) -> None:
        """Write what was asked for ``settled`` seconds ago or longer and whose step is over.

        Called by the export thread with the last step that ended, before it drains any further; and at the end.
        """
        latest = time.monotonic() - settled
        for trigger, (step, asked) in list(self._due.items()):
            if asked <= latest and (step is None or (last_step is not None and last_step >= step)):
                self.write(trigger, step)

    @shielded(None)
    def write(self, trigger: Trigger, step: int | None) -> None:
        """Write the file and send the event, unless this trigger has had its own or no step was recorded.

        A stall at another step is another one: the loop went on after what was taken for a stall before.
        """
        with self._lock:
            try:
                self._write(trigger, step)
            finally:
                # Not before: it stays due to another thread, which waits here rather than drain any further.
                self._due.pop(trigger, None)

    def _write(self, trigger: Trigger, step: int | None) -> None:
        story = _story(trigger, step)
        if story in self._written:
            return
        self.recorder.include(self._tail(step))
        if not self.recorder.steps():
            return
        self._written.add(story)
        who = self._identity
        about = {
            "run_id": who.run_id,
            "attempt": who.attempt,
            "rank": who.rank,
            "trigger": trigger,
            "at_step": step,
            "written_at": time.time_ns(),
        }
        # Nobody may know which attempt this is: the next one must not write over what this one died of.
        ending = f"{story}-{who.instance[:8]}.json.gz"
        name = file_name("flight", who.run_id, who.attempt, who.rank, ending)
        whole = compress_for_file(self.recorder.document(about))
        try:
            keep(self._directory, name, lambda file: file.write(whole))
        except OSError as error:
            log.warning("cannot write the black box to %s: %s", self._directory, error)
        steps, data = fitting(self.recorder, about, _LARGEST_SENT)
        self._emit(
            {
                conventions.STEP: step,
                conventions.FLIGHT_TRIGGER: trigger,
                conventions.FLIGHT_STEPS: steps,
                conventions.FLIGHT_DATA: data,
            }
        )


def _story(trigger: Trigger, step: int | None) -> str:
    return f"{trigger}-step{step}" if trigger == "stalled" else trigger


class StallWatch:
    """Tells when no step ended for far longer than any pause before. An idle prompt is not a stalled run.

    Args:
        median: Median step duration in seconds, None while it is not known.
        first_step: Index of the run's first step.
        monotonic: The clock, in seconds.
        limit: Seconds without a step that are a stall, from the start of the run on; None judges by the steps
            and pauses so far.
    """

    LEAST_SECONDS: Final = 60.0
    _MEDIANS: Final = 20
    _LONGEST_PAUSES: Final = 3  # evaluation and checkpoints pause a loop too, and do so again
    # Before so many steps nobody knows their pace: they may be compiled, or wait for a data set.
    _LEAST_STEPS: Final = 10
    EARLY_SECONDS: Final = 600.0

    def __init__(
        self,
        median: Callable[[], float | None],
        first_step: int = 0,
        monotonic: Callable[[], float] = time.monotonic,
        limit: float | None = None,
    ) -> None:
        self._median = median
        self._limit = limit
        self._monotonic = monotonic
        self._first_step = first_step
        self._step: int | None = None
        self._since = monotonic()
        self._longest = 0.0

    def stalled(self, last_step: int | None, *, paused: bool = False) -> bool:
        """Whether the loop hangs, as far as one can tell. Asked every few seconds with the last step.

        Not while it is ``paused`` on purpose (evaluation, checkpoint), however long that takes.
        """
        now = self._monotonic()
        if paused:
            self._step, self._since = last_step, now
            return False
        if last_step != self._step:
            if self._step is not None:
                self._longest = max(self._longest, now - self._since)
            self._step, self._since = last_step, now
            return False
        limit = self._limit or self._own_limit(last_step)
        return now - self._since > limit and not _interactive()

    def _own_limit(self, last_step: int | None) -> float:
        is_early = last_step is None or last_step - self._first_step < self._LEAST_STEPS
        return max(
            self.EARLY_SECONDS if is_early else self.LEAST_SECONDS,
            self._MEDIANS * (self._median() or 0.0),
            self._LONGEST_PAUSES * self._longest,
        )


def _interactive() -> bool:
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
