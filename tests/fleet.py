"""Databases as a large fleet leaves them: very many runs, and a run of very many layers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

import numpy as np
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch_collector.storage.database import batched, transaction
from gradwatch_slo.runs import Status
from tests.batches import event
from tests.stored_runs import run, store_runs
from tests.told_runs import tell_run

NEWEST: Final = datetime(2026, 3, 1, tzinfo=UTC)
# One in four was not a success.
_STATUSES: Final = (*([Status.SUCCEEDED] * 9), Status.FAILED, Status.CANCELLED, Status.LOST)
_JOBS: Final = ("resnet", "bert", "gpt")


def store_fleet(database: Engine, count: int) -> None:
    """Runs ``fleet-00000`` on, the newest first, each a minute older and a step shorter than the one before."""
    rows = [
        run(
            _STATUSES[number % len(_STATUSES)],
            run_id=f"fleet-{number:05}",
            job=_JOBS[number % len(_JOBS)],
            started=NEWEST - timedelta(minutes=number),
            last_step=count - number,
            last_loss=1.0 + number / count,
        )
        for number in range(count)
    ]
    with transaction(database) as connection:
        for some in batched(rows, most=1_000):
            store_runs(connection, some)


def tell_wide_run(
    database: Engine, run_id: str, layers: int, steps: int, bad_step: int, bad_layer: int
) -> None:
    """A run of layers ``block.0.weight`` on, one of which is NaN in one step, as an event says."""
    names = [f"block.{number}.weight" for number in range(layers)]
    told = event(
        c.NONFINITE_STEP, 1 + bad_step, 1, STEP=bad_step, LAYER_NAME=names[bad_layer], BORN_IN="backward"
    )
    losses = tuple(np.linspace(2.0, 0.5, steps))
    tell_run(database, run_id, 0, told, seconds=steps, losses=losses, layers=names)
