"""What a finding most likely means and what to do about it, in words for a tired person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gradwatch import conventions as c


@dataclass(frozen=True, slots=True)
class Advice:
    """Likely cause and next action; the runbook of the rule's alert goes on from there."""

    cause: str
    action: str
    has_birthplace: bool = False


ADVICE: Final[dict[str, Advice]] = {
    c.RULE_RUN_FAILED: Advice(
        "The training process ended with an error.",
        "Read the reason and the last events with `gradwatch runs show RUN`, fix, start again.",
    ),
    c.RULE_RUN_LOST: Advice(
        "The process was killed (SIGKILL, out of memory) or its machine vanished: heartbeats stopped "
        "without a word.",
        "Look at the host's kernel log for the OOM killer, then resume from the last checkpoint.",
    ),
    c.RULE_TELEMETRY_OUTAGE: Advice(
        "Many runs fell silent within seconds: the network to the collector, a proxy, a shared host or its "
        "power failed. The runs may well be training.",
        "Restore the way to the collector; leave the runs alone until it is clear that they are dead.",
    ),
    c.RULE_NONFINITE: Advice(
        "A loss or gradient became NaN or Inf: a division by zero or log of zero, an overflow, a learning "
        "rate that is too high, or a corrupt batch.",
        "Start at the step and layer of the finding; stop the run if the steps after it are non-finite too.",
        has_birthplace=True,
    ),
    c.RULE_MEMORY_HEADROOM: Advice(
        "Peak memory is within 10 % of the device's limit.",
        "Lower the batch size or checkpoint activations before a longer batch runs out of memory.",
    ),
}
