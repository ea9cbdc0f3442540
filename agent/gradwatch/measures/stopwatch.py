"""Time between two points of the training thread: by the host's clock, or by a device's own events.

A device runs behind the host, so its time is that between two events put into its stream, known only once both
have passed. Nobody waits for them: marks are kept, and asked about at a later hook on the training thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any, Protocol

import torch

from gradwatch.tensors.device_ring import is_capturing


class Stopwatch(Protocol):
    """Makes marks, and says what lies between them. Training thread only."""

    def mark(self) -> Any:
        """The present; None where no mark can be made, as while a CUDA graph is being captured."""

    def passed(self, mark: Any) -> bool:
        """Whether this mark lies in the past; never waits."""

    def between(self, start: Any, end: Any) -> float:
        """Seconds between two marks that have passed."""

    def reuse(self, marks: Sequence[Any]) -> None:
        """Take marks back that are needed no longer."""


class HostStopwatch:
    """Marks are nanoseconds of the host's clock: right where the work is done when its call returns."""

    def mark(self) -> int:
        """See ``Stopwatch``."""
        return perf_counter_ns()

    def passed(self, mark: int) -> bool:  # noqa: ARG002 - a mark of the host has always passed
        """See ``Stopwatch``."""
        return True

    def between(self, start: int, end: int) -> float:
        """See ``Stopwatch``."""
        return (end - start) / 1e9

    def reuse(self, marks: Sequence[int]) -> None:
        """See ``Stopwatch``."""


class DeviceStopwatch:
    """Marks are events in the current stream of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Any] = []

    def mark(self) -> Any:
        """See ``Stopwatch``."""
        if is_capturing():
            return None
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch
        event.record(torch.cuda.current_stream(self._device))
        return event

    def passed(self, mark: Any) -> bool:
        """See ``Stopwatch``."""
        # Asking about an event would break a capture that is under way.
        return not is_capturing() and bool(mark.query())

    def between(self, start: Any, end: Any) -> float:
        """See ``Stopwatch``."""
        return float(start.elapsed_time(end)) / 1e3

    def reuse(self, marks: Sequence[Any]) -> None:
        """See ``Stopwatch``."""
        self._free += marks


def stopwatch_for(device: torch.device | None) -> Stopwatch:
    """The stopwatch of a device; the host's for the CPU."""
    return HostStopwatch() if device is None or device.type != "cuda" else DeviceStopwatch(device)
