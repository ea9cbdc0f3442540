"""Faults planted in five kinds of networks: the step, the phase and the layer they are blamed on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch import conventions
from gradwatch import current_run as runs
from gradwatch.life import black_box
from gradwatch.telemetry import Attributes
from gradwatch.testing import InMemoryExporter
from tests.unit.agent.planted import (
    Fault,
    Task,
    actor_critic,
    conv,
    faults,
    gan,
    gpt,
    half_precision,
    lstm,
    masked_actor,
    regression,
)
from tests.unit.agent.ranks import RANKS, prepare_ranks, run_ranks

FAULTS = tuple(faults())
UNDER_DDP = tuple(fault for fault in FAULTS if fault.task in (gpt, lstm))
# The step in which it is planted: after a single good one, and well into a run, where nothing else is special.
EARLY, LATE = 1, 4
NO_EVENT = "no event"


@pytest.fixture(scope="module", autouse=True)
def ranks_are_prepared() -> None:
    prepare_ranks()


@pytest.fixture(autouse=True)
def no_black_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of nine hundred runs, which nobody reads."""
    monkeypatch.setattr(black_box, "keep", lambda *_: None)


@dataclass(frozen=True)
class Outcome:
    fault: Fault
    bad_step: int
    step: Any
    born_in: Any
    layer: Any

    @property
    def is_exact(self) -> bool:
        return self.has_step and self.born_in == self.fault.born_in and self.has_layer

    @property
    def has_step(self) -> bool:
        return self.step == self.bad_step + self.fault.steps_late

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


def outcome(fault: Fault, prepare: Callable[[Task], None] = plain, every: int | None = None) -> Outcome:
    torch.default_generator.manual_seed(0)  # 2 ms faster than seeding devices that are not used
    task = fault.build()
    prepare(task)
    exporter = InMemoryExporter()
    models = task.models if len(task.models) > 1 else task.model
    bad_step = LATE if prepare is plain else EARLY
    # A fault of the optimizer shows in the next step. Where every third is observed, that is the one after.
    last = bad_step + (1 if every == 1 else 2)
    with gradwatch.watch(models, task.optimizers, exporter=exporter, every=every):
        for step in range(last + 1):
            undo = fault.plant(task) if step == bad_step else None
            task.iterate(task, step)
            if undo is not None:
                undo()
            run = runs.current()
            if run is not None and run.nonfinite_seen:
                break  # what it says first is what counts
    events = exporter.find_events(conventions.NONFINITE_STEP.name)
    if not events:
        return Outcome(fault, bad_step, None, NO_EVENT, None)
    told = min((event.attributes for event in events), key=last_step_of)
    return Outcome(
        fault,
        bad_step,
        told.get(conventions.STEP),
        told.get(conventions.BORN_IN),
        told.get(conventions.LAYER_NAME),
    )


def last_step_of(told: Attributes) -> Any:
    """The step of an event, or the last that it may have been."""
    return told.get(conventions.STEP, told.get(conventions.NONFINITE_LATEST))


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
    # Steps 0, 3 and 6 are observed, one of them two steps after the bad one.
    outcomes = [outcome(fault, prepare, every=3) for fault in FAULTS if suits(fault, prepare)]
    assert not any(one.is_wrong for one in outcomes), table(outcomes)
    told = [one for one in outcomes if one.born_in in conventions.BIRTHPLACES]
    assert len(told) >= 0.3 * len(outcomes), table(outcomes)
    # Where one model runs once a step, nothing else can have made its input.
    spoiled = [one for one in outcomes if one.fault.task in (conv, lstm, regression)]
    told = [one for one in spoiled if one.fault.name == "nan in the input"]
    assert len(told) == 3
    assert all(one.is_exact for one in told), table(told)
    if prepare is with_adam:  # which remembers what the gradients were
        told = [one for one in spoiled if one.fault.name.startswith("bad function")]
        # Of the recurrent network only some outputs are taken, which may hide others.
        assert [one.fault.task for one in told if one.is_exact] == [conv], table(told)


def test_by_default_nothing_untrue_is_said() -> None:
    outcomes = [outcome(fault) for fault in FAULTS]
    assert not any(one.is_wrong for one in outcomes), table(outcomes)


def test_a_scaler_skips_what_backward_did_and_not_what_the_loss_was() -> None:
    faults = [fault for fault in FAULTS if fault.task not in (half_precision, actor_critic, masked_actor, gan)]
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


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    told = []
    for fault in UNDER_DDP:
        # Only the second rank's data is bad; what is planted in the code is planted on both.
        healthy = fault.born_in == "input" and rank == 0
        told.append(outcome(replace(fault, plant=lambda task: None) if healthy else fault, with_ddp, every=1))
    Path(folder, f"{rank}.json").write_text(json.dumps([(one.step, one.born_in, one.layer) for one in told]))
    torch.distributed.destroy_process_group()


def with_ddp(task: Task) -> None:
    task.wrapped = torch.nn.parallel.DistributedDataParallel(task.net(None))


def test_under_ddp_every_rank_tells_the_truth_about_itself(tmp_path: Path) -> None:
    assert len(UNDER_DDP) >= 20
    run_ranks(rank_main, str(tmp_path))
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    for said in told:
        outcomes = [Outcome(fault, EARLY, *one) for fault, one in zip(UNDER_DDP, said, strict=True)]
        # A mean gradient does not tell which rank's it was, so a fault of backward has no birthplace there.
        local = [one for one in outcomes if one.fault.born_in not in ("backward", "input")]
        assert not any(one.is_wrong for one in outcomes), table(outcomes)
        assert sum(one.is_exact for one in local) >= 0.95 * len(local), table(outcomes)
    by_fault = zip(UNDER_DDP, *told, strict=True)
    assert [(good[1], bad[1]) for fault, good, bad in by_fault if fault.born_in == "input"] == [
        (None, "input")
    ] * sum(fault.born_in == "input" for fault in UNDER_DDP)
