"""How often a rule tells of a breach that is none, and how soon of one that is: simulated, not measured.

    python benchmarks/verdicts.py [--years 10000] [--no-write]

Runs come at random (Poisson), eight a week, and each succeeds with the true rate. A rule looks at a rolling
window of 28 days whenever a run enters or leaves it. The table takes its place between the marks of
docs/slo.md, the picture beside it; the same seed gives the same figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from gradwatch_slo.statistics import binomial_upper_tail
from gradwatch_slo.verdict import ALERT_P_VALUE, BREACH_P_VALUE, Verdict, alerts, verdict
from page import write

PAGE: Final = Path(__file__).parents[1] / "docs" / "slo.md"
PICTURE: Final = PAGE.with_name("slo-false-alarms.svg")
SEED: Final = 2026
RUNS_A_DAY: Final = 8 / 7
WINDOW: Final = 28.0
YEAR: Final = 365.25
TARGETS: Final = (Decimal("0.90"), Decimal("0.95"), Decimal("0.99"))
# Years that are simulated at once.
_CHUNK: Final = 1_000
_TRIALS: Final = 4_000
# Runs in a window, of which 32 are expected: never more in all the years to come.
_MOST: Final = 96

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Rule:
    """When somebody is told, given how many of how many runs were bad."""

    name: str
    tells: Callable[[int, int, Decimal], bool]

    def table(self, target: Decimal) -> Bools:
        """Return what it says for each (total, bad)."""
        said = np.zeros((_MOST + 1, _MOST + 1), dtype=np.bool_)
        for total in range(1, _MOST + 1):
            for bad in range(total + 1):
                said[total, bad] = self.tells(bad, total, target)
        return said


RULES: Final = (
    Rule("SLI below the target", lambda bad, total, target: Decimal(total - bad) < target * total),
    Rule(
        f"verdict `breached`: p < {BREACH_P_VALUE}",
        lambda bad, total, target: verdict(bad, total, target) is Verdict.BREACHED,
    ),
    Rule(
        f"alert: p < {ALERT_P_VALUE}",
        lambda bad, total, target: alerts(bad, binomial_upper_tail(bad, total, target)),
    ),
)


@dataclass(frozen=True, slots=True)
class Course:
    """How a window went: ``total`` and ``bad`` from each of ``times`` (days) on until the next."""

    times: NDArray[np.float64]
    total: NDArray[np.int64]
    bad: NDArray[np.int64]

    def told(self, table: Bools) -> NDArray[np.float64]:
        """Return when somebody is told: the rule begins to hold."""
        holds = table[self.total, self.bad]
        return self.times[holds & ~np.concatenate(([False], holds[:-1]))]


def course(
    rng: np.random.Generator, start: float, end: float, fails: Callable[[NDArray[np.float64]], Bools]
) -> Course:
    """Simulate a window from ``start`` to ``end``, days; ``fails`` says which runs that end then are bad."""
    count = rng.poisson(RUNS_A_DAY * (end - start))
    ended = np.sort(rng.uniform(start, end, count))
    bad = fails(ended).astype(np.int64)
    times = np.concatenate((ended, ended + WINDOW))
    order = np.argsort(times, kind="stable")
    change = np.concatenate((np.ones(count, np.int64), -np.ones(count, np.int64)))[order]
    return Course(times[order], np.cumsum(change), np.cumsum(np.concatenate((bad, -bad))[order]))


def steady(rng: np.random.Generator, rate: float, years: int) -> Iterator[Course]:
    """Simulate years in which every run succeeds with ``rate``; each begins with a full window at 0."""
    for chunk in range(0, years, _CHUNK):
        length = min(_CHUNK, years - chunk) * YEAR
        yield course(rng, -WINDOW, length, lambda ended: rng.random(ended.size) >= rate)


@dataclass(frozen=True, slots=True)
class Alarms:
    """``a_year``: how often somebody is told. ``quiet``: share of years in which nobody is."""

    a_year: float
    quiet: float


def alarms(rng: np.random.Generator, rate: float, table: Bools, years: int) -> Alarms:
    """Count alarms while the true rate stays what it is."""
    told = alarmed = 0
    for window in steady(rng, rate, years):
        times = window.told(table)
        times = times[(times >= 0) & (times < window.times[-1] - WINDOW)]
        told += times.size
        alarmed += np.unique(times // YEAR).size
    return Alarms(told / years, 1 - alarmed / years)


def delays(rng: np.random.Generator, target: Decimal, table: Bools, trials: int) -> NDArray[np.float64]:
    """Return how many days after the true rate fell from the target to half of it somebody is told.

    Left out are trials in which somebody had been told before.
    """
    before, after = float(target), float(target) / 2
    found = []
    for _ in range(trials):
        window = course(
            rng, -WINDOW, 4 * WINDOW, lambda ended: rng.random(ended.size) >= np.where(ended < 0, before, after)
        )
        now = np.searchsorted(window.times, 0.0) - 1
        if now >= 0 and table[window.total[now], window.bad[now]]:
            continue
        later = window.told(table)
        found.append(later[later >= 0][0])
    return np.array(found)


def figures(years: int) -> str:
    """Return the table of false alarms and delays."""
    lines = [
        "| target, true rate | told when | false alarms a year | years without | days until told (9 in 10) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for target in TARGETS:
        for rule in RULES:
            rng, table = np.random.default_rng(SEED), rule.table(target)
            seen, late = alarms(rng, float(target), table, years), delays(rng, target, table, _TRIALS)
            lines.append(
                f"| {target:.0%} | {rule.name} | {seen.a_year:.2f} | {seen.quiet:.0%} |"
                f" {np.median(late):.1f} ({np.quantile(late, 0.9):.1f}) |".replace("%", " %")
            )
    return "\n".join(lines)


def picture(years: int) -> str:
    """Return an SVG of in how many years an alarm begins, by the true rate, at a target of 90 %."""
    target = TARGETS[0]
    rates = [rate / 200 for rate in range(160, 201)]
    curves = []
    for rule in RULES:
        table = rule.table(target)
        shares = [1 - alarms(np.random.default_rng(SEED), rate, table, years).quiet for rate in rates]
        curves.append((rule.name.replace("`", ""), shares))
    return _svg(rates, curves, float(target))


_WIDTH: Final = 640
_HEIGHT: Final = 320
_LEFT: Final = 56
_TOP: Final = 30
_COLOURS: Final = ("#b3261e", "#b26a00", "#1b6e3c")


def _svg(rates: list[float], curves: list[tuple[str, list[float]]], target: float) -> str:
    right, bottom = _WIDTH - 28, _HEIGHT - 44

    def x(rate: float) -> float:
        return round(_LEFT + (rate - rates[0]) / (rates[-1] - rates[0]) * (right - _LEFT), 1)

    def y(share: float) -> float:
        return round(bottom - share * (bottom - _TOP), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        '<g font-family="sans-serif" font-size="12">',
        "<title>Years in which an alarm begins, by the true success rate, at a target of 90 %</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    parts.append(f'<text x="8" y="{_TOP - 12}">years in which an alarm begins</text>')
    for tenth in range(0, 11, 2):
        parts += [
            f'<path d="M{_LEFT} {y(tenth / 10)}H{right}" stroke="#dddddd"/>',
            f'<text x="{_LEFT - 6}" y="{y(tenth / 10) + 4}" text-anchor="end">{tenth * 10} %</text>',
        ]
    for percent in range(round(rates[0] * 100), 101, 2):
        parts.append(f'<text x="{x(percent / 100)}" y="{bottom + 16}" text-anchor="middle">{percent} %</text>')
    parts += [
        f'<path d="M{x(target)} {_TOP}V{bottom}" stroke="#555555" stroke-dasharray="4 4"/>',
        f'<text x="{x(target) + 4}" y="{bottom - 6}" fill="#555555">target</text>',
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">true success rate</text>',
    ]
    for index, ((name, shares), colour) in enumerate(zip(curves, _COLOURS, strict=True)):
        points = " ".join(f"{x(rate)},{y(share)}" for rate, share in zip(rates, shares, strict=True))
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<text x="{_LEFT + 8}" y="{bottom - 56 + 18 * index}" fill="{colour}">{name}</text>'.replace(
                "p < ", "p &lt; "
            ),
        ]
    return "\n".join([*parts, "</g>", "</svg>"]) + "\n"


def main() -> None:
    """Print the figures, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--years", type=int, default=10_000, help="years of each row [default: %(default)s]")
    parser.add_argument("--no-write", action="store_true", help="only print")
    options = parser.parse_args()
    table = figures(options.years)
    print(table)
    if not options.no_write:
        write(PAGE, {"verdicts": table})
        PICTURE.write_text(picture(options.years))


if __name__ == "__main__":
    main()
