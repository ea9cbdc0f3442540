"""The stack of every thread of this process, for a run that seems to hang."""

from __future__ import annotations

import sys
import threading
import traceback
from typing import Final

_MOST_BYTES: Final = 64 << 10
_MOST_FRAMES: Final = 100


def stacks() -> str:
    """One paragraph a thread, the main thread first, innermost frame last; UTF-8 of at most 64 KiB.

    A thread that is stuck in C is shown at the call that took it there. May be called from any thread.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    # The limit counts from the innermost frame.
    found = [
        (ident != main, names.get(ident, "unknown"), traceback.extract_stack(frame, _MOST_FRAMES))
        for ident, frame in sys._current_frames().items()  # noqa: SLF001 - there is no public way
    ]
    found.sort(key=lambda thread: thread[:2])
    text = "\n".join(f"{name}:\n{''.join(traceback.format_list(stack))}" for _, name, stack in found)
    return text.encode(errors="backslashreplace")[:_MOST_BYTES].decode(errors="ignore")
