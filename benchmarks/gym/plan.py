"""Which runs are played: family, fault, strength and seed, drawn once and for all for each of two sets.

One set is there to choose the detectors' defaults by, the other one to report on. Their data differ (see
`gym.data`), and so do all seeds: even ones to tune on, odd ones to report on.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Final

from gym.data import REPORT, TUNING
from gym.fault import EVERYWHERE, STRONG, WEAK
from gym.faults import KINDS

SETS: Final = (TUNING, REPORT)
HEALTHY: Final = "healthy"
# At most one ticket in fifty healthy runs is allowed, which takes fifty to see: seven families of these.
HEALTHY_SEEDS: Final = 8
# A fault comes when a run has shown what it is like without it, and leaves time to be found.
_EARLIEST, _LATEST = 0.3, 0.6
# Every other of their healthy runs trains in float16, which is slow on the CPU.
_HALF: Final = frozenset({"mlp", "ddp"})
_SHORT_FAULTS: Final = (
    "learning_rate_bomb",
    "division_in_forward",
    "corrupt_batch",
    "failing_saver",
    "starved_loader",
)


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run, or several that have the same fault.

    Attributes:
        run_id: Of the first; the others have a number behind it.
        data: Which set it belongs to.
        fault: Name of its kind, None for a healthy run.
        strength: ``strong`` or ``weak``, None for a healthy run.
        place: When the fault comes, as a share of the run; 0.0 for those that are there from the start.
        half: Whether it trains in float16 without being told so by its fault.
    """

    run_id: str
    data: str
    family: str
    fault: str | None
    strength: str | None
    seed: int
    place: float
    half: bool = False

    @property
    def launches(self) -> int:
        """How many runs there are of it."""
        return 1 if self.fault is None else KINDS[self.fault].launches.get(str(self.strength), 1)

    @property
    def retries(self) -> int | None:
        """What `gradwatch run --retries` is given; None without it."""
        return None if self.fault is None else KINDS[self.fault].retries.get(str(self.strength))

    @property
    def job(self) -> str:
        """All runs of a family are one job's; those whose failures are to be counted are a job of their own."""
        is_apart = self.launches > 1 or self.retries is not None
        return f"gym-{self.run_id}" if is_apart else f"gym-{self.family}"

    @property
    def run_ids(self) -> tuple[str, ...]:
        """Of all runs of it."""
        return (self.run_id, *(f"{self.run_id}-{number}" for number in range(2, self.launches + 1)))

    def to_json(self) -> str:
        """Return it in one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> PlannedRun:
        """Read what `to_json` wrote."""
        return cls(**json.loads(line))


def plan(
    data: str,
    *,
    runs: int = 1,
    families: Collection[str] = EVERYWHERE,
    faults: Collection[str] = (HEALTHY, *KINDS),
    healthy_seeds: int = HEALTHY_SEEDS,
) -> list[PlannedRun]:
    """Return a set's runs: each fault in each family of its, strong and weak, ``runs`` times; and healthy ones.

    What one run is does not depend on which others are asked for.
    """
    planned = [
        _draw(data, family, None, None, number)
        for family in families
        for number in range(healthy_seeds * runs)
        if HEALTHY in faults
    ]
    planned += [
        _draw(data, family, fault, strength, number)
        for fault in KINDS
        if fault in faults
        for family in KINDS[fault].families
        if family in families
        for strength in (STRONG, WEAK)
        for number in range(runs)
    ]
    return planned


def short_plan(data: str) -> list[PlannedRun]:
    """Return some runs of a set, for two minutes."""
    healthy = plan(data, families=("mlp", "cnn", "gpt"), faults=(HEALTHY,), healthy_seeds=1)
    return [*healthy, *_thinned(plan(data, families=("mlp", "cnn", "lstm"), faults=_SHORT_FAULTS))]


def _thinned(planned: list[PlannedRun]) -> Iterator[PlannedRun]:
    """Each fault once strong and once weak, in families that take turns."""
    for position, fault in enumerate(_SHORT_FAULTS):
        for strength in (STRONG, WEAK):
            fitting = [each for each in planned if (each.fault, each.strength) == (fault, strength)]
            yield fitting[position % len(fitting)]


def _draw(data: str, family: str, fault: str | None, strength: str | None, number: int) -> PlannedRun:
    name = "-".join(part for part in (data, family, fault or HEALTHY, strength, str(number)) if part)
    seed = 2 * (zlib.crc32(name.encode()) % 10**6) + SETS.index(data)
    from_start = fault is None or KINDS[fault].from_start
    place = 0.0 if from_start else random.Random(seed).uniform(_EARLIEST, _LATEST)  # noqa: S311 - a draw
    return PlannedRun(
        name,
        data,
        family,
        fault,
        strength,
        seed,
        place,
        half=fault is None and family in _HALF and number % 2 == 1,
    )
