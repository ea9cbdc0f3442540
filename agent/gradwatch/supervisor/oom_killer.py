"""Was it the kernel's OOM killer? Its counters before and after, and its own log where that may be read.

A process that is killed for memory dies of SIGKILL, like one that somebody kills. Control groups count such
deaths (``memory.events`` of version 2, ``memory.oom_control`` of version 1); the kernel log names the process.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

_COUNTERS: Final = {"cgroup2": "memory.events", "cgroup": "memory.oom_control"}
_MOST_LINES: Final = 10_000
# A process that is killed for memory is gone within so many seconds, but for the largest.
_DYING_SECONDS: Final = 5.0


class OomKiller:
    """What the OOM killer did since this was made.

    Args:
        proc: Where procfs is.
        log: The kernel's log.
        monotonic: The clock, in seconds.
    """

    def __init__(
        self,
        proc: Path = Path("/proc"),
        log: Path = Path("/dev/kmsg"),
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._proc = proc
        self._monotonic = monotonic
        # Of each counter: when it was read, and what it was then; the first reading is older than the rest.
        self._seen: dict[Path, deque[tuple[float, int]]] = {}
        self._log = -1
        with contextlib.suppress(OSError):
            self._log = os.open(log, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._log, 0, os.SEEK_END)

    def look(self, pid: int) -> None:
        """Note the counters of the process's control groups: it may have moved to others since its start."""
        now = self._monotonic()
        for file in _counter_files(self._proc, pid):
            count = _count(file)
            if count is not None:
                seen = self._seen.setdefault(file, deque())
                seen.append((now, count))
                while len(seen) > 1 and seen[1][0] <= now - _DYING_SECONDS:
                    seen.popleft()

    def evidence(self, pid: int) -> str | None:
        """What there is to say for the OOM killer, in one line; None if nothing speaks for it.

        A count that went up long before the process died was for another one in its control group.
        """
        for line in self._new_lines():
            if re.search(rf"\bKilled process {pid} \(", line):
                return f"kernel log: {line.strip()}"[:200]
        earliest = self._monotonic() - _DYING_SECONDS
        for file, seen in self._seen.items():
            # The last reading from before it can have begun to die.
            old = [count for read, count in seen if read <= earliest]
            before = old[-1] if old else seen[0][1]
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
