"""What an alerting rule is made of, and what all of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gradwatch import conventions as names

PAGE: Final = "page"
TICKET: Final = "ticket"
NONE: Final = "none"

# Who gets up, or gets the ticket: the label `owner`, by which Alertmanager routes. The platform's people mend
# machines, networks, storage and the service; those who train mend models, data and training code.
ML_SRE: Final = "ml-sre"
ML_ENGINEER: Final = "ml-engineer"

# A collector that is away must not resolve its findings and raise them again when it is back: a restart with
# a migration stays well below this. It only delays the notification that a finding is resolved.
KEEP_FIRING_FOR: Final = "2m"


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alerting rule: ``labels`` add to those of the expression, ``dashboard`` is a path in Grafana.

    ``slo_severity``: what the rule asks for at its worst. What is told, the label ``severity``, is less where
    the tier is not production, or the evidence weaker.
    """

    name: str
    expr: str
    summary: str
    description: str
    dashboard: str
    owner: str = ML_SRE
    slo_severity: str = TICKET
    labels: tuple[tuple[str, str], ...] = ()
    hold: str | None = None
    keep_firing_for: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Rules that are evaluated together, in this order."""

    name: str
    alerts: tuple[Alert, ...]


def over_replicas(selector: str) -> str:
    """The highest value over the collector's replicas, which all report the same findings: one alert."""
    return f"max without ({', '.join(names.REPLICA_LABELS)}) ({selector})"
