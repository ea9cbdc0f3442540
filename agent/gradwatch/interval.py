"""From the step logs to the points of one interval: exact scalars of every step, histograms of layers."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from operator import sub
from typing import Final

from gradwatch import conventions
from gradwatch.aggregate import LayerAggregate, aggregate_rows
from gradwatch.conventions import Metric
from gradwatch.step_log import MOST_WAITING, StepLog
from gradwatch.telemetry import (
    Attributes,
    AttributeValue,
    HistogramPoint,
    LoggedValue,
    MetricPoints,
    Metrics,
    MetricSeries,
    Point,
)

# Points in one packed series: encoding one holds Python's lock for a fraction of a millisecond.
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
        self.background_a_step = 0.0
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
        layers: dict[tuple[int, str], LayerAggregate] = {}
        cost, lasted, skipped = float(background), 0, 0
        for log in list(self.logs):
            labels: Attributes = {conventions.OPTIMIZER: log.index} if optimizers > 1 else {}
            self._record(log)
            listed, losses = log.take_steps()
            until = listed[-1] if listed else 0
            ends = array("q", listed)
            observed, log.observed = log.observed, 0
            spent, log.spent = log.spent, 0
            cost += spent + (len(ends) - observed) * self.thin_cost
            skipped += log.skipped
            log.skipped = 0
            if log.leads and ends:
                steps, lasted = self._steps(log, ends)
                self.background_a_step = background / len(ends)
                found += steps
            if ends:
                log.first_step += len(ends)
                log.drained_until = until
            found += self._learning_rates(log, ends, labels)
            read = [(end, loss) for end, loss in zip(listed, losses, strict=True) if loss is not None]
            loss_ends, known = array("q", (end for end, _ in read)), array("d", (loss for _, loss in read))
            found += _series(conventions.LOSS, labels, loss_ends, known)
            for metric, column in list(log.columns.items()):
                found += _series(metric, labels, *column.take(until))
            if observed:
                found.append(
                    MetricPoints(conventions.OBSERVED_STEPS, [Point(now, observed, labels, self._start)])
                )
            pace()
            found += _rows(log, until, layers, labels, pace)
        found += self._logged()
        if lasted > 0:
            found.append(MetricPoints(conventions.AGENT_OVERHEAD, [Point(now, cost / lasted, {})]))
        found.append(self._histograms(now, layers, optimizers, pace))
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
        durations = array("q", map(sub, timed, begins))
        while log.pauses and log.pauses[0][0] <= ends[-1]:
            end, paused = log.pauses.pop(0)
            at = bisect_left(timed, end)
            if at < len(timed) and timed[at] == end:
                durations[at] -= paused
        seconds = array("d", [duration / 1e9 for duration in durations])
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
            points.append(Point(time, value, {conventions.METRIC_NAME: name}))
        yield MetricPoints(conventions.LOGGED, points)

    def _histograms(
        self,
        now: int,
        layers: dict[tuple[int, str], LayerAggregate],
        optimizers: int,
        pace: Callable[[], None],
    ) -> MetricPoints:
        points: list[HistogramPoint] = []
        for (optimizer, layer), aggregate in layers.items():
            attributes: dict[str, AttributeValue] = {conventions.LAYER_NAME: layer}
            if optimizers > 1:
                attributes[conventions.OPTIMIZER] = optimizer
            point = aggregate.point(self._start, now, attributes)
            if point is not None:
                points.append(point)
            pace()
        return MetricPoints(conventions.LAYER_GRADIENT_NORM, points)


def _rows(
    log: StepLog,
    until: int,
    layers: dict[tuple[int, str], LayerAggregate],
    labels: Attributes,
    pace: Callable[[], None],
) -> list[MetricSeries]:
    """Count the rows that wait in the log; of each layout, the training thread appends to the last only."""
    found: list[MetricSeries] = []
    waiting = log.rows[:]
    for rows in waiting:
        taken = rows.take(until)
        names = [taken.layers[i] for i in taken.indices]
        if taken.sharded:
            # Other ranks' shares of the same step must meet each other, so nothing is aggregated.
            for column, name in enumerate(names):
                squares = array("d", [norm * norm for norm in taken.norms[column :: len(names)]])
                attributes = {conventions.LAYER_NAME: name, **labels}
                found += _series(conventions.LAYER_GRADIENT_SHARD_SQUARE, attributes, taken.times, squares)
                pace()
        elif taken.norms:
            aggregates = [layers.setdefault((log.index, name), LayerAggregate()) for name in names]
            aggregate_rows(taken.norms, aggregates, pace)
    while len(log.rows) > 1 and not log.rows[0].times:
        del log.rows[0]
    return found


def _series(
    metric: Metric, attributes: Attributes, times: array[int], values: array[float] | array[int]
) -> Iterator[MetricSeries]:
    for start in range(0, len(values), _SERIES):
        part = slice(start, start + _SERIES)
        yield MetricSeries(metric, attributes, times[part], values[part])
