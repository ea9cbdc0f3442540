"""What is kept in memory of one number of a run: little, however long the run is."""

from __future__ import annotations

from typing import Final

import numpy as np

from gradwatch_collector.findings.run_view import Course, Doubles, Recent
from gradwatch_collector.records import Times

RECENT: Final = 512
STRETCHES: Final = 256


class Track:
    """Takes in values in the order of their times."""

    def __init__(self) -> None:
        self._times = np.empty(0, np.int64)
        self._values = np.empty(0)
        self._seen = 0
        self._width = 1
        # Of each stretch: last time; sum, least, most of the finite values; how many are finite, and are not.
        self._ends = np.empty(0, np.int64)
        self._sums, self._least, self._most = np.empty(0), np.empty(0), np.empty(0)
        self._finite, self._nonfinite = np.empty(0), np.empty(0)

    def add(self, times: Times, values: Doubles) -> None:
        """Take in values of shape ``[n]``."""
        self._times = np.concatenate([self._times, times])[-RECENT:]
        self._values = np.concatenate([self._values, values])[-RECENT:]
        while (self._seen + len(values) - 1) // self._width >= STRETCHES:
            self._halve()
        self._put(times, values)
        self._seen += len(values)

    def recent(self) -> Recent:
        """Return the newest values."""
        return Recent(self._times, self._values)

    def course(self) -> Course:
        """Return all of them in stretches."""
        known = self._finite > 0
        with np.errstate(invalid="ignore"):
            mean = self._sums / self._finite
        return Course(
            self._width,
            self._ends,
            mean,
            np.where(known, self._least, np.nan),
            np.where(known, self._most, np.nan),
            self._finite,
            self._nonfinite,
        )

    def _put(self, times: Times, values: Doubles) -> None:
        places = (self._seen + np.arange(len(values))) // self._width
        more = int(places[-1]) + 1 - len(self._ends) if len(places) else 0
        self._ends = np.concatenate([self._ends, np.zeros(more, np.int64)])
        self._sums, self._finite, self._nonfinite = (
            np.concatenate([each, np.zeros(more)]) for each in (self._sums, self._finite, self._nonfinite)
        )
        self._least = np.concatenate([self._least, np.full(more, np.inf)])
        self._most = np.concatenate([self._most, np.full(more, -np.inf)])
        finite = np.isfinite(values)
        np.maximum.at(self._ends, places, times)
        np.add.at(self._sums, places[finite], values[finite])
        np.minimum.at(self._least, places[finite], values[finite])
        np.maximum.at(self._most, places[finite], values[finite])
        np.add.at(self._finite, places, finite)
        np.add.at(self._nonfinite, places, ~finite)

    def _halve(self) -> None:
        firsts = np.arange(0, len(self._ends), 2)
        self._width *= 2
        if not len(firsts):
            return
        self._ends = np.maximum.reduceat(self._ends, firsts)
        self._sums, self._finite, self._nonfinite = (
            np.add.reduceat(each, firsts) for each in (self._sums, self._finite, self._nonfinite)
        )
        self._least = np.minimum.reduceat(self._least, firsts)
        self._most = np.maximum.reduceat(self._most, firsts)
