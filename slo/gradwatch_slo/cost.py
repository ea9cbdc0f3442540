"""What a run cost (M9): hours of everything that is paid by the hour, times the price of an hour.

Exact: times are whole nanoseconds, prices decimals, and nothing is rounded before it is shown. What has no
known price makes the whole unknown, never cheaper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Final

# What is held where no device is, and where one is whose name nobody told.
CPU_HOST: Final = "CPU host"
UNNAMED_DEVICE: Final = "device of unknown name"
_NANOS_PER_HOUR: Final = 3600 * 1_000_000_000


@dataclass(frozen=True, slots=True)
class PriceTable:
    """Price of an hour, in ``currency``: of a device by its name, of a host where training is on the CPU."""

    currency: str
    devices: Mapping[str, Decimal]
    cpu_host: Decimal | None = None

    def of(self, what: str) -> Decimal | None:
        """Return the price of an hour; None if it is not known."""
        if what == CPU_HOST:
            return self.cpu_host
        return None if what == UNNAMED_DEVICE else self.devices.get(what)


@dataclass(frozen=True, slots=True)
class Held:
    """Something that is paid by the hour, from ``started`` up to ``ended`` in Unix nanoseconds.

    ``what``: the device's name, `CPU_HOST` or `UNNAMED_DEVICE`. ``which``: tells it from others of that name.
    """

    what: str
    which: str
    started: int
    ended: int


@dataclass(frozen=True, slots=True)
class Cost:
    """``amount``: exact, None where a price is not known. ``hours``: by what was held, most first.

    ``unpriced``: what has no known price; empty where there is no price table, which then has no currency.
    """

    amount: Fraction | None
    currency: str | None
    hours: Mapping[str, Fraction]
    unpriced: tuple[str, ...] = ()


def hours_held(held: Iterable[Held]) -> dict[str, Fraction]:
    """Return the hours by what was held, most first. The same thing, held twice at a time, is paid once."""
    stretches: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for each in held:
        stretches.setdefault((each.what, each.which), []).append((each.started, each.ended))
    hours: dict[str, Fraction] = {}
    for (what, _), of_one in stretches.items():
        hours[what] = hours.get(what, Fraction()) + Fraction(_covered(of_one), _NANOS_PER_HOUR)
    return dict(sorted(hours.items(), key=lambda item: (-item[1], item[0])))


def _covered(stretches: list[tuple[int, int]]) -> int:
    """Return how much time is in at least one of the stretches."""
    covered, reached = 0, None
    for started, ended in sorted(stretches):
        begins = started if reached is None else max(started, reached)
        covered += max(0, ended - begins)
        reached = ended if reached is None else max(ended, reached)
    return covered


def cost_of(held: Iterable[Held], prices: PriceTable | None) -> Cost:
    """Return what was held, and what it cost if all of it has a price."""
    hours = hours_held(held)
    if prices is None:
        return Cost(None, None, hours)
    of_hour = {what: prices.of(what) for what in hours}
    unpriced = tuple(what for what, price in of_hour.items() if price is None)
    # Nothing held is nothing known: a run whose processes told nothing was not free.
    amount = (
        None
        if unpriced or not hours
        else sum((Fraction(of_hour[what] or 0) * held for what, held in hours.items()), Fraction())
    )
    return Cost(amount, prices.currency, hours, unpriced)
