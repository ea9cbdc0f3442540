"""Pieces of Markdown (GitHub's) in which telemetry is text and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from gradwatch_slo.problems import printable

# What begins anything inline, a heading, or a cell; an underscore within a word does not.
_SPECIAL: Final = re.compile(r"([\\`*\[\]<>|~&#$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
# Behind this, what makes an address, somebody to notify or an issue; which are looked for in the rendered text,
# where no escape is left.
_LIVE: Final = re.compile(r"(?<=@)|(?<=:)(?=//)|(?<=www)(?=\.)|(?<=#)(?=\d)", re.IGNORECASE)
_NOTHING: Final = "<!-- -->"


def escaped(text: str) -> str:
    """Return text that reads as it is, on one line, wherever it stands behind the start of a line."""
    return _LIVE.sub(_NOTHING, _SPECIAL.sub(r"\\\1", printable(text)))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; its cells are escaped."""
    lines = [map(escaped, headings), ["---"] * len(headings), *(map(escaped, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
