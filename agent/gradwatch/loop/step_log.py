"""What one optimizer's steps leave behind on the training thread: packed columns, drained by the export thread.

The training thread appends, the export thread takes from the front. Both are single operations under Python's
lock, so neither waits for the other; a value is appended after its time, so a column is complete as far as its
values go. An append costs about 0.05 us, no object survives it, and the garbage collector has nothing to visit.
"""

from __future__ import annotations

import sys
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Final

from gradwatch import conventions
from gradwatch.conventions import Metric
from gradwatch.export.columns import BLOCK, blocks
from gradwatch.life.flight_recorder import FlightStep
from gradwatch.telemetry import StepRecord

# Steps that may wait for an export thread that is held up: 100 s of 1 ms steps.
MOST_WAITING: Final = 100_000


class Column:
    """Numbers and their times (Unix nanoseconds), in two packed arrays."""

    __slots__ = ("times", "values")

    def __init__(self) -> None:
        self.times = array("q")
        self.values = array("d")

    def append(self, time: int, value: float) -> None:
        """Training thread."""
        self.times.append(time)
        self.values.append(value)

    def take(self, until: int) -> tuple[array[int], array[float]]:
        """Export thread: all up to this time."""
        count = bisect_right(self.times, until, hi=len(self.values))
        taken = self.times[:count], self.values[:count]
        del self.times[:count]
        del self.values[:count]
        return taken

    def between(self, since: int, until: int) -> dict[int, float]:
        """Any thread: the values from the one time to the other, by time. Takes nothing away."""
        times = self.times[:]
        part = slice(bisect_left(times, since), bisect_right(times, until))
        return dict(zip(times[part], self.values[part], strict=False))


