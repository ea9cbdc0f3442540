"""Values that leave a device without stopping it: a pinned ring and an event, asked at a later hook.

Only the training thread asks whether they have arrived: querying an event from another thread breaks CUDA-graph
capture. Others may send, as when they log.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Final

import torch

# Steps in flight. A host further ahead than this is not waiting for losses; then the oldest are still waited
# for and new values are given up, and counted.
_SLOTS: Final = 256


class Slot:
    """One vector on its way to the host. ``width`` elements of the buffer are meant."""

    __slots__ = ("buffer", "event", "width")

    def __init__(self, capacity: int) -> None:
        # float64 holds every real type exactly; the vector is converted on the device.
        self.buffer = torch.empty(capacity, dtype=torch.float64, pin_memory=True)
        self.event = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch
        self.width = 0

    def arrived(self) -> bool:
        """Whether the copy has finished; never waits."""
        return bool(self.event.query())  # type: ignore[no-untyped-call] # torch

    def values(self) -> list[float]:
        """The values; only once they ``arrived``."""
        numbers: list[float] = self.buffer[: self.width].tolist()
        return numbers


class DeviceRing:
    """Slots of one device, reused in turn."""

    def __init__(self, device: torch.device, capacity: int) -> None:
        self._device = device
        self._capacity = capacity
        self._free: deque[Slot] = deque()
        self._made = 0
        self._lock = threading.Lock()

    def send(self, parts: Sequence[torch.Tensor]) -> Slot | None:
        """Start the copy of these vectors, one after the other; None when the ring is full."""
        width = sum(part.numel() for part in parts)
        with self._lock:
            slot = self._take(width)
        if slot is None:
            return None
        with torch.cuda.device(self._device):
            vectors = [part.detach().reshape(-1).to(torch.float64) for part in parts]
            vector = vectors[0] if len(vectors) == 1 else torch.cat(vectors)
            slot.width = width
            slot.buffer[:width].copy_(vector, non_blocking=True)
            slot.event.record()
        return slot

    def _take(self, width: int) -> Slot | None:
        if width > self._capacity:
            self._free.clear()
            self._made = 0
            self._capacity = 2 * width
        if self._free:
            return self._free.popleft()
        if self._made == _SLOTS:
            return None
        self._made += 1
        return Slot(self._capacity)

    def recycle(self, slot: Slot) -> None:
        """Take back a slot whose values were read."""
        if slot.buffer.numel() == self._capacity:
            self._free.append(slot)


def is_capturing() -> bool:
    """Whether this thread is recording a CUDA graph: then nothing of ours may touch the stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
