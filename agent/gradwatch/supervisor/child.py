"""One child process, run as if nobody stood between it and whoever started us.

It has our terminal, our process group and our open files. What the terminal sends (Ctrl-C, Ctrl-\\, hang-up)
goes to the whole group, the child included, and is not passed on: a second one would cut short what the first
began. What a process sends is passed on. The kernel says which it was (``si_code``).

The child outlives a supervisor that is killed: it is training, and we are not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

PASSED_ON: Final = frozenset(
    {
        signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2,
        signal.SIGCONT, signal.SIGWINCH,
    }
)  # fmt: skip
# Those that ask for an end.
_ASKING: Final = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
# Set to be ignored by Python itself, and inherited by what it starts.
_IGNORED_BY_PYTHON: Final = (signal.SIGPIPE, signal.SIGXFSZ)
_FROM_THE_KERNEL: Final = 0x80  # SI_KERNEL of sigaction(2)
_LOOK_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Exit:
    """How a child left.

    Attributes:
        code: Its exit code; for death by a signal the negative number of that.
        asked: The last signal that asked it to end, if any came.
        asked_before: Seconds from that until it left.
        signals: All that came, in order.
        core_dumped: The system wrote, or piped away, a core dump.
    """

    code: int
    asked: signal.Signals | None = None
    asked_before: float = 0.0
    signals: tuple[signal.Signals, ...] = ()
    core_dumped: bool = False

    @property
    def shell_code(self) -> int:
        """The exit code as a shell has it: 128 + n for signal n."""
        return self.code if self.code >= 0 else 128 - self.code


class Signals:
    """Holds signals back from this thread and those it starts, and hands them out one by one.

    For the main thread, before any other is started. Children start with the mask that was there before.
    """

    def __init__(self) -> None:
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED_ON, signal.SIGCHLD})
        # Where whoever started us ignores it, children would be gone without a trace.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def next(self, seconds: float) -> signal.struct_siginfo | None:
        """The next one; None if none comes."""
        return signal.sigtimedwait({*PASSED_ON, signal.SIGCHLD}, max(0.0, seconds))

    def next_asking(self, seconds: float) -> signal.Signals | None:
        """The next one that asks for an end, within so many seconds."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            came = self.next(left)
            if came is not None and _asks(came.si_signo):
                return signal.Signals(came.si_signo)
        return None


def _asks(number: int) -> bool:
    """Whether a signal asks for an end. Ignored here means ignored by the child too, as after `nohup`."""
    return number in _ASKING and signal.getsignal(number) != signal.SIG_IGN


class Child:
    """A command that was started.

    Raises:
        OSError: It cannot be.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], signals: Signals) -> None:
        self._signals = signals
        self.pid = os.posix_spawnp(
            command[0], tuple(command), environ, setsigmask=signals.mask, setsigdef=_IGNORED_BY_PYTHON
        )

    def wait(self, look: Callable[[], None]) -> Exit:
        """Pass signals on until it has left. ``look`` is called at once, and about once a second."""
        came: list[signal.Signals] = []
        asked, asked_at = None, 0.0
        next_look = 0.0
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            now = time.monotonic()
            if pid:
                code = os.waitstatus_to_exitcode(status)
                return Exit(code, asked, now - asked_at if asked else 0.0, tuple(came), os.WCOREDUMP(status))
            if now >= next_look:
                next_look = now + _LOOK_SECONDS
                look()
            info = self._signals.next(next_look - now)
            if info is None or info.si_signo == signal.SIGCHLD:
                continue
            number = signal.Signals(info.si_signo)
            came.append(number)
            if _asks(number):
                asked, asked_at = number, time.monotonic()
            if info.si_code != _FROM_THE_KERNEL:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, number)
