"""Files that stay on the training host: private, whole or absent, in a folder that does not grow."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Final

# A black box takes at most a megabyte or two, a bundle as much as a checkpoint.
_MOST_BYTES: Final = 8 << 30
_MOST_FILES: Final = 256
_OURS: Final = ("flight-*", "bundle-*")


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
    """Such as ``flight-3f2a-a1-r0-SIGTERM.json.gz``; whatever the run is called, it stays within the folder."""
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
    _make_room(directory, target)
    return target


def _make_room(directory: Path, newest: Path) -> None:
    aged: list[tuple[int, int, Path]] = []
    for pattern in _OURS:
        for path in directory.glob(pattern):
            with contextlib.suppress(OSError):  # another process of ours tidies too
                status = path.stat()
                aged.append((status.st_mtime_ns, status.st_size, path))
    aged.sort(reverse=True)
    size = 0
    for count, (_, bytes_, path) in enumerate(aged, start=1):
        size += bytes_
        if path != newest and (size > _MOST_BYTES or count > _MOST_FILES):
            path.unlink(missing_ok=True)
