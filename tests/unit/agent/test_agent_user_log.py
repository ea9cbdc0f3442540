"""Whose step a loss or a rate is that the loop gives with ``watch.log``."""

from __future__ import annotations

import logging
import math

import pytest
import torch

import gradwatch
from gradwatch import conventions as names
from gradwatch.loop.step_log import MOST_WAITING
from gradwatch.testing import InMemoryExporter
from tests.unit.agent.known_losses import BAD, both, exactly, network


@both
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_loop_that_logs_before_the_backward_pass_of_something_else_logs_of_the_step_to_come(
    exporter: InMemoryExporter, every: int, micro_batches: int
) -> None:
    model, optimizer = network()
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every) as watch:
        for step in range(6):
            watch.log(lr=step / 10)
            optimizer.zero_grad()
            for _ in range(micro_batches):
                loss = exactly(model, float(step))
                watch.log(loss=loss)
                (loss / 2).backward()
            optimizer.step()
    assert exporter.values(names.LOSS) == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], abs=1e-6)
    assert exporter.values(names.LEARNING_RATE) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]


@both
def test_a_loop_that_logs_after_its_steps_logs_of_the_step_that_has_ended(
    exporter: InMemoryExporter, every: int
) -> None:
    model, optimizer = network()
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every) as watch:
        for step in range(6):
            optimizer.zero_grad()
            exactly(model, 7.0).backward()
            optimizer.step()
            watch.log(loss=float(step), lr=step / 10)
    assert exporter.values(names.LOSS) == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], abs=1e-6)
    assert exporter.values(names.LEARNING_RATE) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]


@both
@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("often", [1, 2])
@pytest.mark.parametrize("fault", [math.nan, 100.0])
def test_a_loss_that_is_logged_of_a_batch_left_out_is_no_other_steps(
    exporter: InMemoryExporter, ahead: bool, often: int, fault: float, every: int
) -> None:
    model, optimizer = network()
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every) as watch:
        for batch in range(8):
            optimizer.zero_grad()
            loss = exactly(model, fault if batch == BAD else float(batch))
            if ahead and batch % often == 0:
                watch.log(loss=loss)
            loss.backward()
            if not ahead and batch % often == 0:
                watch.log(loss=loss)
            if loss.item() < 100:
                optimizer.step()
    assert exporter.values(names.LOSS) == pytest.approx([0.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0], abs=1e-6)
    events = exporter.find_events(names.NONFINITE_STEP.name)
    assert [event.attributes[names.STEP] for event in events] == ([BAD] if math.isnan(fault) else [])


@both
@pytest.mark.parametrize("often", [1, 2])
def test_a_nan_that_is_logged_of_a_batch_left_out_before_its_backward_pass_is_told(
    exporter: InMemoryExporter, every: int, often: int
) -> None:
    """Also where the batch after it is not logged."""
    model, optimizer = network()
    with gradwatch.watch(model, optimizer, exporter=exporter, every=every) as watch:
        for batch in range(8):
            optimizer.zero_grad()
            loss = exactly(model, math.nan if batch == BAD else float(batch))
            if batch % often == 0:
                watch.log(loss=loss)
            if torch.isfinite(loss):
                loss.backward()
                optimizer.step()
    assert exporter.values(names.LOSS) == pytest.approx([0.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0], abs=1e-6)
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.STEP] == BAD


@both
def test_a_nan_that_is_logged_and_raised_for_is_told_at_the_step_that_did_not_come(
    exporter: InMemoryExporter, every: int
) -> None:
    model, optimizer = network()
    with (
        pytest.raises(FloatingPointError),
        gradwatch.watch(model, optimizer, exporter=exporter, every=every) as watch,
    ):
        for batch in range(8):
            optimizer.zero_grad()
            loss = exactly(model, math.nan if batch == BAD else float(batch))
            watch.log(loss=loss)
            if not torch.isfinite(loss):
                raise FloatingPointError
            loss.backward()
            optimizer.step()
    assert exporter.values(names.LOSS) == pytest.approx([0.0, 1.0, 2.0, 3.0], abs=1e-6)
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.STEP] == BAD


class Odd:
    def __float__(self) -> float:
        raise RuntimeError("not a number")


def test_a_value_that_is_none_costs_nothing_but_itself_and_one_line_a_minute(
    exporter: InMemoryExporter, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = network()
    with gradwatch.watch(model, optimizer, exporter=exporter) as watch:
        for _ in range(5):
            watch.log(odd=Odd(), text="0.5 maybe", fine=1.0)
    assert exporter.values(names.LOGGED) == [1.0] * 5
    assert [line for line in caplog.messages if "one number" in line] == [
        "watch.log(odd=...): expected one number, got Odd",
        "watch.log(text=...): expected one number, got str",
    ]


def test_a_logging_handler_that_raises_does_not_end_training(exporter: InMemoryExporter) -> None:
    class Strict(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError("no log server")

    strict = Strict()
    logging.getLogger().addHandler(strict)
    try:
        model, optimizer = network()
        with gradwatch.watch(model, optimizer, exporter=exporter) as watch:
            watch.log(text="words", fine=1.0)
    finally:
        logging.getLogger().removeHandler(strict)
    assert exporter.values(names.LOGGED) == [1.0]


def test_values_past_the_bound_of_an_interval_are_counted(exporter: InMemoryExporter) -> None:
    model, optimizer = network()
    with gradwatch.watch(model, optimizer, exporter=exporter, export_interval=600) as watch:
        for value in range(MOST_WAITING + 7):
            watch.log(many=value)
    kept = exporter.values(names.LOGGED)
    assert kept == list(range(MOST_WAITING + 7))[-len(kept) :]
    assert len(kept) + sum(exporter.values(names.AGENT_DROPPED)) == MOST_WAITING + 7
