"""What an observed step spent its time on: forward, backward, optimizer.

Marks are made where hooks are anyway: at the end of the optimizer's step, and before and after ``backward()``
and the optimizer. ``backward`` includes the collectives that DDP hides in it; ``optimizer`` is the update
alone; ``forward`` is all that lies between the end of the step before (or of the ``backward()`` before in the
same step) and ``backward()``, less data wait and evaluation: forward passes, loss, transfers and whatever the
loop does there. Clipping and unscaling belong to no phase.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gradwatch.measures.stopwatch import HostStopwatch, Stopwatch

FORWARD: Final = "forward"
BACKWARD: Final = "backward"
OPTIMIZER: Final = "optimizer"

# Steps whose device events have not passed yet; a host further ahead gives the phases of a step up.
_STEPS_IN_FLIGHT: Final = 4
# Marks of one step, enough for 30 micro-batches; a longer step is given up, for events are a device's.
_MARKS: Final = 128


@dataclass(slots=True)
class _Step:
    """Marks of one step. ``spans``: phase, from, to, and whether it counts or is taken off."""

    time: int = 0
    marks: list[Any] = field(default_factory=list)
    spans: list[tuple[str, Any, Any, int]] = field(default_factory=list)


class PhaseTimer:
    """Times the phases of the steps it is told to observe. Training thread only.

    Args:
        report: Gets a step's end (Unix nanoseconds) and the seconds of each phase, once they are known.

    Attributes:
        observed: Whether the step in progress is timed; every other entry point is called only then.
    """

    def __init__(self, report: Callable[[int, Mapping[str, float]], None]) -> None:
        self.observed = False
        self._stopwatch: Stopwatch = HostStopwatch()
        self._report = report
        self._step = _Step()
        self._since: dict[str, Any] = {}
        self._paused: Any = None
        self._pauses: list[tuple[Any, Any]] = []
        self._waiting: deque[_Step] = deque()

    def use(self, stopwatch: Stopwatch) -> None:
        """Measure with this one from now on. Only before the first ``begin``."""
        self._stopwatch = stopwatch

    def begin(self) -> None:
        """A step that is to be observed begins now."""
        self._step = _Step()
        self._since.clear()
        self._paused = None
        self.observed = len(self._waiting) < _STEPS_IN_FLIGHT
        if self.observed:
            self._open_forward(self._mark())

    def before_backward(self) -> None:
        """``backward()`` is about to run."""
        now = self._mark()
        if FORWARD in self._since and now is not None:
            self._step.spans += [(FORWARD, start, end, -1) for start, end in self._pauses]
        self._close(FORWARD, now)
        self._since[BACKWARD] = now

    def after_backward(self) -> None:
        """``backward()`` returned."""
        now = self._mark()
        self._close(BACKWARD, now)
        self._open_forward(now)

    def before_optimizer(self) -> None:
        """An optimizer is about to update."""
        self._since[OPTIMIZER] = self._mark()

    def after_optimizer(self) -> None:
        """It did. What the loop does next, for another optimizer, is forward again."""
        now = self._mark()
        self._close(OPTIMIZER, now)
        self._open_forward(now)

    def pause(self) -> None:
        """The time until ``resume`` is nobody's: the loop waits for data, or evaluates."""
        self._paused = self._mark()

    def resume(self) -> None:
        """See ``pause``."""
        start, self._paused = self._paused, None
        if start is not None and (now := self._mark()) is not None:
            self._pauses.append((start, now))

    def end(self, time: int) -> None:
        """The step ended at ``time`` (Unix nanoseconds)."""
        self.observed = False
        step, self._step = self._step, _Step()
        step.time = time
        if step.spans:
            self._waiting.append(step)
        self.drain()

    def drain(self) -> None:
        """Report the steps whose marks have passed."""
        # The last mark first; but where streams change, one before it may pass later.
        while self._waiting and all(map(self._stopwatch.passed, reversed(self._waiting[0].marks))):
            step = self._waiting.popleft()
            seconds: dict[str, float] = {}
            for phase, start, end, sign in step.spans:
                seconds[phase] = seconds.get(phase, 0.0) + sign * self._stopwatch.between(start, end)
            self._stopwatch.reuse(step.marks)
            self._report(step.time, {phase: max(0.0, lasted) for phase, lasted in seconds.items()})

    def give_up(self) -> None:
        """Say nothing about the step in progress."""
        self.observed = False
        self._stopwatch.reuse(self._step.marks)
        self._step = _Step()
        self._since.clear()
        self._pauses.clear()

    def _mark(self) -> Any:
        mark = self._stopwatch.mark() if len(self._step.marks) < _MARKS else None
        if mark is None:
            self.give_up()
        else:
            self._step.marks.append(mark)
        return mark

    def _open_forward(self, now: Any) -> None:
        self._since[FORWARD] = now
        self._pauses.clear()

    def _close(self, phase: str, now: Any) -> None:
        start = self._since.pop(phase, None)
        if start is not None and now is not None:
            self._step.spans.append((phase, start, now, 1))
