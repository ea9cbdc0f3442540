"""The last steps of a black box, as rows of text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from gradwatch_collector.reports import wording
from gradwatch_collector.runs.black_box import LastStep

HEADINGS: Final = ("Step", "Loss", "Gradient norm", "Learning rate", "Took", "Largest layer", "Its norm")


def rows(steps: Iterable[LastStep]) -> list[tuple[str, ...]]:
    """Return the cells of each step, under `HEADINGS`."""
    return [
        (
            str(each.step),
            _number(each.loss),
            _number(each.gradient_norm),
            _number(each.learning_rate),
            "-" if each.duration is None else wording.duration(each.duration),
            each.layer or "-",
            _number(each.norm),
        )
        for each in steps
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else wording.number(value)
