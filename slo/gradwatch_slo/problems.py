"""What can be wrong with a file of objectives: one error type, one line a problem."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where it is, what was found and what was expected.

    ``line`` counts from 1. ``field`` is the path within the document (``spec.objectives[0].target``), empty for
    the document or the file as a whole.
    """

    file: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        parts = (f"{self.file}:{self.line}", self.field, self.message)
        return printable(": ".join(part for part in parts if part))


class ObjectiveFileError(Exception):
    """Files of objectives that cannot be used; ``str()`` is one line for each problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def printable(text: str) -> str:
    """Return the text on one line, with escapes for what would break it or steer a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def suggestion(word: str, candidates: Iterable[str], *, likeness: float = 0.6) -> str:
    """Return ``"; did you mean 'x'?"`` for the likeliest candidate, or nothing if none is so like the word."""
    by_fold = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(word.lower(), by_fold, n=1, cutoff=likeness)
    return f"; did you mean '{by_fold[close[0]]}'?" if close else ""


def one_of(words: Iterable[str]) -> str:
    """Return ``one of a, b, c``, or the word itself when there is one."""
    listed = list(words)
    return f"one of {', '.join(listed)}" if len(listed) > 1 else f"'{listed[0]}'"


def path_text(path: Sequence[str | int]) -> str:
    """Return ``spec.objectives[0].target`` for its parts."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text
