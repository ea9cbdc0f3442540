"""What a run held that is paid by the hour: devices by their name, hosts where it trained on the CPU.

Each process holds its devices from its start until it ended or was last known to live, over all attempts and
ranks. Which devices is told by their memory; a process whose device has a name and that told no more holds one.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, select

from gradwatch import conventions as c
from gradwatch_collector.records import NO_RANK
from gradwatch_collector.runs.telling import text
from gradwatch_collector.storage import schema
from gradwatch_collector.storage.reading import series_rows
from gradwatch_slo.cost import CPU_HOST, UNNAMED_DEVICE, Cost, Held, PriceTable, cost_of

_LONGEST_NAME = 256
_UNTOLD = "the device"


def run_cost(connection: Connection, run_id: str, prices: PriceTable | None) -> Cost:
    """Return what a run held, and what it cost; unknown without prices."""
    return cost_of(_held(connection, run_id), prices)


def _held(connection: Connection, run_id: str) -> Iterator[Held]:
    devices = devices_used(connection, run_id)
    process = schema.process.c
    rows = connection.execute(
        select(
            process.attempt,
            process.rank,
            process.started_at,
            process.ended_at,
            process.last_seen_at,
            process.resource,
        ).where(process.run_id == run_id, process.is_run, process.rank != NO_RANK)
    )
    for row in rows:
        host = text(row.resource.get(c.HOST_NAME), _LONGEST_NAME) or "?"
        name = text(row.resource.get(c.DEVICE_NAME), _LONGEST_NAME)
        ended = row.last_seen_at if row.ended_at is None else row.ended_at
        told = devices.get((row.attempt, row.rank), set())
        if told or name is not None:
            for device in told or {_UNTOLD}:
                which = f"{host} rank {row.rank} {device}"
                yield Held(name or UNNAMED_DEVICE, which, row.started_at, ended)
        else:
            yield Held(CPU_HOST, host, row.started_at, ended)


def devices_used(connection: Connection, run_id: str) -> dict[tuple[int, int], set[str]]:
    """Return the devices that each attempt and rank used, such as ``cuda:0``."""
    found: dict[tuple[int, int], set[str]] = {}
    for row in series_rows(connection, run_id, c.DEVICE_MEMORY_LIMIT.name, "value", None, None):
        names = {str(point.get(c.DEVICE)) for point in row.points}
        found.setdefault((row.attempt, row.rank), set()).update(names)
    return found
