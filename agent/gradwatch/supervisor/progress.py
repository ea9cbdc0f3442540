"""What supervised processes leave for their supervisor: which run they are, how far they came, why they failed.

A folder of small files, one a process, written when it begins to watch, with every sign of life, and when it
ends. ``torchrun`` starts its workers again on its own: only they know of it, and the next attempt must not be
one that was there already.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from gradwatch.safety import shielded

FOLDER_VARIABLE: Final = "GRADWATCH_SUPERVISOR_DIR"
# Which supervisor speaks for a process: there may be several on a host.
INSTANCE_VARIABLE: Final = "GRADWATCH_SUPERVISOR_INSTANCE"
_PREFIX: Final = "gradwatch-run-"
_STALE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Told:
    """What one process tells.

    Attributes:
        run_id: Of the process's own run.
        last_step: None before the first ended.
        step_seconds: How long a step takes; None where that is not known, or does not matter any more because
            the process told its ending.
        failure: The reason of an ending that failed.
    """

    run_id: str
    attempt: int
    last_step: int | None = None
    step_seconds: float | None = None
    failure: str | None = None


class Progress(NamedTuple):
    """What was told of the latest attempt.

    Attributes:
        last_step: The furthest step known to have ended; None before the first.
        unseen: Steps that may have ended since it was told.
        failures: Reasons of the processes that failed and told it.
        run_ids: Of the processes' own runs.
    """

    attempt: int
    last_step: int | None = None
    unseen: int = 0
    failures: frozenset[str] = frozenset()
    run_ids: frozenset[str] = frozenset()


@contextlib.contextmanager
def private_folder() -> Iterator[Path | None]:
    """A folder for what the processes of one supervisor tell; None where none can be made.

    It is locked for as long as the supervisor lives: what is not was left by one that was killed, and goes.
    """
    with contextlib.ExitStack() as stack:
        made = None
        with contextlib.suppress(OSError):
            temporary = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
            made = Path(stack.enter_context(temporary))
            stack.enter_context(_locked(made))
            _remove_stale(made)
        yield made


@shielded(None)
def _remove_stale(mine: Path) -> None:
    for folder in mine.parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.lstat()
            is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
            # One that was made a moment ago may not be locked yet.
            if is_ours and folder != mine and time.time() - found.st_mtime > _STALE_SECONDS:
                with _locked(folder):
                    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock that ends with the process. Raises OSError where another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@shielded(None)
def tell(told: Told, instance: str, environ: Mapping[str, str] = os.environ) -> None:
    """Tell the supervisor, if there is one."""
    folder = environ.get(FOLDER_VARIABLE)
    if folder:
        with contextlib.suppress(OSError):  # it may be gone, and its folder with it
            draft = Path(folder) / f".{instance}"
            draft.write_text(json.dumps({name: getattr(told, name) for name in Told.__slots__}))
            draft.replace(Path(folder) / instance)


def read(folder: Path, attempt: int, now: float | None = None) -> Progress:
    """What was told since the attempt began that is the ``attempt``-th; ``now`` in Unix seconds."""
    now = time.time() if now is None else now
    told: list[tuple[Told, float]] = []
    for file in folder.iterdir():
        with contextlib.suppress(OSError, ValueError, TypeError):
            known: dict[str, Any] = json.loads(file.read_text())
            told.append((Told(**known), now - file.stat().st_mtime))
    attempt = max([attempt, *(each.attempt for each, _ in told)])
    latest = [(each, age) for each, age in told if each.attempt == attempt]
    steps = [each.last_step for each, _ in latest if each.last_step is not None]
    reached = [
        each.last_step + int(age / each.step_seconds)
        for each, age in latest
        if each.last_step is not None and each.step_seconds
    ]
    last_step = max(steps, default=None)
    return Progress(
        attempt,
        last_step,
        0 if last_step is None else max([0, *(step - last_step for step in reached)]),
        frozenset(each.failure for each, _ in latest if each.failure is not None),
        frozenset(each.run_id for each, _ in latest),
    )
