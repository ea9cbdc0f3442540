"""Runs in a database, told as a collector is told of them."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch.life.flight_recorder import FlightRecorder, FlightStep, compress
from gradwatch_collector.findings import Detection, reconcile
from gradwatch_collector.records import Batch, EventRecord, Frame, Received, Source
from gradwatch_collector.runs.facts import load_runs
from gradwatch_collector.runs.registry import Registry
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.series import SeriesIds
from gradwatch_collector.storage.writing import store
from tests.batches import at, batch, event, frame, scalar

LAYERS = ("conv.weight", "fc.weight")


def tell(database: Engine, received: Batch, seconds: float) -> None:
    """As the ingest thread does, at that moment of the test's time."""
    registry = Registry()
    with transaction(database) as connection:
        (key,) = registry.resolve(connection, [(received.source, at(seconds))])
        store(connection, SeriesIds(), [Received(key, received, at(seconds))])
        registry.apply(connection, [Received(key, received, at(seconds))])


def tell_run(
    database: Engine,
    run_id: str,
    start: float,
    *events: EventRecord,
    seconds: float = 20,
    losses: Sequence[float] = tuple(np.linspace(2.0, 0.5, 20)),
    first_step: int = 0,
    resource: Mapping[str, Any] | None = None,
    rank: int = 0,
    attempt: int = 1,
    devices: Sequence[str] = (),
    frames: Sequence[Frame] = (),
    layers: Sequence[str] = LAYERS,
    share: float | None = None,
    ending: Mapping[str, Any] | None = None,
) -> None:
    """Tell of a process that trained for ``seconds``, a step for each loss.

    ``share``: of the squared norms, where parameters are sharded. ``ending``: as `event` takes it.
    """
    about = {c.SERVICE_NAME: "digits", c.MODEL: "net", c.DATASET: "digits", c.HOST_NAME: "node-1"}
    told = Source(run_id, attempt, rank, f"{run_id}-{attempt}-{rank}", about | dict(resource or {}))
    ends = [start + seconds * (step + 1) / (len(losses) + 1) for step in range(len(losses))]
    steps = [float(first_step + step) for step in range(len(losses))]
    whole = [3 * abs(loss) for loss in losses]
    norms = [[abs(loss) * (index + 1) for loss in losses] for index in range(len(layers))]
    memory = [frame(c.DEVICE_MEMORY_LIMIT, [{c.DEVICE: name}], [ends[0]], [[80e9]]) for name in devices]
    ended = {"STATUS": "succeeded"} if ending is None else ending
    tell(
        database,
        batch(
            told,
            event(c.RUN_STARTED, start),
            *events,
            event(c.RUN_ENDED, start + seconds, 1_000_000, **ended),
            frames=[
                scalar(c.STEP_INDEX, ends, steps),
                scalar(c.LOSS, ends, losses),
                scalar(c.LEARNING_RATE, ends, [0.1] * len(losses)),
                scalar(c.STEP_DURATION, ends, [seconds / (len(losses) + 1)] * len(losses)),
                frame(c.DEVICE_MEMORY_HEADROOM, [{c.DEVICE: "cpu"}], [ends[0], ends[-1]], [[0.9, 0.7]]),
                *(
                    _norms(ends, whole, norms, layers)
                    if share is None
                    else _shares(ends, whole, norms, layers, share)
                ),
                *memory,
                *frames,
            ],
        ),
        start + seconds,
    )


_Columns = Sequence[Sequence[float]]


def _norms(
    ends: Sequence[float], whole: Sequence[float], norms: _Columns, layers: Sequence[str]
) -> Iterator[Frame]:
    yield scalar(c.GRADIENT_NORM, ends, whole)
    for field in ("count", "sum", "min", "max"):
        yield frame(c.LAYER_GRADIENT_NORM, [{c.LAYER_NAME: name} for name in layers], ends, norms, field)


def _shares(
    ends: Sequence[float], whole: Sequence[float], norms: _Columns, layers: Sequence[str], share: float
) -> Iterator[Frame]:
    yield scalar(c.GRADIENT_SHARD_SQUARE, ends, [share * norm**2 for norm in whole])
    for name, column in zip(layers, norms, strict=True):
        squares = [share * norm**2 for norm in column]
        yield frame(c.LAYER_GRADIENT_SHARD_SQUARE, [{c.LAYER_NAME: name}], ends, [squares])


def look(database: Engine, seconds: float) -> None:
    """Make the findings of all runs, as the evaluator does."""
    with transaction(database) as connection:
        found = Detection().look(connection, load_runs(connection), at(seconds), lambda: True)
        reconcile(connection, found.observations, at(seconds))


def flight_record(losses: Sequence[float], layers: Sequence[str] = LAYERS) -> str:
    """A black box of these steps, as an event carries it."""
    recorder = FlightRecorder(100)
    for step, loss in enumerate(losses):
        norms = [abs(loss) * (index + 1) for index in range(len(layers))]
        recorder.add(
            FlightStep(
                0,
                step,
                at(step),
                10**9,
                loss,
                (0.1,),
                layers,
                range(len(layers)),
                norms,
                sum(norms),
                loss != loss,
            )
        )
    return base64.b64encode(compress(recorder.document({}))).decode()
