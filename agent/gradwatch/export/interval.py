"""From the step logs to the points of one interval: exact scalars of every step, histograms of layers."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from itertools import compress
from typing import Final, cast

import torch
from torch import Tensor

from gradwatch import conventions
from gradwatch.conventions import Metric
from gradwatch.export.aggregate import aggregate_rows
from gradwatch.export.columns import BLOCK, blocks, tensor
from gradwatch.loop.step_log import MOST_WAITING, Rows, StepLog
from gradwatch.redaction import redact_name
from gradwatch.telemetry import (
    Attributes,
    HistogramPoint,
    LoggedValue,
    MetricPoints,
    Metrics,
    MetricSeries,
    Point,
)

# Points in one packed series: encoding one takes a third of a millisecond.
_SERIES: Final = 4096


class Interval:
    """Collects what the training thread hands over, and turns it into points when asked.

    Args:
        start: Beginning of the first interval, Unix nanoseconds.
    """

    def __init__(self, start: int, record: Callable[[StepLog], None] = lambda _log: None) -> None:
        self._record = record
        self.logs: list[StepLog] = []
        self.logged: deque[LoggedValue] = deque(maxlen=MOST_WAITING)
        self.nonfinite = 0
        self.thin_cost = 0.0
        self.background_a_step: float | None = None  # until there were steps
        self._nonfinite_sent = 0
        self._given_up = 0
        self._start = start

    def open_log(self, optimizer: int, first_step: int) -> StepLog:
        """Training thread: a log of this optimizer from now on, instead of any earlier one."""
        log = StepLog(optimizer, first_step)
        if optimizer < len(self.logs):
            before = self.logs[optimizer]
            log.rates_now, log.keep, log.leads = before.rates_now, before.keep, before.leads
            self._given_up += len(self.logs[optimizer].ends)
            self.logs[optimizer] = log
        else:
            self.logs.append(log)
        return log

    def add_logged(self, value: LoggedValue) -> None:
        """Any thread: a value of the user's. Past a bound the oldest goes, and is counted."""
        self._given_up += len(self.logged) == self.logged.maxlen
        self.logged.append(value)

    def points(
        self,
        now: int,
        optimizers: int,
        dropped: int,
        background: int = 0,
        pace: Callable[[], None] = lambda: None,
    ) -> Metrics:
        """Everything since the last call, up to ``now`` (Unix nanoseconds).

        ``background``: nanoseconds of processor time our own threads took since the last call. ``pace`` is
        called between small pieces of work, so that this thread holds Python's lock only briefly.
        """
        found: list[MetricPoints | MetricSeries] = []
        cost, lasted, skipped = float(background), 0, 0
        for log in list(self.logs):
            labels: Attributes = {conventions.OPTIMIZER: log.index} if optimizers > 1 else {}
            # What ends while these are recorded is recorded, and drained, next time.
            waiting = len(log.ends)
            self._record(log)
            pace()
            with log.draining:
                listed, losses = log.take_steps(waiting)
                until = listed[-1] if listed else 0
                ends = array("q", listed)
                # Those whose rows go out with this interval: the last step is held back.
                observed = sum([rows.count(until) for rows in log.rows])
                spent, log.spent = log.spent, 0
                cost += spent + (len(ends) - observed) * self.thin_cost
                skipped += log.skipped
                log.skipped = 0
                if log.leads and ends:
                    pace()
                    steps, lasted = self._steps(log, ends)
                    pace()
                    self.background_a_step = background / len(ends)
                    found += steps
                if ends:
                    log.first_step += len(ends)
                    log.drained_until = until
                    while (
                        log.pauses and log.pauses[0][0] <= until
                    ):  # of an optimizer whose steps are not the run's
                        del log.pauses[0]
                found += self._learning_rates(log, ends, labels)
                pace()
                found += _series(conventions.LOSS, labels, *_known(ends, losses))
                for metric, column in list(log.columns.items()):
                    found += _series(metric, labels, *column.take(until))
                    pace()
                if observed:
                    found.append(
                        MetricPoints(conventions.OBSERVED_STEPS, [Point(now, observed, labels, self._start)])
                    )
                found += self._layers(log, until, now, labels, pace)
        found += self._logged()
        if lasted > 0:
            found.append(MetricPoints(conventions.AGENT_OVERHEAD, [Point(now, cost / lasted, {})]))
        counted = self.nonfinite
        # Counters are there from the start, so that the first count is an increase; one of skipped steps only
        # where a scaler is at work.
        scaled = any(conventions.LOSS_SCALE in log.columns for log in self.logs)
        for metric, count, always in (
            (conventions.NONFINITE, counted - self._nonfinite_sent, True),
            (conventions.SKIPPED_STEPS, skipped, scaled),
            (conventions.AGENT_DROPPED, dropped + self._given_up, False),
        ):
            if count or always:
                found.append(MetricPoints(metric, [Point(now, count, {}, self._start)]))
        self._nonfinite_sent = counted
        self._given_up = 0
        self._start = now
        return [batch for batch in found if len(batch)]

    def _steps(self, log: StepLog, ends: array[int]) -> tuple[list[MetricSeries], int]:
        """Index and duration of the steps that ended, and nanoseconds they lasted together."""
        indices = array("q", range(log.first_step, log.first_step + len(ends)))
        begins = ends[:-1]
        timed = ends[1:]
        if log.drained_until is not None:
            begins.insert(0, log.drained_until)
            timed = ends
        durations = array("q", bytes(8 * len(timed)))
        for into, ended, begun in blocks(durations, timed, begins):
            into.copy_(ended).sub_(begun)
        while log.pauses and log.pauses[0][0] <= ends[-1]:
            end, paused = log.pauses.pop(0)
            at = bisect_left(timed, end)
            if at < len(timed) and timed[at] == end:
                durations[at] -= paused
        seconds = array("d", bytes(8 * len(timed)))
        for into, nanoseconds in blocks(seconds, durations):
            into.copy_(nanoseconds).div_(1e9)
        return [
            *_series(conventions.STEP_INDEX, {}, ends, indices),
            *_series(conventions.STEP_DURATION, {}, timed, seconds),
        ], sum(durations)

    def _learning_rates(self, log: StepLog, ends: array[int], labels: Attributes) -> Iterator[MetricSeries]:
        """The rates of every step, from the steps at which they changed."""
        at = 0
        while at < len(ends):
            while log.rates and log.rates[0][0] <= ends[at]:
                log.rates_now = log.rates.pop(0)[1]
            until = bisect_left(ends, log.rates[0][0]) if log.rates else len(ends)
            rates = log.rates_now
            for group, rate in enumerate(rates):
                if rate is not None:
                    attributes = {**labels, conventions.PARAM_GROUP: group} if len(rates) > 1 else labels
                    values = array("d", [rate]) * (until - at)
                    yield from _series(conventions.LEARNING_RATE, attributes, ends[at:until], values)
            at = until

    def _logged(self) -> Iterator[MetricPoints]:
        points = []
        while self.logged:
            name, time, value = self.logged.popleft()
            points.append(Point(time, value, {conventions.METRIC_NAME: redact_name(name)}))
        yield MetricPoints(conventions.LOGGED, points)

    def _layers(
        self, log: StepLog, until: int, now: int, labels: Attributes, pace: Callable[[], None]
    ) -> Iterator[MetricPoints | MetricSeries]:
        """What is known of layers: of each layout, the training thread appends to the last rows only."""
        waiting = []
        for rows in log.rows[:]:
            for taken in rows.take(until):
                waiting.append(taken)
                pace()
        while len(log.rows) > 1 and not log.rows[0].times:
            del log.rows[0]
        for taken in waiting:
            if taken.sharded:
                yield from _shard_squares(taken, labels, pace)
        layers, matrices = _as_matrices([rows for rows in waiting if rows.norms and not rows.sharded], pace)
        if matrices:
            points = [
                HistogramPoint(self._start, now, {conventions.LAYER_NAME: layer, **labels}, *statistics)
                for layer, statistics in zip(layers, aggregate_rows(matrices, pace), strict=True)
                if statistics is not None
            ]
            pace()
            yield MetricPoints(conventions.LAYER_GRADIENT_NORM, points)


