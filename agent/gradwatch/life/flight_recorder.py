"""The black box: the last steps of every optimizer, per-layer norms included, in a bounded piece of memory.

The export thread feeds it with what it drains, so that the training thread pays nothing for it. Steps are rows
of a ring, values are packed columns: 1000 layers by 256 steps take 1 MB. Needs neither torch nor OpenTelemetry;
the collector decodes with it.
"""

from __future__ import annotations

import base64
import json
import math
import statistics
import sys
import threading
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple


class FlightStep(NamedTuple):
    """One step of one optimizer as the black box keeps it; what is not known is None.

    ``time`` is its end in Unix nanoseconds, ``duration`` in nanoseconds; ``norms`` are the pre-clip L2 norms of
    the gradients named by ``layers`` at ``indices``.
    """

    optimizer: int
    step: int
    time: int
    duration: int | None
    loss: float | None
    learning_rates: tuple[float | None, ...]
    layers: Sequence[str] = ()
    indices: Sequence[int] | None = None
    norms: Sequence[float] | None = None
    gradient_norm: float | None = None
    nonfinite: bool = False
    skipped: bool = False
    clip_ratio: float | None = None


# Of a layer whose gradient was not read in an observed step. A norm is never negative.
_NOT_READ: Final = -1.0
# Columns of one number a step. Times in seconds.
_SCALARS: Final[dict[str, Callable[[FlightStep], float | None]]] = {
    "duration": lambda record: None if record.duration is None else record.duration / 1e9,
    "loss": lambda record: record.loss,
    "gradient_norm": lambda record: record.gradient_norm,
    "clip_ratio": lambda record: record.clip_ratio,
}
# Bits of the flags column; from `_KNOWN` on one for each scalar, since NaN is a number and None is not.
_OBSERVED, _NONFINITE, _SKIPPED, _KNOWN = 1, 2, 4, 8
_FORMAT: Final = 1
_GZIP: Final = 31  # zlib's window bits for a gzip header, so that `zcat` reads the file
_EITHER: Final = 47  # and for whichever header is there


class _Ring:
    """The last steps of one optimizer."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.layers: Sequence[str] = ()
        self.in_order: Sequence[int] = ()
        self.rows = 0  # ever written; row i lives in slot i % capacity
        self.step = array("q", bytes(8 * capacity))
        self.time = array("q", bytes(8 * capacity))
        self.flags = array("B", bytes(capacity))
        self.scalars = {name: array("d", bytes(8 * capacity)) for name in _SCALARS}
        self.rates: list[tuple[float | None, ...]] = [()] * capacity
        self.norms = array("f")

    def add(self, record: FlightStep) -> None:
        slot = self._slot(record.time)
        if slot is None:
            return
        self.step[slot] = record.step
        self.time[slot] = record.time
        self.rates[slot] = record.learning_rates
        flags = _NONFINITE * record.nonfinite | _SKIPPED * record.skipped
        for bit, (name, read) in enumerate(_SCALARS.items()):
            value = read(record)
            if value is not None:
                flags |= _KNOWN << bit
                self.scalars[name][slot] = value
        if record.norms is not None and record.indices is not None:
            flags |= _OBSERVED
            if record.layers is not self.layers:
                self._relabel(record.layers)
            self._write_norms(slot, record.indices, record.norms)
        self.flags[slot] = flags

    def _slot(self, time: int) -> int | None:
        """Where a step belongs that ended then: a new row, or its own if a dump included it while it waited."""
        for row in range(self.rows - 1, max(0, self.rows - self.capacity) - 1, -1):
            slot = row % self.capacity
            if self.time[slot] == time:
                return slot
            if self.time[slot] < time:
                break
        else:
            if self.rows:
                return None  # older than all that is held
        self.rows += 1
        return (self.rows - 1) % self.capacity

    def _write_norms(self, slot: int, indices: Sequence[int], norms: Sequence[float]) -> None:
        width = len(self.layers)
        if tuple(indices) == self.in_order:
            row = array("f", norms)
        else:
            row = array("f", [_NOT_READ]) * width
            for index, norm in zip(indices, norms, strict=True):
                row[index] = norm
        self.norms[slot * width : (slot + 1) * width] = row

    def _relabel(self, layers: Sequence[str]) -> None:
        """New columns; those of layers that are still there move with them."""
        if tuple(layers) != tuple(self.layers):
            before = {name: index for index, name in enumerate(self.layers)}
            old, old_width = self.norms, len(self.layers)
            width = len(layers)
            self.norms = array("f", [_NOT_READ]) * (width * self.capacity)
            for index, name in enumerate(layers):
                if name in before:
                    self.norms[index::width] = old[before[name] :: old_width]
        self.layers = layers
        self.in_order = tuple(range(len(layers)))

    def slots(self) -> list[int]:
        """Slots in use, oldest first."""
        return [row % self.capacity for row in range(max(0, self.rows - self.capacity), self.rows)]

    def packed(self, last: int) -> dict[str, Any]:
        """The last steps as JSON holds them: lists, and the norms of observed steps as a base64 block."""
        slots = self.slots()[-last:]
        width = len(self.layers)
        observed = [place for place, slot in enumerate(slots) if self.flags[slot] & _OBSERVED]
        norms = array("f")
        for place in observed:
            norms += self.norms[slots[place] * width : (slots[place] + 1) * width]
        if sys.byteorder == "big":
            norms.byteswap()
        return {
            "layers": list(self.layers),
            "step": [self.step[slot] for slot in slots],
            "time": [self.time[slot] for slot in slots],
            **{name: [_worded(value) for value in self.known(name, slots)] for name in _SCALARS},
            "learning_rate": [[_worded(rate) for rate in self.rates[slot]] for slot in slots],
            "nonfinite": [bool(self.flags[slot] & _NONFINITE) for slot in slots],
            "skipped": [bool(self.flags[slot] & _SKIPPED) for slot in slots],
            "observed": observed,
            "norms": base64.b64encode(norms.tobytes()).decode(),
        }

    def known(self, name: str, slots: Sequence[int]) -> list[float | None]:
        """A column of scalars at these slots, None where the value is not known."""
        bit = _KNOWN << list(_SCALARS).index(name)
        column = self.scalars[name]
        return [column[slot] if self.flags[slot] & bit else None for slot in slots]


class FlightRecorder:
    """Keeps the last ``steps`` steps of every optimizer. One thread may feed it and another dump it."""

    def __init__(self, steps: int) -> None:
        self.capacity = steps
        self._rings: dict[int, _Ring] = {}
        self._lock = threading.Lock()

    def add(self, record: FlightStep) -> None:
        """Keep a step. One that a dump included while it waited takes its place, now complete."""
        with self._lock:
            self._add(record)

    def _add(self, record: FlightStep) -> None:
        ring = self._rings.get(record.optimizer)
        if ring is None:
            ring = self._rings[record.optimizer] = _Ring(self.capacity)
        ring.add(record)

    def include(self, tail: Iterable[FlightStep]) -> None:
        """Keep steps that wait to be drained, before a dump; draining them later completes them."""
        with self._lock:
            for record in tail:
                self._add(record)

    def steps(self) -> int:
        """Steps held, of the optimizer with the most."""
        with self._lock:
            return max((min(ring.rows, ring.capacity) for ring in self._rings.values()), default=0)

    def median_duration(self) -> float | None:
        """Median step duration in seconds over what is held; None before the second step."""
        with self._lock:
            ring = self._rings.get(0)
            durations = ring.known("duration", ring.slots()) if ring else []
        known = [duration for duration in durations if duration is not None]
        return statistics.median(known) if known else None

    def document(self, about: Mapping[str, object], last: int | None = None) -> bytes:
        """The last steps (all, unless told) as JSON, ``about`` in front."""
        with self._lock:
            optimizers = {
                str(number): ring.packed(last or self.capacity) for number, ring in self._rings.items()
            }
        whole = {"format": _FORMAT, **about, "optimizers": optimizers}
        return json.dumps(whole, separators=(",", ":"), allow_nan=False).encode()


def compress(document: bytes) -> bytes:
    """As it is sent."""
    return zlib.compress(document, 1)


def compress_for_file(document: bytes) -> bytes:
    """As it is written: with gzip's header, for tools that know it."""
    return zlib.compress(document, 1, wbits=_GZIP)


