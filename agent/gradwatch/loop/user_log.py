"""What the user says with ``watch.log(...)``: a loss, a rate, or any number."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradwatch.clock import Clock
from gradwatch.loop.arrivals import Arrivals
from gradwatch.loop.roster import Roster
from gradwatch.loop.step_in_progress import StepInProgress
from gradwatch.loop.step_sink import StepSink
from gradwatch.loop.watched import WatchedOptimizer
from gradwatch.safety import Throttle, log
from gradwatch.telemetry import LoggedValue, NonfiniteStep
from gradwatch.tensors.device_ring import is_capturing

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Doubt:
    """A loss given after a step had ended with another: of that step, or of the next, before its backward."""

    of: WatchedOptimizer
    captured: float
    given: float


class UserLog:
    """Takes numbers; a loss or a rate belongs to the step in progress, or to the one that has just ended.

    But a loop whose first loss (or rate) came before its first backward pass logs ahead: what it logs between
    the end of a step and the next backward pass is of the step to come.

    Args:
        alert: Makes the next step a full one.
    """

    def __init__(
        self,
        sink: StepSink,
        roster: Roster,
        progress: StepInProgress,
        arrivals: Arrivals,
        clock: Clock,
        alert: Callable[[], None],
    ) -> None:
        self._sink = sink
        self._roster = roster
        self._progress = progress
        self._arrivals = arrivals
        self._clock = clock
        self._lock = threading.Lock()
        self._alert = alert
        self._doubt: _Doubt | None = None
        self._odd: dict[str, Throttle] = {}
        # By name, whether the loop logs ahead of its backward pass. As its first log was, so are all.
        self._ahead: dict[str, bool] = {}
        # Backward passes begun when the loss of the step in progress was given.
        self._given_at = 0

    def log(self, values: Mapping[str, object]) -> None:
        """Take ``watch.log(**values)``; tensors on a device travel through the ring."""
        for name, raw in values.items():
            number = _number(raw)
            if number is None:
                if self._odd.setdefault(name, Throttle()).allows():
                    log.warning("watch.log(%s=...): expected one number, got %s", name, type(raw).__name__)
            elif name == "loss":
                self._log_loss(number)
            elif name == "lr" and isinstance(number, float):
                self._log_rate(number)
            elif isinstance(number, float):
                with self._lock:
                    self._sink.logged(LoggedValue(name, self._clock.now(), number))
            else:
                if not is_capturing():
                    with self._lock:
                        self._arrivals.send_logged(name, self._clock.now(), number)

    def _last(self, name: str) -> WatchedOptimizer | None:
        """The optimizer that stepped last, if this is meant for it and nothing of the next step was seen."""
        between = self._progress.loss is None and not self._progress.device_losses
        if self._ahead.setdefault(name, between and not self._roster.steps_ended) or not between:
            return None
        last = max(self._roster.watched.values(), key=lambda watched: watched.last_end, default=None)
        return last if last is not None and last.ends else None

    def _log_loss(self, loss: float | Tensor) -> None:
        last = self._last("loss")
        if last is None:
            self._give(loss)
        elif self._arrivals.holds_step:
            self._arrivals.replace_loss(loss)
        elif isinstance(loss, float):
            captured = last.losses[-1]
            last.losses[-1] = loss
            if captured is not None and captured != loss:
                self._settle(_Doubt(last, captured, loss))
            else:
                self._judge(last, loss)
        else:
            last.losses[-1] = None
            self._arrivals.send_logged("loss", last.last_end, loss)

    def _give(self, loss: float | Tensor) -> None:
        """This is the loss of the step in progress."""
        self._tell_passed_over()
        self._progress.given_loss, self._given_at = loss, self._progress.passes
        if isinstance(loss, float) and not math.isfinite(loss):
            # A captured NaN has reached the gradients, whatever is logged in its place.
            self._progress.suspicious = True
            self._progress.busy = True  # have the next backward tell its loss
        self._alert()

    def _tell_passed_over(self) -> None:
        """A bad loss was given, and no backward pass came but another loss: its batch was left out."""
        given, progress, watched = self._progress.given_loss, self._progress, self._roster.leader
        if isinstance(given, float) and not math.isfinite(given) and progress.loss is None:
            progress.given_loss, progress.suspicious = None, False
            if watched is not None:
                self._sink.nonfinite(NonfiniteStep(self._roster.step, loss=given))

    def discard(self) -> None:
        """The batch was thrown away, and what was given for its loss; not what was given ahead for the next."""
        if not self._ahead.get("loss") or self._given_at < self._progress.passes:
            self._progress.given_loss = None

    def _judge(self, last: WatchedOptimizer, loss: float) -> None:
        if not math.isfinite(loss) and not last.last_nonfinite:
            last.last_nonfinite = True
            self._sink.nonfinite(NonfiniteStep(self._roster.last_step_of(last), loss=loss))

    @property
    def in_doubt(self) -> bool:
        """Whether a loss was given of which only the next backward will tell whose it is."""
        given = self._progress.given_loss
        return self._doubt is not None or (isinstance(given, float) and not math.isfinite(given))

    def backward_begins(self, loss: float) -> None:
        """From this loss: if it is the one that was given last, that was meant for this step."""
        doubt = self._doubt
        if math.isfinite(loss):
            self._tell_passed_over()
        if doubt is not None and (loss == doubt.given or (math.isnan(loss) and math.isnan(doubt.given))):
            self._doubt = None
            if doubt.of.losses:
                doubt.of.losses[-1] = doubt.captured
        else:
            self.settle()

    def settle(self) -> None:
        """No backward will tell: a loss that is in doubt was the last step's."""
        self._settle(None)

    def _settle(self, doubt: _Doubt | None) -> None:
        before, self._doubt = self._doubt, doubt
        if before is not None:
            self._judge(before.of, before.given)
        if doubt is not None:
            self._progress.busy = True  # have the next backward tell its loss

    def _log_rate(self, rate: float) -> None:
        last = self._last("lr")
        if last is None:
            self._progress.given_rate = rate
            self._alert()
        else:
            last.note_given_rate(last.last_end, rate)


def _number(raw: object) -> float | Tensor | None:
    try:
        if isinstance(raw, torch.Tensor):
            if raw.numel() != 1 or raw.is_complex():
                return None
            return float(raw.item()) if raw.device.type == "cpu" else raw.detach() if raw.is_cuda else None
        # NumPy's complex numbers would give their real part for it.
        item = getattr(raw, "item", None)
        number: Any = item() if callable(item) else raw
        # Decimal, Fraction: anything with __float__.
        return None if isinstance(number, (str, bytes)) else float(number)
    except Exception:  # noqa: BLE001 - the user's code; the other values of the call are none the worse for it
        return None
