"""SIGTERM without delaying death, even in the middle of a C call that lasts seconds.

A Python-level handler waits for the current C call. The C-level one does not: it writes the signal's number
to the wake-up descriptor, where a thread reads it, sends the ending and lets the default action happen. Python
only arms its C-level handler for signals with a Python-level one, hence the placeholder. A handler of the
user's own, set before or after, runs as if we were not there; we only take note.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

# No signal has these numbers.
_STOP: Final = b"\0"
_SETTLE: Final = b"\xff"
_SETTLE_SECONDS: Final = 0.5
_SIGTERM: Final = int(signal.SIGTERM)


class SigtermWatch:
    """Listens for SIGTERM while installed.

    Args:
        noted: SIGTERM came and the user's handler takes care of it.
        dying: SIGTERM came and the process ends; must return within a fraction of a second.
    """

    def __init__(self, noted: Callable[[], None], dying: Callable[[], None]) -> None:
        self._noted = noted
        self._dying = dying
        self._once = threading.Lock()
        self._installed = False
        self._placed = False
        self._settled = threading.Event()
        self._previous_descriptor = -1
        # Numbers of the signals that came, as far as Python has handlers for them.
        self.seen: set[int] = set()

    def install(self) -> None:
        """Arm. Does nothing outside the main thread, where no signal is handled, or without a thread more."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_descriptor = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._placeholder)
            self._placed = True
        self._thread = threading.Thread(target=self._listen, name="gradwatch-sigterm", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # there can be no more threads; SIGTERM is as it was
            self._restore()
            self._close_pipe()
        else:
            self._installed = True

    def remove(self) -> None:
        """Disarm; what was there before is there again. Outside the main thread the handler has to stay."""
        if not self._installed:
            return
        if threading.current_thread() is threading.main_thread():
            self._restore()
        os.write(self._writer, _STOP)
        self._thread.join(1.0)
        self._close_pipe()

    def settle(self) -> None:
        """Wait until signals that came before this call are noted."""
        if self._installed:
            self._settled.clear()
            os.write(self._writer, _SETTLE)
            self._settled.wait(_SETTLE_SECONDS)

    def forget_in_child(self) -> None:
        """After a fork: the thread is gone, the descriptor is the parent's."""
        if self._installed:
            with contextlib.suppress(ValueError):
                self._restore()
            self._close_pipe()

    def _restore(self) -> None:
        current = signal.set_wakeup_fd(self._previous_descriptor)
        if current not in {self._writer, -1}:
            signal.set_wakeup_fd(current)  # somebody came after us, an event loop for example
        if self._placed and signal.getsignal(signal.SIGTERM) == self._placeholder:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _close_pipe(self) -> None:
        self._installed = False
        for descriptor in (self._reader, self._writer):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _listen(self) -> None:
        while True:
            try:
                received = os.read(self._reader, 64)
            except OSError:
                return
            if self._previous_descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._previous_descriptor, received.replace(_STOP, b"").replace(_SETTLE, b""))
            self.seen.update(received)
            if _SIGTERM in received:
                self._sigterm()
            if _SETTLE in received:
                self._settled.set()
            if _STOP in received or not received:
                return

    def _sigterm(self) -> None:
        handler: Any = signal.getsignal(signal.SIGTERM)
        if handler == self._placeholder:
            self._die()
        else:
            self._noted()

    def _placeholder(self, _signal: int, _frame: FrameType | None) -> None:
        if signal.getsignal(signal.SIGTERM) != self._placeholder:
            return  # a handler of the user's calls the one before it: the default action, which nobody can call
        # The thread was slower than the end of the C call, or lost its descriptor to an event loop. Not on this
        # thread: it may have been interrupted with a lock in its hands that the ending needs.
        threading.Thread(target=self._die, name="gradwatch-sigterm-late", daemon=True).start()

    def _die(self) -> None:
        with self._once:  # the second caller waits here until the process is gone
            try:
                self._dying()
            finally:
                # signal.signal() is refused outside the main thread; this is what it calls.
                set_signal = ctypes.pythonapi.PyOS_setsig
                set_signal.argtypes, set_signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
                set_signal(_SIGTERM, None)
                os.kill(os.getpid(), _SIGTERM)
                threading.Event().wait(1.0)
