"""Data points into frames: which points of one metric share a time, and over which attribute set.

Building the attributes of 300 layers again for every request costs more than everything else together, so
what repeats is remembered, by the bytes it was sent as.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from gradwatch_collector.records import Attributes, AttributeSet, Times
from gradwatch_collector.storage.series import attribute_set

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
MAX_NANOS: Final = 2**63 - 1


class Remembered(dict[_Key, _Value], Generic[_Key, _Value]):
    """A dictionary that starts over when it is full: cheaper than keeping the order of use.

    ``weigh``: what a key counts of ``limit``; what would fill it alone is not remembered.
    """

    def __init__(self, limit: int, weigh: Callable[[_Key], int] = lambda _: 1) -> None:
        super().__init__()
        self._limit = limit
        self._weigh = weigh
        self._weight = 0

    def __setitem__(self, key: _Key, value: _Value) -> None:
        weight = self._weigh(key)
        if self._weight + weight > self._limit:
            self.clear()
            self._weight = 0
        if weight <= self._limit:
            self._weight += weight
            super().__setitem__(key, value)


@dataclass(frozen=True, slots=True)
class Group:
    """Points that make one frame. ``index``: positions in the metric, shape ``[width, n]``."""

    attribute_set: AttributeSet
    times: Times
    index: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Points:
    """The attributes of a metric's points, in order; made once for all requests that repeat them."""

    attributes: Sequence[Attributes]
    ids: Sequence[int] = field(init=False)
    whole: AttributeSet | None = field(init=False)
    sets: Remembered[tuple[int, ...], AttributeSet] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        order: dict[bytes, int] = {}
        digests = [attribute_set([point]).digest for point in self.attributes]
        for position, each in enumerate(digests):
            order.setdefault(each, position)
        # A point's id is the position of the first point with its attributes.
        object.__setattr__(self, "ids", [order[each] for each in digests])
        distinct = len(order) == len(self.attributes)
        object.__setattr__(self, "whole", attribute_set(list(self.attributes)) if distinct else None)
        object.__setattr__(self, "sets", Remembered(64))

    def group(self, times: Times, kept: npt.NDArray[np.bool_] | None = None) -> Iterator[Group]:
        """Yield frames of the points, given each point's time; ``kept`` leaves points out.

        Of two points with the same attributes and time the first counts. Times come out increasing.
        """
        if kept is None and self.whole is not None and (times == times[0]).all():
            yield Group(self.whole, times[:1], np.arange(len(times)).reshape(-1, 1))
            return
        by_time: dict[int, dict[int, int]] = {}
        for position, (time, point) in enumerate(zip(times.tolist(), self.ids, strict=True)):
            if kept is None or kept[position]:
                by_time.setdefault(time, {}).setdefault(point, position)
        by_set: dict[tuple[int, ...], list[int]] = {}
        for time in sorted(by_time):
            by_set.setdefault(tuple(by_time[time]), []).append(time)
        for members, same in by_set.items():
            index = np.array([list(by_time[time].values()) for time in same], np.int64).T
            yield Group(self._set(members), np.array(same, np.int64), index)

    def _set(self, members: tuple[int, ...]) -> AttributeSet:
        found = self.sets.get(members)
        if found is None:
            found = attribute_set([self.attributes[point] for point in members])
            self.sets[members] = found
        return found


def valid_times(times: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which times (unsigned nanoseconds) are known and fit the database."""
    return (times > 0) & (times <= MAX_NANOS)
