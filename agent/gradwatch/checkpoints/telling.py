"""What was found of checkpoints that were read again is told: a corrupt one of a production run wakes somebody.

Most are read before training begins, to go on from one: what is found then is told by the run that begins next.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gradwatch import conventions
from gradwatch.conventions import Event
from gradwatch.safety import shielded
from gradwatch.telemetry import AttributeValue

if TYPE_CHECKING:
    from gradwatch.checkpoints.finding import Verdict

Told = tuple[Event, Mapping[str, AttributeValue | None]]

# Nobody may ever watch in this process.
_waiting: Final[deque[Told]] = deque(maxlen=100)
_LONGEST: Final = 1_000


def name_of(path: Path) -> str:
    """A checkpoint's name, with the folder it is in. Names of files are bytes, and need not be text."""
    return os.fsencode(f"{path.parent.name}/{path.name}").decode(errors="replace")


@shielded(None)
def tell(verdict: Verdict) -> None:
    """Have the run of this process report it, or the next one if none is open."""
    told = event_of(verdict)
    if told is None:
        return
    current_run = sys.modules.get("gradwatch.current_run")  # which imports torch
    run = None if current_run is None else current_run.current()
    if run is None:
        _waiting.append(told)
    else:
        run.report(*told)


def take() -> list[Told]:
    """What waits for a run, each once."""
    taken = list(_waiting)
    _waiting.clear()
    return taken


def event_of(verdict: Verdict) -> Told | None:
    """What to tell of a checkpoint; None where nobody wrote down what it should be, or it was removed."""
    manifest, problem = verdict.manifest, verdict.problem
    # Loops that keep the last few remove the others, and may leave the manifests.
    if manifest is None or not os.path.lexists(verdict.path):
        return None
    event = conventions.CHECKPOINT_VERIFIED if problem is None else conventions.CHECKPOINT_CORRUPT
    return event, {
        conventions.STEP: manifest.step,
        conventions.CHECKPOINT_NAME: name_of(Path(os.path.realpath(verdict.path))),
        conventions.CHECKPOINT_SIZE: manifest.size,
        conventions.CHECKPOINT_FAULT: None
        if problem is None
        else f"{problem.fault}: {problem.evidence}"[:_LONGEST],
    }
