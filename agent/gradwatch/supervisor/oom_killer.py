"""Was it the kernel's OOM killer? Its counters before and after, and its own log where that may be read.

A process that is killed for memory dies of SIGKILL, like one that somebody kills. Control groups count such
deaths (``memory.events`` of version 2, ``memory.oom_control`` of version 1); the kernel log names the process.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_COUNTERS: Final = {"cgroup2": "memory.events", "cgroup": "memory.oom_control"}
_MOST_LINES: Final = 10_000


class OomKiller:
    """What the OOM killer did since this was made.

    Args:
        proc: Where procfs is.
        log: The kernel's log.
    """

    def __init__(self, proc: Path = Path("/proc"), log: Path = Path("/dev/kmsg")) -> None:
        self._proc = proc
        self._before: dict[Path, int] = {}
        self._log = -1
        with contextlib.suppress(OSError):
            self._log = os.open(log, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._log, 0, os.SEEK_END)

    def look(self, pid: int) -> None:
        """Note the counters of the process's control groups: it may have moved to others since its start."""
        for file in _counter_files(self._proc, pid):
            if file not in self._before:
                count = _count(file)
                if count is not None:
                    self._before[file] = count

    def evidence(self, pid: int) -> str | None:
        """What there is to say for the OOM killer, in one line; None if nothing speaks for it."""
        for line in self._new_lines():
            if re.search(rf"\bKilled process {pid} \(", line):
                return f"kernel log: {line.strip()}"[:200]
        for file, before in self._before.items():
            count = _count(file)
            if count is not None and count > before:
                return f"{file}: oom_kill {before} -> {count}"
        return None

    def close(self) -> None:
        """Close the log."""
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def _new_lines(self) -> Iterator[str]:
        for _ in range(_MOST_LINES if self._log >= 0 else 0):
            try:
                record = os.read(self._log, 8192)  # one record a call
            except BlockingIOError:
                return
            except OSError:  # EPIPE: the records in between were overwritten; the next call goes on behind them
                continue
            yield record.decode(errors="replace").partition(";")[2]


def _counter_files(proc: Path, pid: int) -> Iterator[Path]:
    """Where the kernel counts what it killed for memory in the process's control groups."""
    try:
        groups = (proc / str(pid) / "cgroup").read_text()
        mounts = (proc / str(pid) / "mountinfo").read_text()
    except OSError:
        return
    # id:controllers:path, where version 2 has no controllers.
    paths = {}
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in mounts.splitlines():
        # id parent device root place options... - type source options
        mount, _, filesystem = line.partition(" - ")
        kind, _, options = filesystem.split(" ", 2)
        if kind in paths and (kind == "cgroup2" or "memory" in options.split(",")):
            root, place = mount.split(" ")[3:5]
            path = paths[kind]
            inside = path.removeprefix(root) if root != "/" else path
            yield Path(place) / inside.lstrip("/") / _COUNTERS[kind]


def _count(file: Path) -> int | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
