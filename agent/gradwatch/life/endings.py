"""How a process ends: normal return, exception, ``sys.exit(n)``, Ctrl-C. SIGTERM is in ``sigterm``.

An exception at a prompt (``python -i``) ends a line, and nothing else. ``raise SystemExit(n)`` without
``sys.exit`` (which is also what the site module's ``exit()`` does) leaves no trace that a hook could see: such
an ending is reported as ``succeeded``. Death without any ending (SIGKILL, ``os._exit``, a segfault) is for the
collector to infer and a supervisor to tell.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from opcode import opname
from types import FrameType, TracebackType
from typing import Any, NoReturn

from gradwatch.life.oom import HANDLED_BEFORE, OutOfMemory, out_of_memory, text_of
from gradwatch.life.preemption import PATIENCE_SECONDS
from gradwatch.redaction import redact_text
from gradwatch.safety import internal_error
from gradwatch.supervisor.launch import will_be_restarted

SUCCEEDED = "succeeded"
FAILED = "failed"
CANCELLED = "cancelled"

_MESSAGE_LENGTH = 200
_MOST_REDACTED = 2000


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
    # Before it is cut to its length: half a secret no longer looks like one. But not all of a long one: that
    # takes time which the end of the process has not.
    lines = text_of(error)[:_MOST_REDACTED].splitlines()
    message = redact_text(lines[0])[:_MESSAGE_LENGTH] if lines else None
    if isinstance(error, KeyboardInterrupt):
        return Ending(CANCELLED, "interrupted", 130, name, message)
    return Ending(FAILED, name, 1, name, message, out_of_memory(error))


def after_sigterm(ending: Ending, reason: str, seconds: float) -> Ending:
    """The same, so many seconds after a SIGTERM that the program handled: its answer to that, if it came soon.

    Whatever the answer is: a handler may return, exit or raise an exception of its own. That stays as evidence.
    """
    if seconds > PATIENCE_SECONDS:
        return ending
    return replace(ending, status=CANCELLED, reason=reason, will_retry=False)


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
        # Namespaces of others, and the names in them that are `sys.exit`.
        self._rebound: list[tuple[dict[str, Any], str]] = []
        self._original_hook = sys.excepthook
        self._original_exit = sys.exit

    def install(self) -> None:
        """Put the wrappers in place."""
        self._original_hook = sys.excepthook
        self._original_exit = sys.exit

        def excepthook(
            kind: type[BaseException], error: BaseException, traceback: TracebackType | None
        ) -> None:
            try:
                if not _at_a_prompt(traceback):
                    self._failed(_of_the_process(ending_of(error)))
            except Exception as own:  # noqa: BLE001 - nothing of ours may keep the user's hook from running
                internal_error(own, "the end of the process")
            finally:
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
        self._rebound = _bound_elsewhere(self._original_exit)
        for namespace, name in self._rebound:
            namespace[name] = leave
        old = _last_uncaught()
        if old is not None:
            vars(old)[HANDLED_BEFORE] = True

    def remove(self) -> None:
        """Put the originals back, unless somebody wrapped ours."""
        excepthook, leave = self._wrappers
        if sys.excepthook is excepthook:
            sys.excepthook = self._original_hook
        if sys.exit is leave:
            sys.exit = self._original_exit
        for namespace, name in self._rebound:
            if namespace.get(name) is leave:
                namespace[name] = self._original_exit
        self._rebound.clear()
        self._exit = None

    def at_exit(self) -> Ending:
        """The ending, asked when the interpreter is about to leave and our hook saw no exception.

        Another hook may have been put in its place (``rich.traceback.install()``): the interpreter keeps what
        it hands to whichever hook there is.
        """
        uncaught = _last_uncaught()
        if uncaught is not None and not _at_a_prompt(uncaught.__traceback__) and _reached_the_top(uncaught):
            return _of_the_process(ending_of(uncaught))
        if self._exit is None or not _reached_the_top(self._exit):
            return RETURNED
        return _of_the_process(ending_of(self._exit))


def _bound_elsewhere(function: Any) -> list[tuple[dict[str, Any], str]]:
    """Where `from sys import exit` was said before: in the script under any name, in other modules as it is."""
    script = vars(sys.modules["__main__"])
    found = [(script, name) for name, value in script.items() if value is function]
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", None)
        if type(namespace) is not dict or namespace is script or module is sys:
            continue
        if namespace.get("exit") is function:
            found.append((namespace, "exit"))
    return found


def _last_uncaught() -> BaseException | None:
    """What the interpreter handed to ``sys.excepthook`` last, unless that was before the run."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    is_new = isinstance(error, BaseException) and HANDLED_BEFORE not in vars(error)
    return error if is_new else None


def _at_a_prompt(traceback: TracebackType | None) -> bool:
    """Whether the exception with this traceback came from a line that somebody typed; None if it has none."""
    typed = traceback is None or traceback.tb_frame.f_code.co_filename.startswith("<")
    return typed and hasattr(sys, "ps1")


def _reached_the_top(error: BaseException) -> bool:
    """Whether nobody caught it: no frame from the outermost it is known to have passed on ended by returning.

    An exception's traceback ends at the frame that caught it; on Python 3.11 also at the last one that looked
    at it and raised it again (``finally``, ``with``, ``raise``), because nobody extends it after that. A frame
    that caught it for good went on, and has returned by the time the interpreter leaves; so has one that caught
    another exception that was made of it.
    """
    traceback = error.__traceback__
    if traceback is None:
        return False
    frame: FrameType | None = traceback.tb_frame
    while frame is not None:
        if opname[frame.f_code.co_code[frame.f_lasti]].startswith(("RETURN", "YIELD")):
            return False
        frame = frame.f_back
    return True
