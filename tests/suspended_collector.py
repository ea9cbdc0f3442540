"""A collector that is suspended at the worst moment: it has found the lease its own, and goes on to write.

    python tests/suspended_collector.py FILE collector serve ...

It stops itself as soon as FILE is there, and takes FILE away. Whoever wakes it sends SIGCONT.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from gradwatch.cli import main
from gradwatch_collector.service.lease import Lease
from gradwatch_collector.storage import database as db


class SuspendedLease(Lease):
    """Stops the process between acquiring and writing."""

    now: Path

    def acquire(self) -> bool:
        """Acquire, and stop if it is time to."""
        is_ours = super().acquire()
        if is_ours and self.now.exists():
            # Not while another thread has SQLite's file locked: then nobody could write, whoever it is.
            with db._writer_lock(self._engine):
                self.now.unlink()
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(0.5)  # a process stops a moment after it was told to
        return is_ours


if __name__ == "__main__":
    SuspendedLease.now = Path(sys.argv.pop(1))
    import gradwatch_collector.service.server as server

    server.Lease = SuspendedLease  # type: ignore[misc]  # what it makes its one lease of
    main()
