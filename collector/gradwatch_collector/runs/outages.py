"""Which runs fell silent together: then it was not the runs. Pure: moments in Unix nanoseconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# The run-status contract: five or more runs, and more than 20 % of the live ones, within the same 10 s.
WINDOW: Final = 10 * 1_000_000_000
LEAST_RUNS: Final = 5
SHARE: Final = 5  # more than one in five
# Times the limit after which a run of an outage is lost all the same.
PATIENCE: Final = 10


def quiet_after(lost_after: int) -> int:
    """Return the silence after which a run is looked at, with others that fell silent up to a window before.

    The first run of an outage reaches ``lost_after`` up to a window before the last one does. Heartbeats come
    every 5 s, so that by then the others have missed several.
    """
    return max(lost_after - WINDOW, lost_after // 2)


def silent_together(quiet: Mapping[str, int], live: int, overdue: int) -> set[str]:
    """Return the runs that fell silent as one outage.

    ``quiet``: when each quiet run was last heard. ``live``: number of live runs, the quiet ones among them.
    ``overdue``: who was last heard before that has been silent for too long; one such is needed.
    """
    runs = sorted(quiet, key=lambda run_id: quiet[run_id])
    together: set[str] = set()
    end = 0
    for start, first in enumerate(runs):
        if quiet[first] >= overdue:
            break
        while end < len(runs) and quiet[runs[end]] <= quiet[first] + WINDOW:
            end += 1
        count = end - start
        if count >= LEAST_RUNS and count * SHARE > live:
            together.update(runs[start:end])
    return together
