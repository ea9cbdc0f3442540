"""Faults planted in five kinds of networks: the step, the phase and the layer they are blamed on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch import conventions
from gradwatch.testing import InMemoryExporter
from tests.unit.agent.planted import Fault, Task, actor_critic, faults, gan, gpt, half_precision, lstm

FAULTS = tuple(faults())
STEPS, BAD_STEP = 7, 4
NO_EVENT = "no event"


@dataclass(frozen=True)
class Outcome:
    fault: Fault
    step: Any
    born_in: Any
    layer: Any

    @property
    def is_exact(self) -> bool:
        return self.has_step and self.born_in == self.fault.born_in and self.has_layer

    @property
    def has_step(self) -> bool:
        return self.step == BAD_STEP + self.fault.steps_late

    @property
    def has_layer(self) -> bool:
        expected = self.fault.layer
        if self.fault.born_in == "backward" and expected is not None:
            return str(self.layer).rpartition(".")[0] == expected
        return self.layer == expected

    @property
    def is_wrong(self) -> bool:
        """Whether anything it says is untrue: null is not, nor is a module that holds the guilty one."""
        if self.born_in is None:
            return False
        holds = str(self.fault.layer).startswith(f"{self.layer}.")
        return (
            self.born_in != self.fault.born_in
            or not self.has_step
            or not (self.layer is None or self.has_layer or holds)
        )

    def __str__(self) -> str:
        mark = "ok   " if self.is_exact else "WRONG" if self.is_wrong else "null "
        truth = f"{self.fault.born_in}/{self.fault.layer}"
        return f"{mark} {self.fault!s:60} {truth:36} said {self.step}: {self.born_in}/{self.layer}"


def plain(task: Task) -> None:
    pass


def outcome(fault: Fault, prepare: Callable[[Task], None] = plain, **settings: Any) -> Outcome:
    torch.manual_seed(0)
    task = fault.build()
    prepare(task)
    exporter = InMemoryExporter()
    models = task.models if len(task.models) > 1 else task.model
    with gradwatch.watch(models, task.optimizers, exporter=exporter, **settings):
        for step in range(STEPS):
            undo = fault.plant(task) if step == BAD_STEP else None
            task.iterate(task, step)
            if undo is not None:
                undo()
    events = exporter.find_events(conventions.NONFINITE_STEP.name)
    if not events:
        return Outcome(fault, None, NO_EVENT, None)
    told = min(events, key=lambda event: (event.attributes[conventions.STEP], event.time)).attributes
    return Outcome(
        fault, told[conventions.STEP], told.get(conventions.BORN_IN), told.get(conventions.LAYER_NAME)
    )


def table(outcomes: list[Outcome]) -> str:
    exact = sum(one.is_exact for one in outcomes)
    return "\n".join([f"{exact} of {len(outcomes)} exact", *(str(one) for one in outcomes if not one.is_exact)])


def with_clipping(task: Task) -> None:
    task.clip = 0.1


def with_accumulation(task: Task) -> None:
    task.accumulate = 3


def with_scaler(task: Task) -> None:
    task.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)


def with_adam(task: Task) -> None:
    task.optimizers[:] = [
        torch.optim.Adam(optimizer.param_groups[0]["params"], lr=1e-3) for optimizer in task.optimizers
    ]


def suits(fault: Fault, prepare: Callable[[Task], None]) -> bool:
    # In float16 Adam's epsilon is zero, which is a fault of its own.
    return not (prepare is with_adam and fault.task is half_precision)


@pytest.mark.parametrize("prepare", [plain, with_clipping, with_accumulation, with_adam])
def test_on_observed_steps_nearly_every_birthplace_is_exact_and_none_is_wrong(
    prepare: Callable[[Task], None],
) -> None:
    outcomes = [outcome(fault, prepare, every=1) for fault in FAULTS if suits(fault, prepare)]
    assert len(outcomes) >= 40
    assert not any(one.is_wrong for one in outcomes), table(outcomes)
    assert sum(one.is_exact for one in outcomes) >= 0.95 * len(outcomes), table(outcomes)


@pytest.mark.parametrize("prepare", [plain, with_clipping, with_accumulation, with_adam])
def test_on_steps_that_are_not_observed_nothing_untrue_is_said(prepare: Callable[[Task], None]) -> None:
    # Steps 0, 3 and 6 are observed.
    outcomes = [outcome(fault, prepare, every=3) for fault in FAULTS if suits(fault, prepare)]
    assert not any(one.is_wrong for one in outcomes), table(outcomes)
    told = [one for one in outcomes if one.born_in in conventions.BIRTHPLACES]
    assert len(told) >= 0.3 * len(outcomes), table(outcomes)


def test_by_default_nothing_untrue_is_said() -> None:
    outcomes = [outcome(fault) for fault in FAULTS]
    assert not any(one.is_wrong for one in outcomes), table(outcomes)


def test_a_scaler_skips_what_backward_did_and_not_what_the_loss_was() -> None:
    faults = [fault for fault in FAULTS if fault.task not in (half_precision, actor_critic, gan)]
    outcomes = [outcome(fault, with_scaler, every=1) for fault in faults]
    skipped = [one for one in outcomes if one.fault.born_in == "backward"]
    assert all(one.born_in == NO_EVENT for one in skipped), table(skipped)
    # Behind a finite loss, a skipped step is taken for the scaler's own overflow.
    others = [one for one in outcomes if one not in skipped and one.born_in != NO_EVENT]
    assert len(others) >= 40
    assert not any(one.is_wrong for one in others), table(others)
    assert sum(one.is_exact for one in others) >= 0.95 * len(others), table(others)


def test_an_epsilon_that_is_zero_in_half_precision_is_the_optimizers_fault() -> None:
    def unused_weight(task: Task) -> None:
        with_adam(task)
        task.net(None).fc1.weight.register_hook(torch.zeros_like)

    healthy = Fault("", half_precision, lambda task: None, "optimizer", "fc1.weight")
    told = outcome(healthy, unused_weight, every=1)
    assert (told.step, told.born_in) == (0, "optimizer")


def _rank_main(rank: int, store: str, answers: Any) -> None:
    os.environ["GRADWATCH_TESTING"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    chosen = [fault for fault in FAULTS if fault.task in (gpt, lstm)]
    told = []
    for fault in chosen:
        # Only the second rank's data is bad; what is planted in the code is planted on both.
        healthy = fault.born_in == "input" and rank == 0
        one = replace(fault, plant=lambda task: None) if healthy else fault
        told.append(outcome(one, with_ddp, every=1))
    answers.put((rank, [(one.step, one.born_in, one.layer) for one in told]))
    answers.close()
    answers.join_thread()
    torch.distributed.destroy_process_group()


def with_ddp(task: Task) -> None:
    task.wrapped = torch.nn.parallel.DistributedDataParallel(task.net(None))


def test_under_ddp_every_rank_tells_the_truth_about_itself(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=_rank_main, args=(rank, str(tmp_path / "store"), answers)) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    told = dict(answers.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    chosen = [fault for fault in FAULTS if fault.task in (gpt, lstm)]
    assert len(chosen) >= 20
    for rank in told:
        outcomes = [Outcome(fault, *said) for fault, said in zip(chosen, told[rank], strict=True)]
        # A mean gradient does not tell which rank's it was, so a fault of backward has no birthplace there.
        local = [one for one in outcomes if one.fault.born_in not in ("backward", "input")]
        assert not any(one.is_wrong for one in outcomes), table(outcomes)
        assert sum(one.is_exact for one in local) >= 0.95 * len(local), table(outcomes)
    by_fault = zip(chosen, told[0], told[1], strict=True)
    assert [(good[1], bad[1]) for fault, good, bad in by_fault if fault.born_in == "input"] == [
        (None, "input")
    ] * sum(fault.born_in == "input" for fault in chosen)
