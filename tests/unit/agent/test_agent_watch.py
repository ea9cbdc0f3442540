"""What a user meets: log, target, closing, copying, forking, several watches."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad
from torch.optim import optimizer as torch_optimizer
from torch.utils.data import DataLoader, Dataset

import gradwatch
from gradwatch import conventions as names
from gradwatch import safety
from gradwatch.export.otlp_values import key_values
from gradwatch.loop.observer import StepObserver
from gradwatch.telemetry import Attributes, Event, MetricPoints
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., Any]


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    loss = model(torch.randn(5, 4)).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def patched() -> dict[str, Any]:
    """Everything the agent replaces, and what it registers."""
    return {
        "backward": torch.autograd.backward,
        "scale": GradScaler.scale,
        "scaler's step": GradScaler.step,
        "clipping": clip_grad._get_total_norm,
        "total norm": torch.nn.utils.get_total_norm,
        "excepthook": sys.excepthook,
        "exit": sys.exit,
        "SIGTERM": signal.getsignal(signal.SIGTERM),
        "pre-hooks": dict(torch_optimizer._global_optimizer_pre_hooks),
        "post-hooks": dict(torch_optimizer._global_optimizer_post_hooks),
        "threads": set(own_threads()),
    }


def own_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name in {"gradwatch-export", "gradwatch-sigterm"}]


@pytest.fixture
def nothing_left() -> None:
    """What other tests of this process may have left behind, in a server of theirs, is gone."""
    for thread in own_threads():
        thread.join(10)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.usefixtures("nothing_left")
def test_close_leaves_nothing_behind(watching: Watching) -> None:
    before = patched()
    model, optimizer = make()
    keys = set(model.__dict__), set(optimizer.__dict__)
    watch = watching(model, optimizer)
    during = patched()
    assert [what for what, was in before.items() if during[what] == was] == []
    step(model, optimizer)
    watch.close()
    watch.close()
    watch.log(val_loss=1.0)
    assert patched() == before
    assert signal.set_wakeup_fd(-1) == -1
    assert (set(model.__dict__), set(optimizer.__dict__)) == keys
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_an_existing_wakeup_descriptor_still_hears_signals(watching: Watching) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    received: list[int] = []
    previous = signal.signal(signal.SIGUSR1, lambda number, _frame: received.append(number))
    signal.set_wakeup_fd(writer)
    try:
        with watching(*make()):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert os.read(reader, 1) == bytes([signal.SIGUSR1])
        assert received == [signal.SIGUSR1]
        assert signal.set_wakeup_fd(-1) == writer
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGUSR1, previous)
        os.close(reader)
        os.close(writer)


def test_attaching_twice_is_attaching_once(watching: Watching, exporter: InMemoryExporter) -> None:
    model, optimizer = make()
    with watching(model, optimizer):
        watching(model, optimizer)
        step(model, optimizer)
    assert exporter.values(names.STEP_INDEX) == [0]
    assert {p.attributes[names.LAYER_NAME] for p in exporter.histograms(names.LAYER_GRADIENT_NORM)} == {
        "weight",
        "bias",
    }
    assert exporter.event_names() == ["training.run.started", "training.run.ended"]


def test_watches_of_one_process_share_the_run(watching: Watching, exporter: InMemoryExporter) -> None:
    model, optimizer = make()
    other, other_optimizer = make()
    first = watching(model, optimizer)
    second = watching(other, other_optimizer, model_name="Other")
    assert first.run_id == second.run_id
    step(model, optimizer)
    step(other, other_optimizer)
    second.close()
    step(model, optimizer)
    first.close()
    layers = {p.attributes[names.LAYER_NAME] for p in exporter.histograms(names.LAYER_GRADIENT_NORM)}
    assert layers == {"Linear.weight", "Linear.bias", "Other.weight", "Other.bias"}
    assert exporter.values(names.STEP_INDEX) == [0, 1]
    assert exporter.event_names() == ["training.run.started", "training.run.ended"]


def test_closing_and_watching_again_is_another_run(watching: Watching, exporter: InMemoryExporter) -> None:
    model, optimizer = make()
    ids = set()
    for _ in range(2):
        with watching(model, optimizer) as watch:
            ids.add(watch.run_id)
            step(model, optimizer)
    assert len(ids) == 2
    assert exporter.values(names.STEP_INDEX) == [0, 0]


def test_copies_carry_nothing_of_ours(watching: Watching) -> None:
    model, optimizer = make()
    with watching(model, optimizer) as watch:
        for stepped in (False, True):  # before the first step hooks still learn the order of backward
            if stepped:
                step(model, optimizer)
            clones = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
            buffer = io.BytesIO()
            torch.save((model, optimizer), buffer)
            assert b"gradwatch" not in buffer.getvalue()
            buffer.seek(0)
            clones.append(torch.load(buffer, weights_only=False))
            for clone, clone_optimizer in clones:
                assert torch.equal(clone.weight, model.weight)
                assert not getattr(clone.weight, "_post_accumulate_grad_hooks", None)
                before = watch.step
                step(clone, clone_optimizer)
                assert watch.step == before
        inert = pickle.loads(pickle.dumps(watch))
        inert.log(x=1)
        inert.close()
        assert copy.deepcopy(watch).run_id is None
        assert watch.run_id is not None


def test_a_forgotten_optimizer_is_freed(watching: Watching) -> None:
    import gc
    import weakref

    model, optimizer = make()
    with watching(model, optimizer):
        step(model, optimizer)
        gone = weakref.ref(model.weight)
        del model, optimizer
        gc.collect()
        assert gone() is None


def test_a_closed_watch_still_tells_how_many_steps_there_were(watching: Watching) -> None:
    model, optimizer = make()
    watch = watching(model, optimizer, start_step=7)
    for _ in range(3):
        step(model, optimizer)
    watch.close()
    assert watch.step == 10


@pytest.mark.parametrize(
    "value",
    [
        0.25, 1, True, 2**63, -(2**64), 10**300, torch.tensor(0.25), torch.tensor([3]), Decimal("0.5"),
        float("nan"), float("inf"), np.float32(0.5), np.int64(3), np.array(0.5), np.array([[0.5]]),
        np.uint64(2**64 - 1), nn.Parameter(torch.tensor(2.0)), torch.tensor(1.5, dtype=torch.bfloat16),
    ],
)  # fmt: skip
def test_any_number_can_be_logged(watching: Watching, exporter: InMemoryExporter, value: Any) -> None:
    with watching(*make()) as watch:
        watch.log(score=value)
    (point,) = exporter.points(names.LOGGED, **{names.METRIC_NAME: "score"})
    number = value.item() if hasattr(value, "item") else value
    assert point.value == pytest.approx(float(number), nan_ok=True)


@pytest.mark.parametrize(
    "value",
    [
        "0.5", b"1", None, torch.zeros(2), [1], {}, 1j, 10**400, np.complex64(1j), np.array(1j), np.zeros(2),
        np.array("x"), torch.tensor(1j), torch.zeros(0), torch.zeros((), device="meta"), object(),
    ],
)  # fmt: skip
def test_what_is_no_number_is_refused_with_a_word(
    watching: Watching, exporter: InMemoryExporter, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with watching(*make()) as watch:
        watch.log(score=value)
    assert exporter.points(names.LOGGED) == []
    assert "watch.log(score=...): expected one number" in caplog.text


def test_a_word_in_an_array_is_no_number(watching: Watching, exporter: InMemoryExporter) -> None:
    with watching(*make()) as watch:
        watch.log(score=np.array("0.5"))
    assert exporter.points(names.LOGGED) == []


def test_what_many_threads_log_at_once_is_all_kept_in_order(
    watching: Watching, exporter: InMemoryExporter, caplog: pytest.LogCaptureFixture
) -> None:
    raised: list[BaseException] = []

    def log(watch: gradwatch.Watch, name: str) -> None:
        try:
            for number in range(200):
                watch.log(**{name: number, "no_number": 1j})
        except BaseException as error:  # noqa: BLE001 - a thread's own would only be printed
            raised.append(error)

    model, optimizer = make()
    with watching(model, optimizer) as watch:
        threads = [threading.Thread(target=log, args=(watch, f"thread_{i}")) for i in range(8)]
        for thread in threads:
            thread.start()
        for _ in range(50):
            step(model, optimizer)
        for thread in threads:
            thread.join()
    assert raised == []
    for i in range(8):
        kept = [point.value for point in exporter.points(names.LOGGED, **{names.METRIC_NAME: f"thread_{i}"})]
        assert kept == list(range(200))
    assert exporter.points(names.LOGGED, **{names.METRIC_NAME: "no_number"}) == []
    assert "watch.log(no_number=...): expected one number, got complex" in caplog.text


@pytest.mark.parametrize("setting", ["rank", "attempt", "start_step"])
@pytest.mark.parametrize("number", [2**63, 2**64, 10**400, str(2**63)])
def test_a_number_that_64_bits_cannot_hold_is_a_clear_error(
    watching: Watching, setting: str, number: object
) -> None:
    with pytest.raises(gradwatch.SettingsError, match=rf"gradwatch: {setting}=.*: expected a whole number, at"):
        watching(*make(), **{setting: number})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("job", "j" * 257), ("run_id", "r" * 257), ("rank", 2**31), ("attempt", 2**31)],
    ids=["job", "run_id", "rank", "attempt"],
)
def test_what_the_collector_could_not_take_for_an_identity_is_a_clear_error(
    watching: Watching, setting: str, value: object
) -> None:
    with pytest.raises(gradwatch.SettingsError, match=rf"gradwatch: {setting}=.*: expected a .*at most"):
        watching(*make(), **{setting: value})


def test_steps_are_counted_on_from_the_largest_start(watching: Watching, exporter: InMemoryExporter) -> None:
    model, optimizer = make()
    with watching(model, optimizer, start_step=2**62):
        for _ in range(3):
            step(model, optimizer)
    assert exporter.values(names.STEP_INDEX) == [2**62, 2**62 + 1, 2**62 + 2]


def test_an_attribute_that_64_bits_cannot_hold_is_sent_as_text() -> None:
    (fits, beyond) = key_values({"fits": -(2**63), "beyond": 2**63})
    assert fits.value.int_value == -(2**63)
    assert beyond.value.string_value == str(2**63)


def test_a_logged_loss_wins_over_the_captured_one(watching: Watching, exporter: InMemoryExporter) -> None:
    model, optimizer = make()
    with watching(model, optimizer) as watch:
        step(model, optimizer)
        watch.log(loss=10.0, lr=0.5)  # after the step
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        watch.log(loss=torch.tensor(20.0))  # between backward and step
        optimizer.step()
        captured = step(model, optimizer).item()
    assert exporter.values(names.LOSS) == [10.0, 20.0, captured]
    assert exporter.values(names.LEARNING_RATE) == [0.5, 0.1, 0.1]


def test_loss_capture_can_be_switched_off(watching: Watching, exporter: InMemoryExporter) -> None:
    original = torch.autograd.backward
    model, optimizer = make()
    with watching(model, optimizer, capture_loss=False):
        assert torch.autograd.backward is original
        step(model, optimizer)
    assert exporter.values(names.LOSS) == []
    assert len(exporter.values(names.GRADIENT_NORM)) == 1


def test_backward_with_a_gradient_or_of_a_vector_is_no_loss(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model, optimizer = make()
    with watching(model, optimizer):
        out = model(torch.randn(5, 4))
        out.backward(torch.ones_like(out))
        optimizer.step()
    assert exporter.values(names.LOSS) == []


def test_reaching_the_target_is_one_event(watching: Watching, exporter: InMemoryExporter) -> None:
    model, optimizer = make()
    with watching(model, optimizer, target="val_loss<=0.5", start_step=100) as watch:
        for value in (0.9, float("nan"), 0.5, 0.4):
            step(model, optimizer)
            watch.log(val_loss=value)
    (event,) = exporter.find_events(names.TARGET_REACHED.name)
    assert event.attributes[names.STEP] == 102
    assert event.attributes[names.TARGET_VALUE] == 0.5
    assert exporter.resource[names.TARGET] == "val_loss<=0.5"


def test_the_target_can_be_the_captured_loss(watching: Watching, exporter: InMemoryExporter) -> None:
    model, optimizer = make()
    with watching(model, optimizer, target="loss<1e9"):
        step(model, optimizer)
    (event,) = exporter.find_events(names.TARGET_REACHED.name)
    assert event.attributes[names.STEP] == 0


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("first line\nsecond"), "failed", "ValueError"),
        (KeyboardInterrupt(), "cancelled", "interrupted"),
        (SystemExit(3), "failed", "exit 3"),
        (SystemExit("message"), "failed", "exit 1"),
        (SystemExit(0), "succeeded", None),
    ],
)
def test_leaving_the_context_by_an_exception_is_that_ending(
    watching: Watching, exporter: InMemoryExporter, error: BaseException, status: str, reason: str | None
) -> None:
    with pytest.raises(type(error)), watching(*make()):
        raise error
    (event,) = exporter.find_events(names.RUN_ENDED.name)
    assert event.attributes[names.STATUS] == status
    assert event.attributes.get(names.REASON) == reason
    if status == "failed" and isinstance(error, ValueError):
        assert event.attributes[names.EXCEPTION_MESSAGE] == "first line"


def test_every_event_has_the_next_sequence_number(watching: Watching, exporter: InMemoryExporter) -> None:
    model, optimizer = make()
    with watching(model, optimizer, target="x<1") as watch:
        watch.log(x=0)
    assert [event.attributes[names.EVENT_SEQUENCE] for event in exporter.events] == [0, 1, 2]
    assert all(a.time < b.time for a, b in zip(exporter.events, exporter.events[1:], strict=False))


def test_a_bad_target_raises_at_once_and_a_wrong_object_too(exporter: InMemoryExporter) -> None:
    model, optimizer = make()
    with pytest.raises(gradwatch.SettingsError, match=r"target='val_loss'.*expected NAME<=NUMBER"):
        gradwatch.watch(model, optimizer, target="val_loss")
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer.*got Linear"):
        gradwatch.watch(model, model, exporter=exporter)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got int"):
        gradwatch.watch(3, optimizer, exporter=exporter)
    with pytest.raises(TypeError, match=r"expected an exporter.*got the class InMemoryExporter"):
        gradwatch.watch(model, optimizer, exporter=InMemoryExporter)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected an exporter.*got str"):
        gradwatch.watch(model, optimizer, exporter="otlp")  # type: ignore[arg-type]
    assert exporter.events == []


def test_otel_sdk_disabled_watches_nothing(monkeypatch: pytest.MonkeyPatch, watching: Watching) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    before = patched()
    model, optimizer = make()
    watch = watching(model, optimizer)
    step(model, optimizer)
    watch.log(x=1)
    assert watch.run_id is None
    assert patched() == before


def test_an_inherited_watch_is_silent_in_a_forked_child(watching: Watching, exporter: InMemoryExporter) -> None:
    model, optimizer = make()
    original = sys.exit
    with watching(model, optimizer) as watch:
        step(model, optimizer)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                watch.log(x=1)
                hooks = len(torch_optimizer._global_optimizer_pre_hooks)
                silent = sys.exit is original and hooks == 0 and len(exporter.points(names.LOGGED)) == 0
                mine = InMemoryExporter()
                with gradwatch.watch(model, optimizer, every=1, exporter=mine):  # an explicit one works
                    step(model, optimizer)
                own = mine.event_names() == ["training.run.started", "training.run.ended"]
                watch.close()  # says nothing, and waits for nobody
                code = 0 if silent and own and mine.values(names.STEP_INDEX) == [0] else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        step(model, optimizer)
    assert exporter.values(names.STEP_INDEX) == [0, 1]
    assert exporter.event_names() == ["training.run.started", "training.run.ended"]


class Watchful(Dataset[torch.Tensor]):
    """A data set that tries to watch from its worker."""

    def __init__(self, watch: gradwatch.Watch | None) -> None:
        self.watch = watch

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.watch is not None:
            self.watch.log(x=index)
        return torch.tensor(0.0 if gradwatch.watch(nn.Linear(2, 2)).run_id is None else 1.0)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_a_data_loader_worker_gets_a_watch_that_watches_nothing(
    watching: Watching, exporter: InMemoryExporter, context: str
) -> None:
    with watching(*make()) as watch:
        loader = DataLoader(Watchful(watch), num_workers=1, multiprocessing_context=context)
        assert sum(float(batch) for batch in loader) == 0.0
    assert exporter.event_names() == ["training.run.started", "training.run.ended"]
    assert exporter.points(names.LOGGED) == []


class Raising(InMemoryExporter):
    def send_events(self, _resource: Attributes, _events: Any) -> None:
        raise OSError("planted")

    def send_metrics(self, _resource: Attributes, _metrics: Any) -> None:
        raise OSError("planted")


@pytest.mark.usefixtures("nothing_left")
def test_internal_errors_are_counted_and_never_surface(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("GRADWATCH_TESTING")
    before = patched()
    model, optimizer = make()
    with gradwatch.watch(model, optimizer, exporter=Raising()) as watch:
        monkeypatch.setattr(watch._run.observer, "_anchor", None)  # type: ignore[union-attr]
        for _ in range(3):
            step(model, optimizer)
        assert safety.error_count() >= 3
    assert caplog.text.count("training is not affected") == 1
    assert patched() == before


@pytest.mark.usefixtures("nothing_left")
def test_a_watch_that_fails_half_way_leaves_nothing_that_the_next_one_would_join(
    monkeypatch: pytest.MonkeyPatch, exporter: InMemoryExporter
) -> None:
    monkeypatch.delenv("GRADWATCH_TESTING")
    before = patched()
    model, optimizer = make()
    with monkeypatch.context() as broken:
        broken.setattr(StepObserver, "add_optimizer", lambda *_: 1 / 0)
        failed = gradwatch.watch(model, optimizer, exporter=InMemoryExporter())
    assert failed.run_id is None
    assert patched() == before
    with gradwatch.watch(model, optimizer, exporter=exporter) as watch:
        step(model, optimizer)
    assert watch.step == 1
    assert exporter.event_names()[0] == names.RUN_STARTED.name
    assert exporter.event_names()[-1] == names.RUN_ENDED.name
    assert patched() == before


@pytest.mark.parametrize("nested", [False, True])
def test_a_script_module_is_watched_without_hooks(
    watching: Watching, exporter: InMemoryExporter, nested: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and in use
        script = torch.jit.script(nn.Linear(4, 1))
    model = nn.Sequential(script) if nested else script
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, norms = [], []
    with watching(model, optimizer, nvtx="layers"):
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            losses.append(loss.item())
            norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
            optimizer.step()
    assert exporter.values(names.LOSS) == pytest.approx(losses)
    assert exporter.values(names.GRADIENT_NORM) == pytest.approx(norms)


def test_an_event_and_a_point_are_what_the_exporter_protocol_says(exporter: InMemoryExporter) -> None:
    exporter.send_events({}, [Event("a", 1, {})])
    exporter.send_metrics({}, [MetricPoints(names.LOSS, [])])
    assert exporter.deliver(1.0) == math.inf
    assert exporter.take_lost() == 0
    assert exporter.event_names() == ["a"]
