"""Interned series: a small integer for (run, attempt, rank, metric, field, attribute set)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any, Final

from sqlalchemy import Column, Connection, Table, select

from gradwatch_collector.records import Attributes, AttributeSet, MetricIdentity, ProcessKey
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.upsert import insert

# A metric whose points come in ever new combinations would intern a long set for each.
MAX_SETS: Final = 16
_CACHED: Final = 100_000
# Pruning forgets series that were silent for a day or more (`retention.LEAST`): no id is trusted so long.
TRUSTED_SECONDS: Final = 12 * 3600.0


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

    def of(
        self, connection: Connection, key: ProcessKey, metric: MetricIdentity, field: str, points: AttributeSet
    ) -> tuple[int, ...]:
        """Return the id of the series, or one id for each point if the metric has too many sets already."""
        if self._now() - self._since > TRUSTED_SECONDS:
            self._known.clear()
            self._since = self._now()
        place = (key.run_id, key.attempt, key.rank, metric, field, points.digest)
        known: tuple[int, ...] | None = self._known.get(place)
        if known is None:
            known = self._look_up(connection, key, metric, field, points)
            self._remember(place, known)
        return known

    def _look_up(
        self, connection: Connection, key: ProcessKey, metric: MetricIdentity, field: str, points: AttributeSet
    ) -> tuple[int, ...]:
        process = {"run_id": key.run_id, "attempt": key.attempt, "rank": key.rank}
        of_metric = {**process, "metric_id": self._metric(connection, metric)}
        if points.width > 1 and _has_too_many_sets(connection, of_metric, points):
            sets = [attribute_set([point]) for point in points.points]
        else:
            sets = [points]
        return tuple(
            _intern(
                connection,
                schema.series,
                schema.series.c.series_id,
                {**of_metric, "field": field, "set_id": self._set(connection, each)},
            )
            for each in sets
        )

    def _metric(self, connection: Connection, metric: MetricIdentity) -> int:
        place = ("metric", metric)
        if place not in self._known:
            natural = {
                "name": metric.name,
                "unit": metric.unit,
                "kind": metric.kind,
                "temporality": metric.temporality,
                "monotonic": metric.monotonic,
            }
            self._remember(place, _intern(connection, schema.metric, schema.metric.c.metric_id, natural))
        return int(self._known[place])

    def _set(self, connection: Connection, points: AttributeSet) -> int:
        place = ("set", points.digest)
        if place not in self._known:
            found = _intern(
                connection,
                schema.attribute_set,
                schema.attribute_set.c.set_id,
                {"digest": points.digest},
                {"width": points.width, "points": [dict(point) for point in points.points]},
            )
            self._remember(place, found)
        return int(self._known[place])

    def _remember(self, place: tuple[Any, ...], value: Any) -> None:
        self._known[place] = value
        self._unsure.append(place)


def _has_too_many_sets(connection: Connection, of_metric: Mapping[str, Any], points: AttributeSet) -> bool:
    wide = (
        select(schema.attribute_set.c.digest)
        .join(schema.series, schema.series.c.set_id == schema.attribute_set.c.set_id)
        .where(
            schema.attribute_set.c.width > 1,
            *(schema.series.c[name] == value for name, value in of_metric.items()),
        )
        .distinct()
    )
    digests = {bytes(digest) for digest in connection.scalars(wide)}
    return points.digest not in digests and len(digests) >= MAX_SETS


def _intern(
    connection: Connection,
    table: Table,
    identity: Column[Any],
    natural: Mapping[str, Any],
    rest: Mapping[str, Any] | None = None,
) -> int:
    find = select(identity).where(*(table.c[name] == value for name, value in natural.items()))
    found = connection.scalar(find)
    if found is None:
        found = connection.scalar(
            insert(connection, table)
            .values(**natural, **(rest or {}))
            .on_conflict_do_nothing()
            .returning(identity)
        )
    # Another writer was faster; its row is committed, or the insert would still be waiting for it.
    return int(found if found is not None else connection.execute(find).scalar_one())
