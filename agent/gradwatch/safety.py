"""Internal errors never reach the training loop: caught, counted, logged at most once a minute."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar

_LOG_EVERY_SECONDS: Final = 60.0

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F")


class _Log(logging.LoggerAdapter[logging.Logger]):
    """A logger whose handlers, which are the user's, may raise: training hears nothing of that."""

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        kwargs.setdefault("stacklevel", 2)  # the caller, not this method
        with contextlib.suppress(Exception):
            super().log(level, msg, *args, **kwargs)


log: Final = _Log(logging.getLogger("gradwatch"), {})


class Throttle:
    """Lets one message through a minute and counts the others."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._next = float("-inf")
        self.total = 0

    def allows(self) -> bool:
        """Whether this message may be written now."""
        self.total += 1
        now = self._monotonic()
        if now < self._next:
            return False
        self._next = now + _LOG_EVERY_SECONDS
        return True


_errors = Throttle()


def internal_error(error: Exception, where: str) -> None:
    """Take note of an error inside gradwatch; raise it only under the project's own tests."""
    if os.environ.get("GRADWATCH_TESTING") == "1":
        raise error
    if _errors.allows():
        log.warning(
            "internal error in %s, training is not affected (%d so far): %r",
            where, _errors.total, error, exc_info=error,
        )  # fmt: skip


def error_count() -> int:
    """Internal errors caught in this process so far."""
    return _errors.total


def shielded(fallback: F) -> Callable[[Callable[P, R]], Callable[P, R | F]]:
    """Make a function return ``fallback`` where it would raise. For paths that are not run every step."""

    def decorate(function: Callable[P, R]) -> Callable[P, R | F]:
        @wraps(function)
        def shield(*args: P.args, **kwargs: P.kwargs) -> R | F:
            try:
                return function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - rule 2: nothing of ours may stop training
                internal_error(error, function.__qualname__)
                return fallback

        return shield

    return decorate
