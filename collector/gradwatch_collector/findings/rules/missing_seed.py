"""A run that nobody can repeat, since its random generator was never seeded."""

from __future__ import annotations

from typing import Final

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import RunView

# What torch's generator says of itself until it is seeded: `default_rng_seed_val` of c10.
UNSEEDED: Final = "67280421310721"


def detect(view: RunView, _: None) -> Sighting | None:
    """See a run that began with torch's generator as it comes."""
    if str(view.resource.get(c.SEED)) != UNSEEDED:
        return None
    return Sighting(since=view.run.started_at, evidence={"seed": UNSEEDED})


RULE = RunRule(
    name=c.RULE_MISSING_SEED,
    severity=Severity.INFO,
    detect=detect,
    parameters=None,
    cause="Nobody called `torch.manual_seed` before `gradwatch.watch`: weights and batches came by chance, "
    "and the run cannot be repeated.",
    action="Seed torch, NumPy and `random` at the start, and log the seed.",
)