def _known(ends: array[int], losses: list[float | None]) -> tuple[array[int], array[float]]:
    """The losses that there are, and their times."""
    if None not in losses:
        return ends, array("d", cast("list[float]", losses))
    there = [loss is not None for loss in losses]
    return array("q", compress(ends, there)), array("d", (loss for loss in losses if loss is not None))


def _shard_squares(rows: Rows, labels: Attributes, pace: Callable[[], None]) -> Iterator[MetricSeries]:
    """Other ranks' shares of the same step must meet each other, so nothing is aggregated."""
    for column, index in enumerate(rows.indices):
        norms = rows.norms[column :: len(rows.indices)]
        attributes = {conventions.LAYER_NAME: rows.layers[index], **labels}
        squares = array("d", [norm * norm for norm in norms])
        yield from _series(conventions.LAYER_GRADIENT_SHARD_SQUARE, attributes, rows.times, squares)
        pace()


def _as_matrices(waiting: list[Rows], pace: Callable[[], None]) -> tuple[list[str], list[Tensor]]:
    """All rows in blocks, a layer a column; what a row does not have is NaN, which is not counted."""
    alike: dict[tuple[str, ...], list[array[float]]] = {}
    names: tuple[str, ...] = ()
    before: Rows | None = None
    for rows in waiting:
        if before is None or rows.layers is not before.layers or rows.indices is not before.indices:
            names = tuple([rows.layers[index] for index in rows.indices])
        before = rows
        parts = alike.setdefault(names, [])
        # Where layouts take turns, each comes in pieces of a row or two.
        if parts and len(parts[-1]) + len(rows.norms) <= BLOCK:
            parts[-1].extend(rows.norms)
        else:
            parts.append(rows.norms)
        pace()
    layers = list(dict.fromkeys(name for names in alike for name in names))
    columns = {name: column for column, name in enumerate(layers)}
    matrices = []
    for names, parts in alike.items():
        places = torch.tensor([columns[name] for name in names], dtype=torch.int64, device="cpu")
        for part in parts:
            narrow = tensor(part).view(-1, len(names))
            if len(alike) == 1:
                matrices.append(narrow)
                continue
            for some in torch.split(narrow, max(1, BLOCK // len(layers))):
                wide = some.new_full((len(some), len(layers)), math.nan)
                # Not an assignment by index, which is spread over torch's threads whatever its size.
                matrices.append(wide.index_copy_(1, places, some))
                pace()
    return layers, matrices


def _series(
    metric: Metric, attributes: Attributes, times: array[int], values: array[float] | array[int]
) -> Iterator[MetricSeries]:
    for start in range(0, len(values), _SERIES):
        part = slice(start, start + _SERIES)
        yield MetricSeries(metric, attributes, times[part], values[part])
