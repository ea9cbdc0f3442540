"""Was it the scheduler that took the machine away, or did somebody end the run? What SIGTERM alone cannot say.

Only what is evidence counts. Slurm sends SIGCONT and SIGTERM to a job that it preempts and to one that somebody
cancels, alike; but the notice of ``--signal`` (SIGUSR1 or SIGUSR2, by custom) only comes ahead of an ending
that the scheduler chose: preemption, or the time limit, after either of which a job is put back into the queue.
In Kubernetes nothing within the pod tells an eviction from a deletion, so the pod's author has to:
``GRADWATCH_PREEMPTIBLE=1``.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Mapping
from typing import Final

PREEMPTED: Final = "preempted"
# Schedulers kill what has not ended 30 s after they asked; torchrun too. What ends later than this has ended
# for a reason of its own: it has taken the signal for a notice.
PATIENCE_SECONDS: Final = 60.0
_NOTICES: Final = frozenset({signal.SIGUSR1, signal.SIGUSR2})


def sigterm_reason(
    preemptible: bool, before: Collection[int] = (), environ: Mapping[str, str] = os.environ
) -> str:
    """``preempted`` or ``SIGTERM``.

    Args:
        preemptible: The setting of that name: whoever runs this said that SIGTERM means preemption.
        before: Numbers of the signals that came before SIGTERM.
        environ: Tells of Slurm.
    """
    noticed = "SLURM_JOB_ID" in environ and not _NOTICES.isdisjoint(before)
    return PREEMPTED if preemptible or noticed else "SIGTERM"
