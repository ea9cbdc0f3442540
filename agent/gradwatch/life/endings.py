"""How a process ends: normal return, exception, ``sys.exit(n)``, Ctrl-C. SIGTERM is in ``sigterm``.

``raise SystemExit(n)`` without ``sys.exit`` (which is also what the site module's ``exit()`` does) leaves no
trace that a hook could see: such an ending is reported as ``succeeded``. Death without any ending (SIGKILL,
``os._exit``, a segfault) is for the collector to infer and a supervisor to tell.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from opcode import opname
from types import TracebackType
from typing import Any, NoReturn

from gradwatch.life.oom import OutOfMemory, out_of_memory
from gradwatch.redaction import redact_text
from gradwatch.supervisor.launch import will_be_restarted

SUCCEEDED = "succeeded"
FAILED = "failed"
CANCELLED = "cancelled"

_MESSAGE_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Ending:
    """Status and evidence of an ending; what is not known is None.

    ``will_retry``: whoever started this process will start it again.
    """

    status: str
    reason: str | None = None
    exit_code: int | None = None
    exception_type: str | None = None
    exception_message: str | None = None
    out_of_memory: OutOfMemory | None = None
    will_retry: bool = False


RETURNED = Ending(SUCCEEDED, exit_code=0)


def ending_of(error: BaseException | None) -> Ending:
    """The ending that an exception reaching the top means; None is a normal return."""
    if error is None:
        return RETURNED
    if isinstance(error, SystemExit):
        return _exit_ending(error.code)
    name = _qualified_name(type(error))
    lines = str(error).splitlines()
    # Before it is cut: half a secret no longer looks like one.
    message = redact_text(lines[0])[:_MESSAGE_LENGTH] if lines else None
    if isinstance(error, KeyboardInterrupt):
        return Ending(CANCELLED, "interrupted", 130, name, message)
    return Ending(FAILED, name, 1, name, message, out_of_memory(error))


def _exit_ending(code: object) -> Ending:
    if code is None:
        return RETURNED
    number = int(code) & 0xFF if isinstance(code, int) else 1
    return Ending(SUCCEEDED if number == 0 else FAILED, f"exit {number}" if number else None, number)


def _qualified_name(kind: type[BaseException]) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _of_the_process(ending: Ending) -> Ending:
    """The same, of something that takes the whole process with it."""
    return replace(ending, will_retry=ending.status == FAILED and will_be_restarted())


class EndingWatch:
    """Wraps ``sys.excepthook`` and ``sys.exit`` while installed, and knows at exit what happened."""

    def __init__(self, failed: Callable[[Ending], None]) -> None:
        self._failed = failed
        self._exit: SystemExit | None = None
        self._rebound: list[str] = []
        self._original_hook = sys.excepthook
        self._original_exit = sys.exit

    def install(self) -> None:
        """Put the wrappers in place."""
        self._original_hook = sys.excepthook
        self._original_exit = sys.exit

        def excepthook(
            kind: type[BaseException], error: BaseException, traceback: TracebackType | None
        ) -> None:
            self._failed(_of_the_process(ending_of(error)))
            self._original_hook(kind, error, traceback)

        def leave(status: Any = None, /) -> NoReturn:
            try:
                self._original_exit(status)
            except SystemExit as error:
                if threading.current_thread() is threading.main_thread():
                    self._exit = error
                raise
            raise SystemExit(status)  # somebody replaced sys.exit by a function that returned

        self._wrappers = (excepthook, leave)
        sys.excepthook = excepthook
        sys.exit = leave
        # The script's own `from sys import exit`, made before.
        script = vars(sys.modules["__main__"])
        self._rebound = [name for name, value in script.items() if value is self._original_exit]
        script.update(dict.fromkeys(self._rebound, leave))

    def remove(self) -> None:
        """Put the originals back, unless somebody wrapped ours."""
        excepthook, leave = self._wrappers
        if sys.excepthook is excepthook:
            sys.excepthook = self._original_hook
        if sys.exit is leave:
            sys.exit = self._original_exit
        script = vars(sys.modules["__main__"])
        script.update({name: self._original_exit for name in self._rebound if script.get(name) is leave})
        self._exit = None

    def at_exit(self) -> Ending:
        """The ending, asked when the interpreter is about to leave and no exception reached the top."""
        error = self._exit
        if error is None or not _reached_the_top(error):
            return RETURNED
        return _of_the_process(ending_of(error))


def _reached_the_top(error: BaseException) -> bool:
    """Whether nobody caught it: the outermost frame it is known to have passed did not end by returning.

    An exception's traceback ends at the frame that caught it; on Python 3.11 also at the last one that looked
    at it and raised it again (``finally``, ``with``, ``raise``), because nobody extends it after that. A frame
    that caught it for good went on, and has returned by the time the interpreter leaves.
    """
    traceback = error.__traceback__
    if traceback is None:
        return False
    frame = traceback.tb_frame
    return not opname[frame.f_code.co_code[frame.f_lasti]].startswith(("RETURN", "YIELD"))
