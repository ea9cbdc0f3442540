"""What is wrong with checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gym.fault import Fault


class TruncatedCheckpoint(Fault):
    """What was saved is cut, or one byte of it is changed, and is found so when it is read again."""

    def saved(self, path: Path) -> None:
        """See `Fault`."""
        if not self.is_on:
            return
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(
            whole[:middle]
            if self.is_strong
            else whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
        )


class FailingSaver(Fault):
    """The disk is full: from now on, or once."""

    _failed = False

    def save(self, write: Callable[[Path], None], path: Path) -> None:
        """See `Fault`."""
        if self.is_on and (self.is_strong or not self._failed):
            self._failed = True
            path = Path("/dev/full")
        write(path)
