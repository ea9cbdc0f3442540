"""What run-level rules look at: the numbers of the latest attempt of one run, as far as they were received."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gradwatch import conventions as c
from gradwatch_collector.findings.predecessors import Predecessor
from gradwatch_collector.records import Attributes, Times
from gradwatch_collector.runs.checkpoints import CORRUPT, SAVED, VERIFIED
from gradwatch_collector.runs.facts import RunRow
from gradwatch_collector.runs.telling import integer

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Recent:
    """The newest values of a number as they were sent, oldest first.

    ``times``: Unix nanoseconds, shape ``[n]``, increasing. ``values``: shape ``[n]``, NaN and Inf included.
    """

    times: Times
    values: Doubles

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True, slots=True)
class Course:
    """A whole attempt's values in at most 256 stretches of ``width`` values each; the last may have fewer.

    All of shape ``[n]``, oldest first. ``times``: Unix nanoseconds of the last value of a stretch. ``mean``,
    ``least``, ``most``: of the finite ones, NaN where there is none. ``finite``, ``nonfinite``: how many are.
    """

    width: int
    times: Times
    mean: Doubles
    least: Doubles
    most: Doubles
    finite: Doubles
    nonfinite: Doubles

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True, slots=True)
class Levels:
    """A noisy number by medians over at least 20 values each (`levels.py`), oldest first, all of shape ``[n]``.

    ``after``: how many values had been told by the end of each. ``times``: of that end, in Unix nanoseconds or
    since the start of the run. ``noise``: what single values deviate by from their level.
    """

    after: Doubles
    times: Times
    values: Doubles
    noise: Doubles

    def __len__(self) -> int:
        return len(self.values)

    def first(self, count: int) -> Levels:
        """Return so many."""
        return Levels(self.after[:count], self.times[:count], self.values[:count], self.noise[:count])

    def before(self, count: float) -> Levels:
        """Return those that ended when at most so many values had been told."""
        return self.first(int(np.searchsorted(self.after, count, side="right")))

    def until(self, time: float) -> Levels:
        """Return those that ended by then."""
        return self.first(int(np.searchsorted(self.times, time, side="right")))


@dataclass(frozen=True, slots=True)
class Number:
    """One number of one rank, with the attributes of its point: the newest values, and the course of all."""

    rank: int
    attributes: Attributes
    recent: Recent
    course: Course


@dataclass(frozen=True, slots=True)
class Layers:
    """Numbers of all layers of one rank and optimizer, over the newest export intervals, oldest first.

    ``names``: of the layers, ``[n]``. ``times``: Unix nanoseconds, ``[k]``. ``values``: shape ``[n, k]``.
    """

    rank: int
    attributes: Attributes
    names: Sequence[str]
    times: Times
    values: Doubles


@dataclass(frozen=True, slots=True)
class EventSeen:
    """One event; ``time`` in Unix nanoseconds."""

    rank: int
    time: int
    attributes: Attributes

    @property
    def step(self) -> int | None:
        """What it says its step is."""
        return integer(self.attributes.get(c.STEP))


@dataclass(frozen=True, slots=True)
class CheckpointSeen:
    """One attempt to save or verify a checkpoint: ``state`` as in table `checkpoint`."""

    rank: int
    time: int
    state: str
    name: str | None
    step: int | None
    size: int | None
    seconds: float | None
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """One run. ``now`` in Unix nanoseconds, of the collector's clock.

    ``numbers`` by the name of the metric; ``layers`` by the name of the metric and field, such as
    ``training.layer.gradient.norm max`` (``mean`` is made of sum and count). ``events`` by their name and
    ``checkpoints``, oldest first. ``resource``: of its lowest rank. ``errors``: with what its attempts failed,
    oldest first. ``predecessors``: newest first.
    ``precedents``: training losses of earlier runs that went well, their times since their start.
    """

    run: RunRow
    now: int
    resource: Attributes = field(default_factory=dict)
    numbers: Mapping[str, Sequence[Number]] = field(default_factory=dict)
    layers: Mapping[str, Sequence[Layers]] = field(default_factory=dict)
    events: Mapping[str, Sequence[EventSeen]] = field(default_factory=dict)
    checkpoints: Sequence[CheckpointSeen] = ()
    errors: Sequence[str] = ()
    predecessors: Sequence[Predecessor] = ()
    precedents: Sequence[Levels] = ()

    def every(self, metric: c.Metric) -> Sequence[Number]:
        """Return a metric's numbers, by rank and first appearance."""
        return self.numbers.get(metric.name, ())

    def first(self, metric: c.Metric) -> Number | None:
        """Return the number of the lowest rank that told it, of its first optimizer or device; None if none."""
        return next(iter(self.every(metric)), None)

    def logged(self, name: str) -> Number | None:
        """Return what was given to ``watch.log(name=...)``."""
        return next((n for n in self.every(c.LOGGED) if n.attributes.get(c.METRIC_NAME) == name), None)

    def events_named(self, event: c.Event) -> Sequence[EventSeen]:
        """Return the events of a kind, oldest first."""
        return self.events.get(event.name, ())

    def good_checkpoints(self) -> Sequence[CheckpointSeen]:
        """Return those that were saved, and were not found corrupt after that."""
        corrupt: dict[tuple[str | None, int | None], bool] = {}
        good: list[CheckpointSeen] = []
        for each in reversed(self.checkpoints):
            place = each.name, each.step
            if each.state in (VERIFIED, CORRUPT):  # the newest word counts
                corrupt.setdefault(place, each.state == CORRUPT)
            elif each.state == SAVED and not corrupt.get(place, False):
                good.append(each)
        return good[::-1]

    def step_at(self, time: int) -> int | None:
        """Return the last step of the lowest rank that had ended at a time; None if that is not known.

        Of a time before the newest values of `training.step`, it may be too low by a 128th of all.
        """
        steps = self.first(c.STEP_INDEX)
        if steps is None:
            return None
        for times, values in (
            (steps.recent.times, steps.recent.values),
            (steps.course.times, steps.course.most),
        ):
            at = int(np.searchsorted(times, time, side="right")) - 1
            if at >= 0 and (step := integer(float(values[at]))) is not None:
                return step
        return None
