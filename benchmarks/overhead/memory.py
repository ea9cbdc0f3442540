"""What agent_memory.py measures, and how it is read."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from itertools import combinations

MIB = 2**20
SAMPLES = 200
_TENTH = SAMPLES // 10
_FIRST, _LAST = slice(None, _TENTH), slice(-_TENTH, None)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, which runs one variant and nothing else.

    Attributes:
        steps: When it was read, in steps after the warm-up.
        resident: All that is in memory.
        anonymous: What of it is no part of a file: heaps, stacks, mappings.
        cold: Anonymous bytes after the first hundredth of the warm-up.
        peak: The most that was ever resident.
    """

    steps: list[int]
    resident: list[int]
    anonymous: list[int]
    cold: int
    peak: int

    @property
    def late(self) -> float:
        """Resident bytes, the median over the last tenth."""
        return statistics.median(self.resident[_LAST])

    @property
    def warmed(self) -> float:
        """Anonymous bytes that the warm-up added."""
        return statistics.median(self.anonymous[_FIRST]) - self.cold

    @property
    def rise(self) -> float:
        """Anonymous bytes a step, from the first tenth to the last."""
        early, late = (statistics.median(self.anonymous[part]) for part in (_FIRST, _LAST))
        return (late - early) / (statistics.median(self.steps[_LAST]) - statistics.median(self.steps[_FIRST]))

    @property
    def slope(self) -> float:
        """Anonymous bytes a step: the median slope between all pairs of readings."""
        points = zip(self.steps, self.anonymous, strict=True)
        return statistics.median((b - a) / (n - m) for (m, a), (n, b) in combinations(points, 2))


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes that watching 1000 tensors takes on a device.

    Attributes:
        held: Above the bare loop, between two steps.
        peak: Above the bare loop, while the optimizer steps: training's own peak, elsewhere, would hide it.
        driver: What the device has less, after all of it; the caching of torch's allocator is in it.
    """

    held: int
    peak: int
    driver: int


@dataclass(frozen=True)
class MemoryResult:
    """All of one run of agent_memory.py.

    Attributes:
        machine: Date, machine and versions.
        warm_up: Steps before the readings.
        import_bare: Seconds of each interpreter that does nothing.
        import_ours: Of each that imports gradwatch.
        device_memory: None without a device.
    """

    machine: str
    device: str
    model: str
    warm_up: int
    steps: int
    bare: Memory
    watched: Memory
    import_bare: list[float]
    import_ours: list[float]
    device_memory: DeviceMemory | None

    @property
    def above(self) -> float:
        """Resident bytes above the bare loop."""
        return self.watched.late - self.bare.late

    @property
    def growth(self) -> float:
        """Anonymous bytes that 100 000 steps add, above what they add to the bare loop."""
        return (self.watched.rise - self.bare.rise) * 100_000

    @property
    def import_seconds(self) -> float:
        """Median seconds to import gradwatch, above the median of an interpreter that does nothing."""
        return statistics.median(self.import_ours) - statistics.median(self.import_bare)
