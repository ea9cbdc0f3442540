"""The hook on a watched model: there while a step is observed, and nothing in a copy, a pickle or a child."""

from __future__ import annotations

import copy
import io
import math
import multiprocessing as mp
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch import conventions as names
from gradwatch.nonfinite.forward_plan import Map, PlanRecorder, common_path, site
from gradwatch.nonfinite.graph_walk import suspects_behind
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., gradwatch.Watch]


@dataclass
class Output:
    logits: torch.Tensor
    extra: dict[str, list[torch.Tensor]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.bad_output = False

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor | None = None) -> Output:
        y = self.last(torch.relu(self.first(x)))
        return Output(y if scale is None else y * scale, {"deep": [y * (math.nan if self.bad_output else 1.0)]})


def train(model: Any, optimizer: Any, steps: int = 3, each: Callable[[int], Any] = lambda step: None) -> None:
    for step in range(steps):
        each(step)
        optimizer.zero_grad()
        model(torch.randn(5, 4)).logits.square().mean().backward()
        optimizer.step()


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_hook_is_on_observed_steps_only_and_gone_after_close(watching: Watching) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen: list[int] = []
    with watching(model, optimizer, every=3, inputs=False):
        train(model, optimizer, 7, lambda step: seen.append(min(hooks(model), 1)))
    assert seen == [1, 0, 0, 1, 0, 0, 1]
    assert hooks(model) == 0


def test_watching_puts_one_hook_on_the_outermost_module_once_its_plan_is_learned(watching: Watching) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(model, optimizer):
        train(model, optimizer)
        assert hooks(model.first) == hooks(model.last) == 0
        assert len(model._forward_hooks) == 1


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_watched_model_runs_and_reports_nothing(
    watching: Watching, exporter: InMemoryExporter, way: str
) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(model, optimizer):
        train(model, optimizer, 1)
        if way == "deepcopy":
            copied = copy.deepcopy(model)
        elif way == "pickle":
            copied = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            copied = torch.load(buffer, weights_only=False)
        copied.bad_output = True
        copied(torch.randn(2, 4))
        train(model, optimizer, 2)
    assert torch.equal(copied(torch.ones(1, 4)).logits, copied(torch.ones(1, 4)).logits)
    assert exporter.find_events(names.NONFINITE_STEP.name) == []


