"""Between the training thread, which sees steps, and the run, which keeps what is known of them."""

from __future__ import annotations

from typing import Protocol

from gradwatch.loop.step_log import StepLog
from gradwatch.telemetry import LoggedValue, NonfiniteStep, StepRecord


class StepSink(Protocol):
    """Where finished steps go; must return at once."""

    def open_log(self, optimizer: int, first_step: int) -> StepLog:
        """A log for the steps of this optimizer from now on; what still waits in an earlier one is given up."""

    def step(self, record: StepRecord) -> None:
        """What is known of a step beyond its end is complete."""

    def logged(self, value: LoggedValue) -> None:
        """A number given to ``watch.log``."""

    def nonfinite(self, step: NonfiniteStep) -> None:
        """A step was non-finite."""

    def missing(self, step: int, reason: str) -> None:
        """The loop cannot be seen properly; ``reason`` in one line."""

    @property
    def nonfinite_seen(self) -> bool:
        """Whether any step was non-finite so far."""

    def wants_nonfinite_detail(self) -> bool:
        """Whether the next non-finite step becomes an event; only then it is worth a closer look."""
