"""The run of this process: opened by the first ``watch()``, shared by all others, left behind by forks.

A ``with gradwatch.run():`` puts it aside for a run of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Final

from gradwatch.life.endings import CANCELLED, Ending
from gradwatch.safety import log, shielded
from gradwatch.settings import Settings
from gradwatch.telemetry import Exporter
from gradwatch.training_run import Run

_current: Run | None = None
# Those that wait until a run within them is over, innermost last.
_outer: Final[list[Run]] = []


class Block:
    """A ``with gradwatch.run():``. One that is refused has no run, and what is inside is not watched."""

    def __init__(self, *, refused: bool) -> None:
        self.refused = refused


# Those that are open, innermost last, and the one that this thread or task is in.
_open_blocks: Final[list[Block]] = []
_blocks_lock: Final = threading.Lock()
_block: Final[ContextVar[Block | None]] = ContextVar("gradwatch_block", default=None)


def current() -> Run | None:
    """The run that ``watch()`` calls share, if one is open."""
    return _current


def open_run(settings: Settings, model: str | None, exporter: Exporter | None) -> Run:
    """Begin the run of this process."""
    global _current
    run = Run(settings, model, exporter, separate=block() is not None, innermost=current)
    try:
        run.begin()
    except Exception as error:
        run.close(not_watched(error))
        raise
    _current = run
    return run


def not_watched(error: Exception) -> Ending:
    """The ending of a run that ``watch()`` could not begin: training goes on, and nobody sees how."""
    return Ending(CANCELLED, f"not watched: {type(error).__name__}")


def close_run(run: Run, ending: Ending) -> None:
    """End it."""
    global _current
    if _current is run:
        _current = None
    run.close(ending)


def block() -> Block | None:
    """The innermost ``with gradwatch.run():`` around the caller, if there is one."""
    return _block.get()


@contextlib.contextmanager
def separate_run() -> Iterator[Block]:
    """The ``watch()`` calls of the block begin a run of their own, which ends as the block does.

    A run that was open takes nothing from inside the block for its own, and goes on after it. A block beside
    one of another thread or task is refused: torch's hooks are the process's, and cannot tell whose step it is.
    """
    around = _block.get()
    with _blocks_lock:
        innermost = _open_blocks[-1] if _open_blocks else None
        mine = Block(refused=innermost is not around or (around is not None and around.refused))
        if not mine.refused:
            _open_blocks.append(mine)
    _block.set(mine)
    try:
        if mine.refused:
            log.error(
                "gradwatch.run: another thread or task is inside a run of its own, so this one is not watched: "
                "give each trial a process, or run one after the other"
            )
            yield mine
        else:
            with _apart():
                yield mine
    finally:
        _block.set(around)
        with _blocks_lock, contextlib.suppress(ValueError):  # refused, or this is a forked child
            _open_blocks.remove(mine)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    global _current
    outer, _current = _current, None
    if outer is not None:
        _outer.append(outer)
        outer.observer.pause()
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        inner = current()
        for watch in [] if inner is None else list(inner.watches):
            watch.close_with(error)
        if outer is not None and outer in _outer:  # else this is a forked child
            _outer.remove(outer)
            outer.observer.resume()
            _current = outer


# A SIGTERM that reaches a child before its hooks ran would be written to the parent's descriptor and lost to
# the child: it waits until the child has its own handling back. The mask is the forking thread's own.
_masks: Final = threading.local()


@shielded(None)
def _before_fork() -> None:
    if _current is not None or _outer:
        _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


@shielded(None)
def _after_fork_in_parent() -> None:
    before = _masks.__dict__.pop("before", None)
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@shielded(None)
def _after_fork_in_child() -> None:
    global _current
    runs, _current = [*_outer, *([] if _current is None else [_current])], None
    _outer.clear()
    _open_blocks.clear()
    _block.set(None)
    for run in reversed(runs):
        run.abandon_in_child()
    _after_fork_in_parent()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)
