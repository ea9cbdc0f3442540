"""A control group of the kernel with little memory, where this machine allows one to be made."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def join(folder: Path, mebibytes: int) -> Path | None:
    """Put this process into a new group with so much memory; ``folder`` notes which, for `leave`."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in {"", "memory"}:
            continue
        group = Path("/sys/fs/cgroup", controllers, path.lstrip("/"), f"gradwatch-gym-{os.getpid()}")
        with suppress(OSError):
            group.mkdir()
            (folder / "group").write_text(str(group))
            limit = "memory.limit_in_bytes" if controllers else "memory.max"
            (group / limit).write_text(str(mebibytes << 20))
            (group / "cgroup.procs").write_text(str(os.getpid()))
            return group
    return None


def remove(folder: Path) -> None:
    """Take away the group that a process which has ended has made, if it has."""
    with suppress(OSError):
        Path((folder / "group").read_text()).rmdir()
