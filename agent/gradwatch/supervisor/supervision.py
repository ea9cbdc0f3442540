"""Attempt after attempt, until one ends for good.

Whatever fails in here, the command runs, and its exit code is the one returned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gradwatch.export.spool import drain
from gradwatch.life.endings import FAILED
from gradwatch.safety import shielded
from gradwatch.supervisor import progress
from gradwatch.supervisor.child import Child, Exit, Signals
from gradwatch.supervisor.deaths import Death, death_of
from gradwatch.supervisor.launch import Launch
from gradwatch.supervisor.oom_killer import OomKiller
from gradwatch.supervisor.progress import Progress
from gradwatch.supervisor.reporting import Reporter
from gradwatch.supervisor.retrying import GiveUp, RetryPolicy

# As shells have it.
_NOT_FOUND: Final = 127
_NOT_EXECUTABLE: Final = 126


class Supervision:
    """Runs a command, and again if the policy says so.

    Args:
        launch: The command, and what run it is.
        policy: When to start it again.
        say: Tells the user a line.
    """

    def __init__(self, launch: Launch, policy: RetryPolicy, say: Callable[[str], None]) -> None:
        self._launch = launch
        self._policy = policy
        self._say = say
        self._signals = Signals()
        self._folder: Path | None = None
        self._reporter: Reporter | None = None
        # What the command calls its run, where that is not what we told it.
        self._run_id: str | None = None

    def run(self) -> int:
        """Run it to its last end, and return its exit code, 128 + n for signal n."""
        attempt = self._launch.first_attempt
        with progress.private_folder() as self._folder:
            while True:
                self._begin(attempt)
                death = self._attempt(attempt)
                came = self._progress(attempt)
                decision = self._policy.after(death, came)
                if isinstance(decision, GiveUp):
                    self._end(death, came)
                    if decision.why:
                        self._say(f"not started again: {decision.why}")
                    return death.exit_code
                self._end(death, came, will_retry=True)
                attempt = came.attempt + 1
                self._say(f"{death.evidence}; attempt {attempt} begins in {decision.seconds:.1f} s")
                asked = self._signals.next_asking(decision.seconds)
                if asked is not None:
                    # There will be no other attempt after all.
                    death = death_of(Exit(-asked), preemptible=self._launch.settings.preemptible)
                    self._end(death, came)
                    return death.exit_code
                self._close(self._deadline())

    def _attempt(self, attempt: int) -> Death:
        """Run the command once."""
        launch, killer = self._launch, OomKiller()
        instance = None if self._reporter is None else self._reporter.instance
        try:
            environ = launch.child_environ(attempt, self._folder, instance)
            child = Child(launch.command, environ, self._signals)
        except OSError as error:
            program = launch.command[0]
            self._say(f"{program}: {error.strerror}")
            code = _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE
            return Death(FAILED, f"exit {code}", code, f"cannot start {program}: {error.strerror}")

        @shielded(None)
        def look() -> None:
            killer.look(child.pid)
            self._follow(self._progress(attempt))

        @shielded(None)
        def find_evidence() -> str | None:
            return killer.evidence(child.pid)

        left = child.wait(look)
        found = find_evidence() if left.code else None
        killer.close()
        return death_of(left, found, preemptible=launch.settings.preemptible)

    # --- What is told: none of it may keep the command from running, or its exit code from being returned ---

    def _deadline(self) -> float:
        return time.monotonic() + self._launch.settings.exit_timeout

    @shielded(None)
    def _begin(self, attempt: int) -> None:
        if not self._launch.settings.disabled:
            self._reporter = Reporter(self._launch, attempt, self._run_id)

    def _follow(self, came: Progress) -> None:
        """Speak of the run and attempt that the processes below say they are."""
        reporter = self._reporter
        if reporter is None:
            return
        run_id = reporter.run_id
        if came.run_ids:
            # Of several, none is all of it.
            run_id = next(iter(came.run_ids)) if len(came.run_ids) == 1 else self._launch.run_id
        if run_id != reporter.run_id:
            if reporter.run_id == self._launch.run_id:
                reporter.withdraw(run_id)
            # The command's signals must not wait for a collector.
            threading.Thread(target=reporter.close, args=(self._launch.settings.exit_timeout,)).start()
            self._run_id = run_id
            reporter = self._reporter = Reporter(self._launch, came.attempt, run_id, reporter.instance)
        reporter.follow(came.attempt)

    def _progress(self, attempt: int) -> Progress:
        return _read(self._folder, attempt) or Progress(attempt)

    @shielded(None)
    def _end(self, death: Death, came: Progress, *, will_retry: bool = False) -> None:
        """Say how it ended, and deliver what the dead left, all within the time that an exit may take."""
        deadline = self._deadline()
        self._follow(came)
        if self._reporter is not None:
            self._reporter.end(death, came.last_step, will_retry=will_retry)
            if not will_retry:
                self._close(deadline)
            settings = self._launch.settings
            left = deadline - time.monotonic()
            if settings.spool_max_bytes and left > 0:
                drained = drain(
                    settings.directory, settings.endpoint, settings.headers, left, settings.spool_max_bytes
                )
                if drained.lost:
                    self._say(f"{drained.lost} items of undelivered telemetry were lost")

    @shielded(None)
    def _close(self, deadline: float) -> None:
        reporter, self._reporter = self._reporter, None
        if reporter is not None:
            reporter.close(max(0.0, deadline - time.monotonic()))


@shielded(None)
def _read(folder: Path | None, attempt: int) -> Progress | None:
    return None if folder is None else progress.read(folder, attempt)
