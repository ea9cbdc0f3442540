"""How an objective moved since the window before. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from gradwatch_slo.budget import budget_remaining
from gradwatch_slo.report import ObjectiveReport, to_json
from gradwatch_slo.wording import budget_percent, points, sli_percent

# Of the window before, what differs; name, group and target do not.
_OF_PREVIOUS = ("sli", "good", "bad", "total", "verdict", "interval", "budget_remaining", "window", "summary")


def sli_change(report: ObjectiveReport) -> Fraction | None:
    """Return by how much the SLI is above that of the window before, exactly; None where either has none."""
    before = report.previous
    if before is None or before.share is None or report.share is None:
        return None
    return report.share - before.share


def budget_change(report: ObjectiveReport) -> Fraction | None:
    """Return by how much more of the budget is left than in the window before; None where none was counted."""
    before = report.previous
    if before is None or not before.total or not report.total:
        return None
    return budget(report) - budget(before)


def budget(report: ObjectiveReport) -> Fraction:
    """Return what is left of the budget, exactly."""
    return budget_remaining(report.bad, report.total, report.target)


def movement(report: ObjectiveReport) -> str:
    """Return in words how SLI, verdict and budget moved; empty where nothing was compared."""
    return "" if report.previous is None else "; ".join(_words(report, report.previous))


def compared_json(report: ObjectiveReport) -> dict[str, Any]:
    """Return what a comparison adds to the JSON of an objective; nothing where nothing was compared."""
    if report.previous is None:
        return {}
    before, sli, budget = to_json(report.previous), sli_change(report), budget_change(report)
    return {
        "previous": {name: before[name] for name in _OF_PREVIOUS},
        "change": {
            "sli": None if sli is None else float(sli),
            "budget_remaining": None if budget is None else float(budget),
            "summary": movement(report),
        },
    }


def _words(report: ObjectiveReport, before: ObjectiveReport) -> Iterator[str]:
    change = sli_change(report)
    if change is None:
        if before.share is not None:
            yield f"{sli_percent(before.share, before.target)} in the window before, {before.verdict.value}"
        else:
            yield "nothing was counted in the window before"
        return
    assert before.share is not None  # or there were no change
    assert report.share is not None
    if change:
        was = sli_percent(before.share, before.target, report.share)
        yield f"SLI {'up' if change > 0 else 'down'} {points(change)} from {was}"
    else:
        yield "SLI unchanged"
    if report.verdict is before.verdict:
        yield f"still {report.verdict.value}"
    else:
        yield f"{before.verdict.value} before, {report.verdict.value} now"
    left, was_left = budget(report), budget(before)
    told = budget_percent(left, was_left)
    if left == was_left:
        yield f"budget left {told}, as before"
    else:
        yield f"budget left {told} after {budget_percent(was_left, left)}"
