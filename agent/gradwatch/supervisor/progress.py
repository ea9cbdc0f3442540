"""What supervised processes leave for their supervisor: how far they came, and in which attempt.

A folder of small files, one a process, written when it begins to watch, with every sign of life, and when it
ends. ``torchrun`` starts its workers again on its own: only they know of it, and the next attempt must not be
one that was there already.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from gradwatch.safety import shielded

FOLDER_VARIABLE: Final = "GRADWATCH_SUPERVISOR_DIR"
# Which supervisor speaks for a process: there may be several on a host.
INSTANCE_VARIABLE: Final = "GRADWATCH_SUPERVISOR_INSTANCE"


class Progress(NamedTuple):
    """The latest attempt that was seen, and the furthest step that ended in it; None before the first."""

    attempt: int
    last_step: int | None = None


@shielded(None)
def tell(
    attempt: int | None, instance: str, last_step: int | None, environ: Mapping[str, str] = os.environ
) -> None:
    """Tell the supervisor, if there is one."""
    folder = environ.get(FOLDER_VARIABLE)
    if folder and attempt is not None:
        with contextlib.suppress(OSError):  # it may be gone, and its folder with it
            draft = Path(folder) / f".{instance}"
            draft.write_text(f"{attempt} {'' if last_step is None else last_step}")
            draft.replace(Path(folder) / instance)


def read(folder: Path, attempt: int) -> Progress:
    """What was told since the attempt began that is the ``attempt``-th."""
    latest = Progress(attempt)
    for file in folder.iterdir():
        with contextlib.suppress(OSError, ValueError):
            number, _, step = file.read_text().partition(" ")
            told = Progress(int(number), int(step) if step else None)
            latest = max(latest, told, key=_how_far)
    return latest


def _how_far(progress: Progress) -> tuple[int, int]:
    return progress.attempt, -1 if progress.last_step is None else progress.last_step