def test_a_saved_model_loads_where_gradwatch_is_not_installed(watching: Watching, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(model, optimizer):
        torch.save(model, tmp_path / "model.pt")
    load = (
        "import sys; sys.modules['gradwatch'] = None; import torch; "
        "print(torch.load(sys.argv[1], weights_only=False)(torch.ones(1, 2)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", load, str(tmp_path / "model.pt")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "torch.Size([1, 1])", done.stderr


def _forward_in_child(model: nn.Module, answers: Any) -> None:
    model(torch.ones(1, 4))
    answers.put(hooks(model))


def test_a_forked_child_has_no_hooks(watching: Watching) -> None:
    torch.set_num_threads(1)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    context = mp.get_context("fork")
    answers = context.Queue()
    with watching(model, optimizer):
        child = context.Process(target=_forward_in_child, args=(model, answers))
        child.start()
        assert answers.get(timeout=30) == 0
        child.join(30)


def test_inputs_by_keyword_and_outputs_in_a_dataclass_are_seen(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(model, optimizer):
        train(model, optimizer, 1)
        optimizer.zero_grad()
        model(torch.randn(5, 4), scale=torch.tensor(math.inf)).logits.mean().backward()
        optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.BORN_IN] == "input"


class Masking(nn.Module):
    """Takes a mask or a bias, and forbids some of its outputs, where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        *,
        forbid: bool = False,
        divide_by: float = 1.0,
    ) -> torch.Tensor:
        y = self.last(torch.relu(self.first(x)) / divide_by)
        y = y if mask is None else (y + mask).softmax(-1)
        y = y if bias is None else y + bias
        return y.masked_fill(torch.tensor([False, False, True]), -math.inf) if forbid else y


def last_birthplace(watching: Watching, exporter: InMemoryExporter, calls: list[dict[str, Any]]) -> Any:
    """Train one step for each of these calls; what is said of the last, the only bad one."""
    model = Masking()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(model, optimizer, every=1):
        for call in calls:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(
                model(torch.randn(5, 4), **call), torch.zeros(5).long()
            ).backward()
            optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert event.attributes[names.STEP] == len(calls) - 1
    return event.attributes.get(names.BORN_IN)


MASK = torch.tensor([0.0, 0.0, -math.inf])
NAN = torch.tensor([0.0, math.nan, 0.0])


@pytest.mark.parametrize(
    "calls",
    [
        [{"forbid": True}] * 4 + [{"forbid": True, "divide_by": 0.0}],
        [{}, {"forbid": True}, {}, {"divide_by": 0.0}],  # once is enough for a habit, and no pardon for this
        [{"mask": MASK}] * 3 + [{"mask": MASK, "divide_by": 0.0}],
    ],
)
def test_outputs_that_are_masked_do_not_hide_a_nan_of_the_forward_pass(
    watching: Watching, exporter: InMemoryExporter, calls: list[dict[str, Any]]
) -> None:
    assert last_birthplace(watching, exporter, calls) == "forward"


@pytest.mark.parametrize("bad", [{"mask": MASK + NAN}, {"bias": NAN}])
def test_a_mask_does_not_hide_a_nan_in_the_same_input_or_in_another(
    watching: Watching, exporter: InMemoryExporter, bad: dict[str, Any]
) -> None:
    assert last_birthplace(watching, exporter, [{"mask": MASK}] * 3 + [bad]) == "input"


def test_a_batch_that_was_looked_at_and_thrown_away_accuses_nobody(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with watching(model, optimizer):
        train(model, optimizer, 1)
        model(torch.full((5, 4), math.nan))  # the loop sees it, and goes on to the next batch
        optimizer.zero_grad()
        output = model(torch.randn(5, 4)).logits
        output.register_hook(lambda grad: grad * math.nan)
        output.mean().backward()
        optimizer.step()
    (event,) = exporter.find_events(names.NONFINITE_STEP.name)
    assert names.BORN_IN not in event.attributes


def test_evaluation_without_gradients_accuses_nobody(watching: Watching, exporter: InMemoryExporter) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def evaluate(_step: int) -> None:
        with torch.no_grad():
            model(torch.full((5, 4), math.nan))

    with watching(model, optimizer):
        train(model, optimizer, 4, evaluate)
    assert exporter.find_events(names.NONFINITE_STEP.name) == []


def test_the_model_compiles_into_one_graph_with_the_hook_on(watching: Watching) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(model, optimizer):
        compiled = torch.compile(lambda x: model(x), backend="eager", fullgraph=True)
        for _ in range(3):
            optimizer.zero_grad()
            compiled(torch.randn(5, 4)).square().mean().backward()
            optimizer.step()


def test_a_checkpointed_forward_is_never_run_again_by_us() -> None:
    layer, runs = nn.Linear(3, 3), []

    def block(x: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return layer(x).log()

    loss = checkpoint(block, -torch.ones(2, 3), use_reentrant=False).sum() * math.nan
    graph = suspects_behind(loss)
    assert graph.operations
    assert len(runs) == 1


def test_the_graph_is_not_kept_alive() -> None:
    layer = nn.Linear(3, 3)
    freed: list[str] = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.note = Note()
            return x * math.inf

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    class Note:
        def __del__(self) -> None:
            freed.append("graph")

    loss = Noted.apply(layer(torch.ones(2, 3))).sum()
    graph = suspects_behind(loss)
    del loss
    assert freed == ["graph"]
    assert [operation.name for operation in graph.suspects] == ["NotedBackward"]


def test_a_plan_names_modules_without_parameters_and_tells_the_loss_apart() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 2), nn.Softplus())
    recorder = PlanRecorder(model)
    inputs = torch.randn(3, 4)
    plan = recorder.plan([inputs], [model(inputs)])
    assert hooks(model) == 0
    modules = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}
    told = Map(modules, plan)
    output = model(torch.full((3, 4), 1e38) * 1e-38)
    assert site(suspects_behind(torch.log(output * 0).sum()), [told]).phase == "loss"
    with torch.no_grad():
        model[2].weight.fill_(3e38)
    place = site(suspects_behind(model(torch.ones(3, 4) * 1e3).sum()), [told])
    assert (place.phase, place.module) == ("forward", "2")


@given(st.lists(st.lists(st.sampled_from("ab"), max_size=4), min_size=1, max_size=4))
def test_the_common_path_holds_all_and_no_longer_one_does(paths: list[list[str]]) -> None:
    found = common_path([".".join(path) for path in paths])
    length = 0
    while all(len(path) > length and path[length] == paths[0][length] for path in paths):
        length += 1
    assert found == (".".join(paths[0][:length]) or None)
