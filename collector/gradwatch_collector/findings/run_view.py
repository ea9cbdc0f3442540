"""What run-level rules look at: the numbers of the latest attempt of one run, as far as they were received."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gradwatch import conventions as c
from gradwatch_collector.findings.predecessors import Predecessor
from gradwatch_collector.records import Attributes, Times
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
    ``checkpoints``, oldest first. ``resource``: of its lowest rank. ``predecessors``: newest first.
    """

    run: RunRow
    now: int
    resource: Attributes = field(default_factory=dict)
    numbers: Mapping[str, Sequence[Number]] = field(default_factory=dict)
    layers: Mapping[str, Sequence[Layers]] = field(default_factory=dict)
    events: Mapping[str, Sequence[EventSeen]] = field(default_factory=dict)
    checkpoints: Sequence[CheckpointSeen] = ()
    predecessors: Sequence[Predecessor] = ()

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

    def step_at(self, time: int) -> int | None:
        """Return the last step of the lowest rank that had ended at a time; None if that is not known."""
        steps = self.first(c.STEP_INDEX)
        if steps is None or not len(steps.recent):
            return None
        at = int(np.searchsorted(steps.recent.times, time, side="right")) - 1
        return int(steps.recent.values[at]) if at >= 0 else None
