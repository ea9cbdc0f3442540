"""Values that arrive late, with a ring whose copies finish on command (there is no device here)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gradwatch.gradients.norms import DeviceNorms
from gradwatch.loop import arrivals
from gradwatch.loop.arrivals import Arrivals
from gradwatch.loop.step_in_progress import StepInProgress
from gradwatch.loop.step_log import StepLog
from gradwatch.loop.watched import LateClip
from gradwatch.nonfinite.forward_witness import DeviceWitness, ForwardReading, ForwardWitness
from gradwatch.nonfinite.suspects import Suspects
from gradwatch.telemetry import LoggedValue, NonfiniteStep, StepRecord


class ManualSlot:
    def __init__(self, values: list[float]) -> None:
        self._values = values
        self.done = False

    def arrived(self) -> bool:
        return self.done

    def values(self) -> list[float]:
        assert self.done
        return self._values


class ManualRing:
    slots: list[ManualSlot]
    full = False

    def __init__(self, _device: torch.device, _capacity: int) -> None:
        pass

    def send(self, parts: Any) -> ManualSlot | None:
        if ManualRing.full:
            return None
        ManualRing.slots.append(ManualSlot(torch.cat([p.reshape(-1).double() for p in parts]).tolist()))
        return ManualRing.slots[-1]

    def recycle(self, _slot: ManualSlot) -> None:
        pass


class Sink:
    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.values: list[LoggedValue] = []
        self.bad: list[NonfiniteStep] = []

    def open_log(self, optimizer: int, first_step: int) -> StepLog:
        return StepLog(optimizer, first_step)

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def logged(self, value: LoggedValue) -> None:
        self.values.append(value)

    def nonfinite(self, step: NonfiniteStep) -> None:
        self.bad.append(step)

    def missing(self, _step: int, _reason: str) -> None:
        raise AssertionError

    nonfinite_seen = False

    def wants_nonfinite_detail(self) -> bool:
        return True


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> Sink:
    ManualRing.slots, ManualRing.full = [], False
    monkeypatch.setattr(arrivals, "DeviceRing", ManualRing)
    return Sink()


def record(step: int, observed: bool = True) -> StepRecord:
    indices, norms, total = ((), [], 0.0) if observed else (None, None, None)
    return StepRecord(0, step, step, None, ("a", "b"), indices, norms, total, False, False)


def norms(*values: float) -> list[DeviceNorms]:
    return [DeviceNorms(tuple(range(len(values))), torch.tensor(values))]


def test_steps_leave_in_order_once_their_values_are_there(sink: Sink) -> None:
    waiting = Arrivals(sink, Suspects(sink, {}, (), ForwardWitness(StepInProgress())))
    first = waiting.send(norms(3.0, 4.0), [torch.tensor(1.5), torch.tensor(2.0)], {})
    waiting.hand_over(record(0), first)
    waiting.hand_over(record(1, observed=False), None)
    waiting.close_step()
    waiting.drain()
    assert sink.steps == []
    ManualRing.slots[0].done = True
    waiting.drain()
    assert [step.step for step in sink.steps] == [0, 1]
    done = sink.steps[0]
    assert (done.loss, done.indices, done.norms, done.gradient_norm) == (3.5, [0, 1], [3.0, 4.0], 5.0)
    assert sink.steps[1].gradient_norm is None
    assert not waiting


def test_a_scaled_step_is_unscaled_and_a_skipped_one_is_no_finding(sink: Sink) -> None:
    waiting = Arrivals(sink, Suspects(sink, {}, (), ForwardWitness(StepInProgress())))
    for step, (values, found) in enumerate([((6.0, 8.0), 0.0), ((math.inf, 8.0), 1.0)]):
        scaler = {
            "grad_scale": torch.tensor(2.0),
            "found_inf": torch.tensor(found),
            "loss_scale": torch.tensor(2.0),
            "local_norm": torch.tensor(20.0),
        }
        waiting.hand_over(record(step), waiting.send(norms(*values), [torch.tensor(1.0)], scaler))
        waiting.close_step()
    for slot in ManualRing.slots:
        slot.done = True
    waiting.drain()
    kept, skipped = sink.steps
    assert (kept.norms, kept.gradient_norm, kept.loss) == ([3.0, 4.0], 5.0, 1.0)
    assert (skipped.skipped, skipped.norms, skipped.gradient_norm, skipped.loss) == (True, None, None, 1.0)
    assert (kept.loss_scale, kept.local_norm, skipped.loss_scale, skipped.local_norm) == (2.0, 10.0, 2.0, None)
    assert sink.bad == []


@pytest.mark.parametrize("observed", [True, False])
def test_the_norm_that_a_device_clipped_by_arrives_with_the_ratio(sink: Sink, observed: bool) -> None:
    waiting = Arrivals(sink, Suspects(sink, {}, (), ForwardWitness(StepInProgress())))
    for step, (total, is_norm) in enumerate([(8.0, True), (8.0, False), (math.inf, True)]):
        sent = waiting.send(norms(3.0, 4.0) if observed else (), [], {"clip_total": torch.tensor(total)})
        assert sent is not None
        sent.clip = LateClip(torch.tensor(total), is_norm, max_norm=2.0)
        waiting.hand_over(record(step, observed), sent)
        waiting.close_step()
    for slot in ManualRing.slots:
        slot.done = True
    waiting.drain()
    assert [step.clip_ratio for step in sink.steps] == [pytest.approx(0.25), pytest.approx(0.25), None]
    assert [step.gradient_norm for step in sink.steps] == ([5.0] * 3 if observed else [8.0, None, None])


def test_a_late_nan_is_reported_with_its_own_step(sink: Sink) -> None:
    waiting = Arrivals(sink, Suspects(sink, {}, (), ForwardWitness(StepInProgress())))
    waiting.hand_over(record(7), waiting.send(norms(math.nan, 1.0), [torch.tensor(1.0)], {}))
    waiting.close_step()
    ManualRing.slots[0].done = True
    waiting.drain()
    (bad,) = sink.bad
    assert (bad.step, bad.layer, bad.born_in, bad.layers) == (7, None, None, 1)
    assert sink.steps[0].nonfinite


def test_a_full_ring_gives_values_up_rather_than_wait(sink: Sink) -> None:
    waiting = Arrivals(sink, Suspects(sink, {}, (), ForwardWitness(StepInProgress())))
    ManualRing.full = True
    assert waiting.send(norms(1.0), [], {}) is None
    waiting.send_logged("x", 1, torch.tensor(1.0))
    assert not waiting


def test_a_logged_tensor_keeps_the_time_it_was_logged_at(sink: Sink) -> None:
    waiting = Arrivals(sink, Suspects(sink, {}, (), ForwardWitness(StepInProgress())))
    waiting.send_logged("x", 42, torch.tensor(0.5))
    waiting.drain()
    assert sink.values == []
    ManualRing.slots[0].done = True
    waiting.drain()
    assert sink.values == [LoggedValue("x", 42, 0.5)]


@pytest.mark.parametrize(
    ("inputs", "output", "weight", "loss", "born_in"),
    [
        (1.0, 1.0, math.nan, math.nan, "parameters"),
        (math.nan, math.nan, 1.0, math.nan, "input"),
        (1.0, math.inf, 1.0, 2.0, "forward"),
        (1.0, 1.0, 1.0, math.inf, "loss"),
        (1.0, 1.0, 1.0, 2.0, "backward"),
    ],
)
def test_the_witnesses_of_a_device_arrive_with_its_gradients(
    sink: Sink, inputs: float, output: float, weight: float, loss: float, born_in: str
) -> None:
    waiting = Arrivals(sink, Suspects(sink, {}, (), ForwardWitness(StepInProgress())))
    on_device = (torch.tensor(inputs), torch.tensor(output))
    reading = ForwardReading(0, 3, 0, {(0,): ""}, {(): ""}, frozenset({1}), on_device=on_device)
    witness = DeviceWitness([reading], norms(1.0, weight), epoch=3, settled=True)
    scaler = {"grad_scale": torch.tensor(1.0), "found_inf": torch.tensor(0.0)}
    waiting.hand_over(record(7), waiting.send(norms(1.0, math.nan), [torch.tensor(loss)], scaler, witness))
    waiting.close_step()
    ManualRing.slots[0].done = True
    waiting.drain()
    (bad,) = sink.bad
    assert (bad.step, bad.born_in) == (7, born_in)
    assert bad.layer == ("b" if born_in == "parameters" else None)


@pytest.mark.parametrize(
    ("output", "weight", "born_in"),
    [
        (math.inf, math.inf, "backward"),
        # A NaN among the infinities makes the norm NaN, and was not there before.
        (math.nan, math.inf, "forward"),
        (math.inf, math.nan, "parameters"),
    ],
)
def test_infinities_that_good_steps_have_too_are_no_evidence_and_hide_no_nan(
    sink: Sink, output: float, weight: float, born_in: str
) -> None:
    progress = StepInProgress()
    waiting = Arrivals(sink, Suspects(sink, {}, (), ForwardWitness(progress)))
    for step, (out, held, gradient) in enumerate([(math.inf, math.inf, 1.0), (output, weight, math.nan)]):
        progress.passes = step + 1
        on_device = (torch.tensor(1.0), torch.tensor(out))
        reading = ForwardReading(
            0, step, step, {(0,): ""}, {(): ""}, frozenset({1}), on_device=on_device
        )  # fmt: skip
        witness = DeviceWitness([reading], norms(1.0, held), epoch=step, settled=True)
        waiting.hand_over(record(step), waiting.send(norms(1.0, gradient), [torch.tensor(1.0)], {}, witness))
        waiting.close_step()
        ManualRing.slots[-1].done = True
        waiting.drain()
    (bad,) = sink.bad
    assert (bad.step, bad.born_in) == (1, born_in)
