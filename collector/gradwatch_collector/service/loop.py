"""A thread that does the same over and over, however often that fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from gradwatch_collector.service.lease import LeaseLostError

logger = logging.getLogger(__name__)

_STOP_SECONDS: Final = 5.0


class Loop:
    """Calls each of ``acts`` every ``interval`` seconds, from when it is started until it is stopped.

    One that raises is called again with the others the next time: the database may be away for a while, or
    another collector do this now. ``name`` is what logs say of it, and part of the thread's.
    """

    def __init__(self, name: str, interval: float, *acts: Callable[[], object]) -> None:
        self._name = name
        self._interval = interval
        self._acts = acts
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"gradwatch-{name}", daemon=True)

    @property
    def goes_on(self) -> bool:
        """Whether it has not been stopped: for acts that can end early."""
        return not self._stop.is_set()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> bool:
        """Stop after what is under way; return whether it ended. A database that hangs is left alone."""
        self._stop.set()
        self._thread.join(_STOP_SECONDS)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            for act in self._acts:
                try:
                    act()
                except SQLAlchemyError as error:
                    logger.warning("%s waits for the database: %s", self._name, str(error).splitlines()[0])
                except LeaseLostError:
                    logger.info("%s is another collector's now", self._name)
                except Exception:
                    logger.exception("%s failed, trying again", self._name)
