"""What the runs of each team cost. Exact, run by run, and so of the longest ones only where there are many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from sqlalchemy import ColumnElement, Connection, false, func, or_, select

from gradwatch_collector.objectives.judging import selected
from gradwatch_collector.runs.cost import run_cost
from gradwatch_collector.storage import schema
from gradwatch_slo.cost import PriceTable
from gradwatch_slo.objective import Objective

# Some milliseconds each.
MOST_RUNS: Final = 500
_SECOND: Final = 1_000_000_000
_run = schema.run.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Spending:
    """``by_team``: most first, None is a team that is not known. ``priced`` of the ``seen`` runs have a price.

    ``seen``: the longest of ``total``; they lasted for the share ``seen_time`` of all their time.
    """

    currency: str
    by_team: dict[str | None, Fraction]
    priced: int
    seen: int
    total: int
    seen_time: Fraction


def about(objectives: Iterable[Objective], start: int, end: int) -> ColumnElement[bool]:
    """Return which runs that ended in [start, end), Unix nanoseconds, any of the objectives is about.

    Whether these count them or not: what was cancelled, or is excluded, has cost its money too.
    """
    selections = dict.fromkeys(each.selection for each in objectives)
    return (_run.ended_at >= start) & (_run.ended_at < end) & or_(false(), *map(selected, selections))


def spending(
    connection: Connection, chosen: ColumnElement[bool], prices: PriceTable, *, most: int = MOST_RUNS
) -> Spending:
    """Return what the chosen runs (a condition over ``schema.run``) cost, at most so many of them."""
    lasted = (_run.ended_at - _run.started_at) // _SECOND
    total, time = connection.execute(select(func.count(), func.sum(lasted)).where(chosen)).one()
    longest = connection.execute(
        select(_run.run_id, _run.team, lasted.label("lasted"))
        .where(chosen)
        .order_by(lasted.desc(), _run.run_id)
        .limit(most)
    ).all()
    by_team: dict[str | None, Fraction] = {}
    priced = 0
    for row in longest:
        amount = run_cost(connection, row.run_id, prices).amount
        if amount is not None:
            priced += 1
            by_team[row.team] = by_team.get(row.team, Fraction()) + amount
    return Spending(
        currency=prices.currency,
        by_team=dict(sorted(by_team.items(), key=lambda item: (-item[1], item[0] or ""))),
        priced=priced,
        seen=len(longest),
        total=total,
        seen_time=Fraction(sum(row.lasted for row in longest), int(time)) if time else Fraction(1),
    )
