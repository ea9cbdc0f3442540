"""Files that stay on the training host: private, whole or absent, in a folder that does not grow."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Final

# A black box takes at most a megabyte or two, a bundle as much as a checkpoint.
_MOST_BYTES: Final = 8 << 30
_MOST_FILES: Final = 256
# Just what `file_name` makes: whatever else lies in the folder is not ours to delete.
_WHO: Final = r"[\w.\-]{0,64}(-a\d+)?-r\d+"
_OURS: Final = re.compile(
    rf"flight-{_WHO}-(nonfinite|exception|oom|stalled|SIGTERM)\.json\.gz|bundle-{_WHO}-step\d+\.pt"
)


def default_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where a program's state goes, by the XDG base directory specification."""
    state = environ.get("XDG_STATE_HOME", "")
    if Path(state).is_absolute():
        return Path(state) / "gradwatch"
    try:
        return Path.home() / ".local" / "state" / "gradwatch"
    except RuntimeError:  # a container's user without an entry anywhere
        return Path(tempfile.gettempdir()) / f"gradwatch-{os.getuid()}"


def file_name(kind: str, run_id: str, attempt: int | None, rank: int, ending: str) -> str:
    """Such as ``flight-3f2a-a1-r0-SIGTERM-9b1c04de.json.gz``; in the folder, whatever the run is called."""
    safe = re.sub(r"[^\w.\-]", "_", run_id)[:64]
    return f"{kind}-{safe}" + (f"-a{attempt}" if attempt is not None else "") + f"-r{rank}-{ending}"


def keep(directory: Path, name: str, write: Callable[[IO[bytes]], object]) -> Path:
    """Write a file that its owner alone can read, then let the oldest ones of ours go if there is too much.

    Raises:
        OSError: It cannot be written; nothing of it is left behind.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".gradwatch-", dir=directory)  # mode 0600
    target = directory / name
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    with contextlib.suppress(
        OSError
    ):  # the file is written; a folder that cannot be tidied is no reason to fail
        _make_room(directory, target)
    return target


def _make_room(directory: Path, newest: Path) -> None:
    aged: list[tuple[int, int, Path]] = []
    for path in directory.iterdir():
        if _OURS.fullmatch(path.name) is None:
            continue
        with contextlib.suppress(OSError):  # another process of ours tidies too
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                aged.append((status.st_mtime_ns, status.st_size, path))
    aged.sort(reverse=True)
    size = 0
    for count, (_, bytes_, path) in enumerate(aged, start=1):
        size += bytes_
        if path != newest and (size > _MOST_BYTES or count > _MOST_FILES):
            with contextlib.suppress(OSError):  # another user's
                path.unlink()
