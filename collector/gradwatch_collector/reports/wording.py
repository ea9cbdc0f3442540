"""Numbers as people read them. Pure."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Final

from gradwatch_collector.runs.facts import moment
from gradwatch_slo.cost import Cost

UNKNOWN: Final = "unknown"
_BYTES: Final = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def clock_time(nanos: int) -> str:
    """Return Unix nanoseconds as a moment to the second, in UTC."""
    return f"{moment(nanos):%Y-%m-%d %H:%M:%S}"


def number(value: float) -> str:
    """Return it with four digits that count, a whole number with all; NaN and infinities by their names."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Return a time of any length: ``850 µs``, ``2.5 s``, ``3m07s``, ``26h00m``."""
    if not math.isfinite(seconds):
        return number(seconds)
    if seconds == 0:
        return "0 s"
    if seconds < 0.1:
        return f"{seconds * 1e6:.3g} µs" if seconds < 0.001 else f"{seconds * 1e3:.3g} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def share(ratio: float) -> str:
    """Return a ratio in per cent."""
    return f"{ratio:.1%}".replace("%", " %") if math.isfinite(ratio) else number(ratio)


def size(count: float) -> str:
    """Return bytes in the largest unit of which there is at least one."""
    if not math.isfinite(count) or abs(count) < 1024:
        return f"{number(count)} bytes"
    power = min(int(math.log(abs(count), 1024)), len(_BYTES) - 1)
    return f"{count / 1024**power:.4g} {_BYTES[power]}"


def change(relative: float) -> str:
    """Return a relative change: ``+12.5 %``, ``-0.04 %``, ``x 25`` from tenfold on."""
    return f"x {1 + relative:.3g}" if relative >= 9 else f"{relative * 100:+.3g} %"


def money(amount: Fraction | float, currency: str) -> str:
    """Return an amount to the cent, a smaller one with two digits that count."""
    exact = Fraction(amount)
    if exact == 0 or abs(exact) >= Fraction(1, 100):
        return f"{float(round(exact, 2)):.2f} {currency}"
    return f"{Decimal(f'{float(exact):.2g}'):f} {currency}"


def cost(found: Cost) -> str:
    """Return in words what a run cost, or why that is not known."""
    held = ", ".join(f"{hours(each)} of {what}" for what, each in found.hours.items())
    if found.amount is not None and found.currency is not None:
        return f"{money(found.amount, found.currency)} for {held}"
    if not found.hours:
        return f"{UNKNOWN}: no process of it is known"
    if found.currency is None:
        return f"{UNKNOWN}, for want of prices (--prices FILE): {held}"
    return f"{UNKNOWN}, there is no price of {', '.join(found.unpriced)}: {held}"


def hours(held: Fraction | float) -> str:
    """Return hours; less than one in smaller units."""
    return f"{float(held):,.1f} h" if held >= 1 else duration(float(held) * 3600)
