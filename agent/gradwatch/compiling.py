"""Keeps our code out of what ``torch.compile`` traces.

A compiled training step breaks its graph at ``backward()`` and at ``optimizer.step()`` anyway, and Dynamo then
looks at every function called from there, ours included: it would compile our bookkeeping, and break at each
clock it reads. Told to skip this package, it captures the graphs it would capture without us.
"""

from __future__ import annotations

import sys
from typing import Any

from gradwatch.safety import shielded

_told = False


@shielded(None)
def stay_untraced() -> None:
    """Tell Dynamo, once a process. It is there already: making an optimizer loads it."""
    global _told
    rules: Any = sys.modules.get("torch._dynamo.trace_rules")
    if rules is not None and not _told:
        rules.add("gradwatch")
        _told = True
