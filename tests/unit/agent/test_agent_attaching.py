"""Training that nobody watches is found, and watched as if its script had asked for it."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import conventions as names
from gradwatch import current_run as runs
from gradwatch import training_run
from gradwatch.supervisor.attaching import Attachment
from gradwatch.supervisor.launch import ATTACH_FOLDER
from gradwatch.supervisor.trained_models import are_apart, trained_models
from gradwatch.testing import InMemoryExporter
from tests.unit.agent import training_loops as loops


class Net(nn.Module):
    """A body, and a head whose weight is the embedding's."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 8, bias=False)
        if tied:
            self.head.weight = self.body[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.body(x))
        return out


class Box(nn.Module):
    """Holds modules."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def sgd(*modules: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1)


def test_a_model_is_found_by_what_it_trains() -> None:
    model, bystander = Net(), Net()
    assert trained_models([sgd(model)]) == [model]
    del bystander


def test_a_model_all_of_whose_parameters_are_in_one_part_is_found_as_a_whole() -> None:
    model = Net(tied=True)
    model.body.register_parameter("bias", nn.Parameter(torch.zeros(1)))
    assert set(map(id, model.parameters())) == set(map(id, model.body.parameters()))
    assert trained_models([sgd(model)]) == [model]


def test_what_else_a_container_holds_is_left_out() -> None:
    student, teacher = Net(), Net()
    both = Box(student=student, teacher=teacher)
    assert trained_models([sgd(student)]) == [student]
    assert trained_models([sgd(student), sgd(teacher)]) == [both]


def test_models_of_their_own_are_found_each() -> None:
    generator, critic = Net(), Net()
    found = trained_models([sgd(generator), sgd(critic)])
    assert set(found) == {generator, critic}
    assert set(trained_models([sgd(generator, critic)])) == {generator, critic}


def test_wrappers_are_found_around_their_model() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    assert trained_models([sgd(model)]) == [compiled]
    parallel = nn.DataParallel(Net())
    assert trained_models([sgd(parallel)]) == [parallel]


def test_a_model_that_two_containers_share_is_found_once() -> None:
    model = Net()
    boxes = Box(model=model, other=Net()), Box(model=model, third=Net())
    assert trained_models([sgd(model)]) == [model]
    del boxes


def test_the_trained_part_of_a_frozen_model_is_found() -> None:
    model = Net()
    assert trained_models([sgd(model.head)]) == [model.head]


def test_proxies_are_not_asked_what_they_stand_for() -> None:
    class Proxy:
        @property
        def __class__(self) -> Any:
            raise AssertionError("asked")

    proxies = [Proxy()]
    gc.collect()
    model = Net()
    assert trained_models([sgd(model)]) == [model]
    del proxies


def test_optimizers_of_the_same_parameters_are_not_apart() -> None:
    first, second = Net(), Net()
    assert are_apart([sgd(first), sgd(second)])
    assert not are_apart([sgd(first), sgd(first, second)])


# --- Attaching -------------------------------------------------------------------------------------------


@pytest.fixture
def attachment(exporter: InMemoryExporter, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attachment]:
    """Told of each optimizer that is made, in a process where nobody watches yet."""
    monkeypatch.setenv("GRADWATCH_EVERY", "1")
    monkeypatch.setattr(training_run, "otlp_exporter", lambda *_: exporter)
    made = Attachment(lambda: False)
    original, backward = torch.optim.Optimizer.__init__, torch.autograd.backward

    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.optimizer_made(self)

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", initialize)
    yield made
    torch.autograd.backward = backward


def finish() -> None:
    run = runs.current()
    assert run is not None
    for watch in list(run.watches):
        watch.close()


@contextlib.contextmanager
def unwatched(*_objects: Any, **_settings: Any) -> Iterator[None]:
    yield
    finish()


def seen(exporter: InMemoryExporter) -> tuple[Any, ...]:
    """Steps and losses by optimizer, and how often each layer was observed."""
    layers: Counter[Any] = Counter()
    for point in exporter.histograms(names.LAYER_GRADIENT_NORM):
        layers[point.attributes.get(names.OPTIMIZER), point.attributes[names.LAYER_NAME]] += point.total
    return exporter.values(names.STEP_INDEX), exporter.values(names.LOSS), layers


ALIKE = [
    loops.plain,
    loops.accumulated_and_clipped,
    loops.scaled_and_clipped,
    loops.scaled_fused_and_skipped,
    loops.stepping_in_backward,
    loops.accelerated,
    loops.eight_bit,
    loops.groups_and_a_schedule,
    loops.averaged_weights,
    loops.low_rank_adapter,
    loops.checkpointed_reentrant,
    loops.compiled,
    loops.compiled_step,
    loops.compiled_optimizer,
]


# Dynamo imports what torch deprecates, and asks intermediate results for gradients.
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning", "ignore:The .grad attribute")
@pytest.mark.parametrize("training", ALIKE, ids=lambda loop: loop.__name__)
def test_attached_it_is_as_if_the_script_watched(
    training: loops.Loop,
    watching: Callable[..., gradwatch.Watch],
    exporter: InMemoryExporter,
    attachment: Attachment,
) -> None:
    training(unwatched, loops.Truth())
    attached = seen(exporter)
    exporter.metrics.clear()
    torch.manual_seed(0)
    attachment._is_busy = True
    training(watching, loops.Truth())
    assert attached == seen(exporter)
    assert len(attached[0]) >= 4


@pytest.mark.parametrize("training", [loops.lbfgs, loops.first_order_closure], ids=lambda loop: loop.__name__)
def test_of_closures_the_gradients_of_the_first_step_are_missed(
    training: loops.Loop, exporter: InMemoryExporter, attachment: Attachment
) -> None:
    training(unwatched, loops.Truth())
    indices, losses, layers = seen(exporter)
    assert indices == list(range(loops.STEPS))
    assert len(losses) == loops.STEPS
    assert set(layers.values()) == {loops.STEPS - 1}


def test_models_of_their_own_are_watched_by_their_classes(
    exporter: InMemoryExporter, attachment: Attachment
) -> None:
    loops.actor_critic(unwatched, loops.Truth())
    indices, _, layers = seen(exporter)
    assert indices == list(range(loops.STEPS))
    assert {name.split(".")[0] for _, name in layers} == {"Sequential", "Linear"}


def test_a_loop_without_backward_is_watched_from_its_first_step_on(
    exporter: InMemoryExporter, attachment: Attachment
) -> None:
    model = Net()
    optimizer = sgd(model)
    for _ in range(4):
        loss = model(torch.arange(8)).square().mean()
        for parameter, grad in zip(
            model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            parameter.grad = grad
        optimizer.step()
    finish()
    assert len(seen(exporter)[0]) in {3, 4}


def test_an_optimizer_around_another_counts_its_steps_once(
    exporter: InMemoryExporter, attachment: Attachment
) -> None:
    class Around(torch.optim.Optimizer):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            super().__init__(parameters, {})
            self.within = torch.optim.SGD(parameters, lr=0.1)

        def step(self, closure: Any = None) -> None:
            self.within.step()

    model = Net()
    optimizer = Around(list(model.parameters()))
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.arange(8)).square().mean().backward()
        optimizer.step()
    finish()
    assert seen(exporter)[0] == [0, 1, 2, 3]


def test_an_optimizer_that_comes_later_is_watched_too(
    exporter: InMemoryExporter, attachment: Attachment
) -> None:
    model = Net()
    first = sgd(model.body)
    second = None
    for step in range(4):
        model.zero_grad()
        model(torch.arange(8)).square().mean().backward()
        first.step()
        if second is not None:
            second.step()
        if step == 1:
            second = sgd(model.head)
    finish()
    layers = {name for _, name in seen(exporter)[2]}
    assert any("head" in name or name.startswith("Linear") for name in layers)
    assert exporter.event_names() == [names.RUN_STARTED.name, names.RUN_ENDED.name]


def test_a_script_that_watches_is_left_to_itself(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter
) -> None:
    attachment = Attachment(lambda: True)
    before = torch.autograd.backward
    optimizer = sgd(Net())
    attachment.optimizer_made(optimizer)
    assert torch.autograd.backward is before
    assert not optimizer._optimizer_step_post_hooks


def test_what_fails_in_attaching_does_not_reach_training(
    attachment: Attachment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GRADWATCH_TESTING", "0")
    monkeypatch.setenv("GRADWATCH_TIER", "no such tier")
    loops.plain(lambda *_: contextlib.nullcontext(), loops.Truth())
    assert runs.current() is None
    assert caplog.text.count("training is not affected") == 1


# --- sitecustomize ---------------------------------------------------------------------------------------


def python(code: str, *path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(map(str, (ATTACH_FOLDER, *path)))},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout + done.stderr


def test_a_python_that_never_imports_torch_imports_nothing_of_ours(tmp_path: Path) -> None:
    code = """
    import sys
    print([name for name in sys.modules if name.startswith("gradwatch")], "typing" in sys.modules)
    print([path for path in sys.path if path.endswith("attach")])
    """
    bare = python("import sys; print('typing' in sys.modules)", tmp_path).splitlines()[-1]
    assert python(code).splitlines() == [f"[] {bare}", "[]"]


def test_another_sitecustomize_runs_as_ever(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nos.environ['THEIRS'] = __file__\n")
    code = "import os, sitecustomize; print(os.environ['THEIRS'], sitecustomize.__file__)"
    theirs = str(tmp_path / "sitecustomize.py")
    assert python(code, tmp_path).split() == [theirs, theirs]


def test_where_gradwatch_is_not_installed_one_line_says_so(tmp_path: Path) -> None:
    package = tmp_path / "torch" / "optim"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    (package / "optimizer.py").write_text("class Optimizer:\n    def __init__(self): self.made = True\n")
    (tmp_path / "gradwatch").mkdir()
    (tmp_path / "gradwatch" / "__init__.py").touch()
    code = """
    from torch.optim.optimizer import Optimizer
    print(Optimizer().made, Optimizer().made, Optimizer.__init__.__qualname__)
    """
    printed, *said = python(code, tmp_path).splitlines()
    assert printed == "True True Optimizer.__init__"
    assert len(said) == 1
    assert said[0].startswith("gradwatch: training is not watched: ModuleNotFoundError")
