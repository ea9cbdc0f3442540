"""A run that nobody can repeat, since its random generator was never seeded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.rule import RunRule, Sighting
from gradwatch_collector.findings.run_view import RunView
from gradwatch_collector.runs.telling import text

# What torch's generator of older versions begins with: `default_rng_seed_val` of c10.
_OLD: Final = 67280421310721


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Unseeded: torch's generator began with its own constant, or with a random seed of ``bits`` bits or more.

    NumPy takes no seeds of more than 32; of the system's 64 at random one in 65 536 is missed.
    """

    bits: int = 48


def detect(view: RunView, parameters: Parameters) -> Sighting | None:
    """See a run that began with torch's generator as it comes."""
    told = text(view.resource.get(c.SEED)) or ""
    if not told.isdecimal() or (int(told).bit_length() < parameters.bits and int(told) != _OLD):
        return None
    return Sighting(since=view.run.started_at, evidence={"seed": told})


RULE = RunRule(
    name=c.RULE_MISSING_SEED,
    severity=Severity.INFO,
    detect=detect,
    parameters=Parameters(),
    cause="Nobody called `torch.manual_seed` before `gradwatch.watch`: weights and batches came by chance, "
    "and the run cannot be repeated.",
    action="Seed torch, NumPy and `random` at the start, and log the seed.",
)
