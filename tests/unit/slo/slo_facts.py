"""Runs and objectives for the tests of objectives, with everything ordinary filled in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import count
from typing import Any

from gradwatch_slo.durations import Duration
from gradwatch_slo.indicators import Measure, Selection, SuccessRate
from gradwatch_slo.objective import Objective
from gradwatch_slo.runs import RunFacts, Status
from gradwatch_slo.windows import TimeWindow

NOW = datetime(2026, 3, 29, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
SUCCESS = SuccessRate()

_ids = count()


def run(status: Status = Status.SUCCEEDED, *, started: datetime = NOW - 3 * HOUR, **facts: Any) -> RunFacts:
    """A run of an hour; ``reached`` is its time to the target ``val_loss<=0.5``."""
    reached: timedelta | None = facts.pop("reached", None)
    lasted: timedelta = facts.pop("lasted", HOUR)
    ordinary: dict[str, Any] = {
        "run_id": f"run-{next(_ids)}",
        "job": "digits",
        "model": "mlp",
        "dataset": "digits",
        "team": "vision",
        "tier": "production",
        "reason": None,
        "ended_at": None if status is Status.RUNNING else started + lasted,
        "target": None if reached is None else "val_loss<=0.5",
        "target_reached_at": None if reached is None else started + reached,
    }
    return RunFacts(status=status, started_at=started, **(ordinary | facts))


def objective(measure: Measure = SUCCESS, **changes: Any) -> Objective:
    """A 90 % objective over 28 rolling days."""
    ordinary: dict[str, Any] = {
        "name": "an-objective",
        "indicator": "an-indicator",
        "target": Decimal("0.9"),
        "window": TimeWindow(Duration(28, "d")),
        "selection": Selection(),
    }
    return Objective(measure=measure, **(ordinary | changes))
