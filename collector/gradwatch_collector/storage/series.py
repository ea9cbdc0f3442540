"""Interned series: a small integer for (run, attempt, rank, metric, field, attribute set)."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from hashlib import blake2b
from typing import Any, Final

from sqlalchemy import Connection, Table, select

from gradwatch_collector.records import Attributes, AttributeSet, Frame, MetricIdentity, ProcessKey
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.interning import Natural, intern

# A metric whose points come in ever new combinations would intern a long set for each.
MAX_SETS: Final = 16
_CACHED: Final = 100_000
# Pruning forgets series that were silent for a day or more (`retention.LEAST`): no id is trusted so long.
TRUSTED_SECONDS: Final = 12 * 3600.0
_NOTHING_MORE: Final[Mapping[str, Any]] = {}
_OF_METRIC: Final = ("run_id", "attempt", "rank", "metric_id")

# Run, attempt, rank, metric, field, digest of the attribute set.
_Place = tuple[str, int, int, MetricIdentity, str, bytes]


def attribute_set(points: list[Attributes]) -> AttributeSet:
    """Return the set of these points, in this order, under the digest that identifies it."""
    canonical = json.dumps(points, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return AttributeSet(blake2b(canonical.encode(), digest_size=16).digest(), tuple(points))


def seconds() -> float:
    """Seconds that pass while the machine is suspended, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class SeriesIds:
    """Looks series up and makes them, remembering what was committed.

    One instance belongs to one writer: after each transaction it calls `keep` or, if that was rolled back,
    `forget`. Any number of writers may share the database.
    """

    def __init__(self, now: Callable[[], float] = seconds) -> None:
        self._now = now
        self._since = now()
        self._known: dict[tuple[Any, ...], Any] = {}
        self._unsure: list[tuple[Any, ...]] = []

    def keep(self) -> None:
        """Trust what was looked up since the last call: it is committed."""
        self._unsure.clear()
        if len(self._known) > _CACHED:
            self._known.clear()

    def forget(self) -> None:
        """Drop what was looked up since the last call: it was rolled back."""
        for key in self._unsure:
            self._known.pop(key, None)
        self._unsure.clear()

    def of(self, connection: Connection, wanted: Sequence[tuple[ProcessKey, Frame]]) -> list[tuple[int, ...]]:
        """Return the id of each frame's series, or one id a point if its metric has too many sets already."""
        if self._now() - self._since > TRUSTED_SECONDS:
            self._known.clear()
            self._since = self._now()
        places = [
            (key.run_id, key.attempt, key.rank, frame.metric, frame.field, frame.attribute_set.digest)
            for key, frame in wanted
        ]
        new = {
            place: frame.attribute_set
            for place, (_, frame) in zip(places, wanted, strict=True)
            if place not in self._known
        }
        if new:
            self._remember(self._look_up(connection, new))
        return [self._known[place] for place in places]

    def _look_up(
        self, connection: Connection, new: Mapping[_Place, AttributeSet]
    ) -> dict[_Place, tuple[int, ...]]:
        natural = {metric: astuple(metric) for metric in {place[3] for place in new}}
        metric_ids = self._intern(connection, schema.metric, dict.fromkeys(natural.values(), _NOTHING_MORE))
        of_metric = {place: (*place[:3], metric_ids[natural[place[3]]]) for place in new}
        sets = _narrowed(connection, of_metric, new)
        set_ids = self._intern(
            connection,
            schema.attribute_set,
            {
                (each.digest,): {"width": each.width, "points": [dict(point) for point in each.points]}
                for each in itertools.chain.from_iterable(sets.values())
            },
        )
        rows = {
            place: [(*of_metric[place], place[4], set_ids[each.digest,]) for each in of_one]
            for place, of_one in sets.items()
        }
        every = dict.fromkeys(itertools.chain.from_iterable(rows.values()), _NOTHING_MORE)
        ids = intern(connection, schema.series, every)
        return {place: tuple(ids[row] for row in of_one) for place, of_one in rows.items()}

    def _intern(
        self, connection: Connection, table: Table, rows: Mapping[Natural, Mapping[str, Any]]
    ) -> dict[Natural, int]:
        # Shared by all runs, and sorted for it; of a run's series there is one writer at a time.
        new = {natural: rows[natural] for natural in sorted(rows) if (table, natural) not in self._known}
        self._remember(
            {(table, natural): identity for natural, identity in intern(connection, table, new).items()}
        )
        return {natural: self._known[table, natural] for natural in rows}

    def _remember(self, looked_up: Mapping[tuple[Any, ...], Any]) -> None:
        self._known |= looked_up
        self._unsure += looked_up


def _narrowed(
    connection: Connection, of_metric: Mapping[_Place, Natural], new: Mapping[_Place, AttributeSet]
) -> dict[_Place, list[AttributeSet]]:
    """Return the sets to store each under: one of each point where a metric has too many wide ones already."""
    wide: dict[Natural, set[bytes]] = {}
    sets = {}
    for place, points in new.items():
        sets[place] = [points]
        if points.width > 1:
            natural = of_metric[place]
            if natural not in wide:
                wide[natural] = _wide_sets(connection, natural)
            if points.digest not in wide[natural] and len(wide[natural]) >= MAX_SETS:
                sets[place] = [attribute_set([point]) for point in points.points]
            else:
                wide[natural].add(points.digest)
    return sets


def _wide_sets(connection: Connection, of_metric: Natural) -> set[bytes]:
    digests = (
        select(schema.attribute_set.c.digest)
        .join(schema.series, schema.series.c.set_id == schema.attribute_set.c.set_id)
        .where(
            schema.attribute_set.c.width > 1,
            *(schema.series.c[name] == value for name, value in zip(_OF_METRIC, of_metric, strict=True)),
        )
        .distinct()
    )
    return {bytes(digest) for digest in connection.scalars(digests)}