def fitting(recorder: FlightRecorder, about: Mapping[str, object], limit: int) -> tuple[int, bytes]:
    """The most recent steps that fit into ``limit`` bytes compressed, and how many; at least one is kept."""
    steps = recorder.steps()
    while True:
        data = compress(recorder.document(about, steps))
        if len(data) <= limit or steps <= 1:
            return steps, data
        steps = max(1, min(steps - 1, int(steps * limit / len(data) * 0.95)))


def decode(data: bytes) -> dict[str, Any]:
    """The black box, sent or from a file, as plain values: NaN and infinities are floats, the unknown is None.

    ``optimizers`` maps an optimizer's index to its columns, oldest step first; ``norms`` maps a layer to its
    column, None where the step was not observed.

    Raises:
        ValueError: This is no black box.
    """
    try:
        whole = json.loads(zlib.decompress(data, _EITHER))
        known = whole["format"] == _FORMAT
        whole["optimizers"] = {int(number): _unpacked(ring) for number, ring in whole["optimizers"].items()}
    except (zlib.error, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not a flight record: {error}") from error
    if not known:
        raise ValueError(f"a flight record of format {whole['format']}, which is not known")
    return dict(whole)


def _unpacked(ring: dict[str, Any]) -> dict[str, Any]:
    layers, observed = ring["layers"], ring.pop("observed")
    norms = array("f", base64.b64decode(ring["norms"]))
    if sys.byteorder == "big":
        norms.byteswap()
    columns: dict[str, list[float | None]] = {name: [None] * len(ring["step"]) for name in layers}
    for row, place in enumerate(observed):
        for name, norm in zip(layers, norms[row * len(layers) : (row + 1) * len(layers)], strict=True):
            columns[name][place] = None if norm == _NOT_READ else norm
    for column in _SCALARS:
        ring[column] = [_number(value) for value in ring[column]]
    ring["learning_rate"] = [[_number(rate) for rate in rates] for rates in ring["learning_rate"]]
    return {**ring, "norms": columns}


def _worded(value: float | None) -> float | str | None:
    # JSON has no NaN; protobuf's JSON mapping names it so.
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _number(value: float | str | None) -> float | None:
    return None if value is None else float(value)
