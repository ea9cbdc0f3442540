"""What the scenes give: figures beside what was asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One figure. ``is_met``: whether it is what was asked; None where nothing was."""

    what: str
    asked: str
    reached: str
    is_met: bool | None = None


def at_least(what: str, least: float, reached: float, unit: str = "", note: str = "") -> Figure:
    """Return a figure that should be large."""
    return Figure(what, f"at least {least:,.0f}{unit}", f"{reached:,.0f}{unit}{note}", reached >= least)


def at_most(what: str, most: float, reached: float, unit: str = "", note: str = "", digits: int = 1) -> Figure:
    """Return a figure that should be small."""
    return Figure(what, f"at most {most:g}{unit}", f"{reached:,.{digits}f}{unit}{note}", reached <= most)


def table(figures: Sequence[Figure]) -> str:
    """Return the figures as a Markdown table."""
    said = {True: "met", False: "missed", None: ""}
    rows = [("", "asked", "reached", ""), ("---", "---", "---", "---")]
    rows += [(each.what, each.asked, each.reached, said[each.is_met]) for each in figures]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