class Rows:
    """Gradient norms of observed steps: ``norms`` holds one row of ``len(indices)`` after the other."""

    __slots__ = ("indices", "layers", "norms", "sharded", "times")

    def __init__(self, layers: Sequence[str], indices: Sequence[int], sharded: bool) -> None:
        self.layers = layers
        self.sharded = sharded
        self.indices = indices
        self.times = array("q")
        self.norms = array("d")

    def append(self, time: int, norms: Sequence[float]) -> None:
        """Training thread: one observed step."""
        self.norms.extend(norms)
        self.times.append(time)

    def count(self, until: int) -> int:
        """Any thread: how many rows there are up to this time."""
        return bisect_right(self.times, until)

    def take(self, until: int) -> Iterator[Rows]:
        """Export thread: all rows up to this time, a block at a time."""
        count = self.count(until)
        width = len(self.indices)
        for start in range(0, count, rows := max(1, BLOCK // max(1, width))):
            end = min(count, start + rows)
            taken = Rows(self.layers, self.indices, self.sharded)
            taken.times = self.times[start:end]
            taken.norms = self.norms[start * width : end * width]
            yield taken
        del self.times[:count]
        del self.norms[: count * width]

    def between(self, since: int, until: int) -> Iterator[tuple[int, array[float]]]:
        """Any thread: times and norms (float32) of the rows of that time. Takes nothing away."""
        times = self.times[:]
        width = len(self.indices)
        first, stop = bisect_left(times, since), bisect_right(times, until)
        norms = self.norms[first * width : stop * width]
        single = array("f", bytes(4 * len(norms)))
        for narrow, wide in blocks(single, norms):
            narrow.copy_(wide)
        for row, end in enumerate(times[first:stop]):
            yield end, single[row * width : (row + 1) * width]

    def belongs(self, layers: Sequence[str], indices: Sequence[int]) -> bool:
        """Whether norms of these parameters go into these rows."""
        return self.layers is layers and (self.indices is indices or list(self.indices) == list(indices))


class StepLog:
    """Columns of one optimizer.

    Attributes:
        ends: When each step ended, one entry a step. Appended to last.
        losses: Its loss, None where there is none or it comes later.
        pauses: End of a step and the nanoseconds in it that are not its own (evaluation, checkpoint).
        rates: End of the first step with these learning rates, and one rate for each parameter group.
        rates_now: The rates of the step drained last.
        marks: Ends of steps that were non-finite or skipped, and which of both.
        keep: Steps not drained yet: the last one's loss may be replaced, a device's values arrive late.
        leads: Whether its steps are the run's.
        drained_until: End of the step drained last, None before.
        columns: Everything else that is known of some steps only.
        rows: Per-layer norms; a change of layout begins a new entry.
        spent: Nanoseconds of the training thread in steps that were not thin.
        draining: Held while steps are taken out, and while somebody looks at those that wait, lest he find
            it half done. No step takes it.
        closed: No step will follow, so the last loss can no longer be replaced.
    """

    __slots__ = (
        "closed", "columns", "drained_until", "draining", "ends", "first_step", "index", "keep", "leads",
        "losses", "marks", "pauses", "rates", "rates_now", "rows", "skipped", "spent",
    )  # fmt: skip

    def __init__(self, index: int, first_step: int) -> None:
        self.index = index
        self.first_step = first_step
        # Lists, not arrays: appending to one is an instruction and not a call. Numbers are nothing to collect.
        self.ends: list[int] = []
        self.losses: list[float | None] = []
        self.pauses: list[tuple[int, int]] = []
        self.rates: list[tuple[int, tuple[float | None, ...]]] = []
        self.rates_now: tuple[float | None, ...] = ()
        self.marks: list[tuple[int, bool, bool]] = []
        self.keep = 1
        self.leads = False
        self.drained_until: int | None = None
        self.columns: dict[Metric, Column] = {}
        self.rows: list[Rows] = []
        self.skipped = 0
        self.spent = 0
        self.closed = False
        self.draining = threading.RLock()  # a signal's handler may interrupt who holds it

    def column(self, metric: Metric) -> Column:
        """Where values of this metric go."""
        column = self.columns.get(metric)
        if column is None:
            column = self.columns[metric] = Column()
        return column

    def is_full(self) -> bool:
        """Whether so much waits that it is better given up than kept."""
        return len(self.ends) > MOST_WAITING

    def add(self, record: StepRecord) -> None:
        """Take what is known of a step beyond its end: at once, or when it has arrived from a device."""
        time = record.time
        if record.loss is not None:
            self.column(conventions.LOSS).append(time, record.loss)
        norm = record.gradient_norm
        if record.indices is not None and record.norms is not None:
            self.observe(time, record.layers, record.indices, record.norms, norm, sharded=record.sharded)
        elif norm is not None:
            self.column(conventions.GRADIENT_NORM).append(time, norm)
        if record.clip_ratio is not None:
            self.column(conventions.CLIP_RATIO).append(time, record.clip_ratio)
        if record.loss_scale is not None:
            self.column(conventions.LOSS_SCALE).append(time, record.loss_scale)
        if record.local_norm is not None:
            self.column(conventions.LOCAL_GRADIENT_NORM).append(time, record.local_norm)
        self.skipped += record.skipped
        if record.nonfinite or record.skipped:
            self.marks.append((time, record.nonfinite, record.skipped))

    def observe(
        self,
        time: int,
        layers: Sequence[str],
        indices: Sequence[int],
        norms: Sequence[float],
        total: float | None,
        *,
        sharded: bool = False,
    ) -> None:
        """Training thread: the gradients of a step, and their norm all together."""
        if total is not None:
            if sharded:
                self.column(conventions.GRADIENT_SHARD_SQUARE).append(time, total * total)
            else:
                self.column(conventions.GRADIENT_NORM).append(time, total)
        rows = self.rows[-1] if self.rows else None
        if rows is None or not rows.belongs(layers, indices):
            rows = Rows(layers, indices, sharded)
            self.rows.append(rows)
        rows.append(time, norms)

    def take_steps(self, most: int) -> tuple[list[int], list[float | None]]:
        """Export thread: ends and losses of ``most`` steps, but the last, whose loss may still be replaced."""
        count = max(0, min(most, len(self.ends) - (0 if self.closed else self.keep)))
        taken = self.ends[:count], self.losses[:count]
        del self.ends[:count]
        del self.losses[:count]
        while count and self.marks and self.marks[0][0] <= taken[0][-1]:
            del self.marks[0]
        return taken

    def end_of(self, step: int) -> int | None:
        """Any thread: when this step ended, or the last one drained after it; None before."""
        with self.draining:
            place = step - self.first_step
            return self.drained_until if place < 0 else self.ends[place] if place < len(self.ends) else None

    def last_steps(self, most: int, until: int | None = None) -> list[FlightStep]:
        """Any thread: what waits of the last ``most`` steps (that ended ``until`` then), for the black box.

        Takes nothing away.
        """
        with self.draining:
            return list(self._last_steps(most, until))

    def _last_steps(self, most: int, until: int | None) -> Iterator[FlightStep]:
        ends = self.ends[:]
        if until is not None:
            del ends[bisect_right(ends, until) :]
        if not ends:
            return
        losses = self.losses[: len(ends)]
        start = max(0, len(ends) - most)
        since, until = ends[start], ends[-1]
        columns = {metric: c.between(since, until) for metric, c in self.columns.items()}
        late_losses = columns.get(conventions.LOSS, {})
        norms = columns.get(conventions.GRADIENT_NORM, {})
        ratios = columns.get(conventions.CLIP_RATIO, {})
        marks = {time: flags for time, *flags in self.marks}
        observed = {time: (rows, norms) for rows in self.rows[:] for time, norms in rows.between(since, until)}
        pauses = dict(self.pauses[:])
        changes = [*self.rates, (sys.maxsize, ())]
        change = bisect_right(changes, since, key=itemgetter(0))
        rates = changes[change - 1][1] if change else self.rates_now
        for place in range(start, len(ends)):
            time, before = ends[place], ends[place - 1] if place else self.drained_until
            while changes[change][0] <= time:
                rates = changes[change][1]
                change += 1
            rows, row = observed.get(time, (None, None))
            nonfinite, skipped = marks.get(time, (False, False))
            yield FlightStep(
                self.index,
                self.first_step + place,
                time,
                None if before is None else time - before - pauses.get(time, 0),
                late_losses.get(time, losses[place]),
                rates,
                () if rows is None else rows.layers,
                None if rows is None else rows.indices,
                row,
                norms.get(time),
                nonfinite,
                skipped,
                ratios.get(time),
            )
