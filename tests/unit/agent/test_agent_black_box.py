"""The black box holds the last steps exactly, in bounded memory, and is written when something goes wrong."""

from __future__ import annotations

import math
import os
import re
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradwatch
from gradwatch import conventions as names
from gradwatch import current_run as runs
from gradwatch import local_files
from gradwatch.export.interval import Interval
from gradwatch.identity import Identity
from gradwatch.life.black_box import BlackBox, StallWatch, Trigger
from gradwatch.life.flight_recorder import (
    FlightRecorder,
    FlightStep,
    compress,
    compress_for_file,
    decode,
    fitting,
)
from gradwatch.life.stacks import stacks
from gradwatch.loop.step_log import StepLog
from gradwatch.telemetry import Attributes, Event
from gradwatch.testing import InMemoryExporter

NORM = st.floats(min_value=0, width=32) | st.sampled_from([math.nan, math.inf])
NUMBER = st.none() | st.floats()


def single(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def same(left: Any, right: Any) -> bool:
    return repr(left) == repr(right)  # NaN equals NaN, None does not, and -0.0 is not 0.0


@st.composite
def step_records(draw: st.DrawFn) -> list[FlightStep]:
    layers = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True).map(tuple))
    records = []
    for number in range(draw(st.integers(0, 12))):
        chosen = draw(st.permutations(range(len(layers))))[: draw(st.integers(0, len(layers)))]
        observed = draw(st.booleans())
        records.append(
            FlightStep(
                optimizer=draw(st.integers(0, 1)),
                step=number,
                time=1_000 + number,
                duration=draw(st.none() | st.integers(0, 10**12)),
                loss=draw(NUMBER),
                learning_rates=tuple(draw(st.lists(NUMBER, max_size=2))),
                layers=layers,
                indices=chosen if observed else None,
                norms=[draw(NORM) for _ in chosen] if observed else None,
                gradient_norm=draw(NUMBER),
                nonfinite=draw(st.booleans()),
                skipped=draw(st.booleans()),
                clip_ratio=draw(NUMBER),
            )
        )
    return records


@given(step_records(), st.integers(1, 8), st.booleans())
def test_what_is_decoded_is_what_was_recorded(records: list[FlightStep], capacity: int, file: bool) -> None:
    recorder = FlightRecorder(capacity)
    for record in records:
        recorder.add(record)
    document = recorder.document({"trigger": "exception"})
    decoded = decode((compress_for_file if file else compress)(document))
    assert decoded["trigger"] == "exception"
    assert set(decoded["optimizers"]) == {record.optimizer for record in records}
    for optimizer, ring in decoded["optimizers"].items():
        kept = [record for record in records if record.optimizer == optimizer][-capacity:]
        assert ring["step"] == [record.step for record in kept]
        assert ring["time"] == [record.time for record in kept]
        assert same(ring["loss"], [record.loss for record in kept])
        assert same(ring["gradient_norm"], [record.gradient_norm for record in kept])
        assert same(ring["clip_ratio"], [record.clip_ratio for record in kept])
        assert same(ring["learning_rate"], [list(record.learning_rates) for record in kept])
        assert same(ring["duration"], [None if r.duration is None else r.duration / 1e9 for r in kept])
        assert ring["nonfinite"] == [record.nonfinite for record in kept]
        assert ring["skipped"] == [record.skipped for record in kept]
        for layer, column in ring["norms"].items():
            expected = [
                dict(zip((r.layers[i] for i in r.indices or ()), map(single, r.norms or ()), strict=True)).get(
                    layer
                )
                for r in kept
            ]
            assert same(column, expected)


def record(number: int, layers: tuple[str, ...] = ("a", "b"), **changes: Any) -> FlightStep:
    plain = FlightStep(
        0, number, 1_000 + number, 10**9, 0.5, (0.1,), layers, range(len(layers)),
        [float(number)] * len(layers), 1.0,
    )  # fmt: skip
    return plain._replace(**changes)


def test_memory_is_bounded_however_long_the_run() -> None:
    layers = tuple(f"layer{i}" for i in range(1000))
    recorder = FlightRecorder(256)
    for number in range(3):
        recorder.add(record(number, layers))
    ring = recorder._rings[0]
    size = sys.getsizeof(ring.norms)
    assert size < 1.1 * 2**20
    for number in range(3, 600):
        recorder.add(record(number, layers, norms=None, indices=None))
    assert sys.getsizeof(ring.norms) == size
    assert recorder.steps() == 256


def test_a_step_that_waits_is_in_the_dump_and_not_twice_once_it_is_drained() -> None:
    recorder = FlightRecorder(8)
    recorder.add(record(0))
    waiting = [record(1, loss=None), record(2, loss=None)]
    recorder.include(waiting)
    recorder.add(record(1))
    recorder.add(record(2))
    ring = decode(compress(recorder.document({})))["optimizers"][0]
    assert ring["step"] == [0, 1, 2]
    assert ring["loss"] == [0.5, 0.5, 0.5]


def test_layers_that_come_and_go_keep_their_columns() -> None:
    recorder = FlightRecorder(8)
    recorder.add(record(0, ("a", "b"), norms=[1.0, 2.0]))
    recorder.add(record(1, ("b", "c"), norms=[3.0, 4.0]))
    ring = decode(compress(recorder.document({})))["optimizers"][0]
    assert ring["norms"] == {"b": [2.0, 3.0], "c": [None, 4.0]}


def test_what_is_sent_fits_and_keeps_the_latest_steps() -> None:
    layers = tuple(f"layer{i}" for i in range(200))
    recorder = FlightRecorder(64)
    torch.manual_seed(0)
    for number in range(64):
        recorder.add(record(number, layers, norms=torch.rand(200).tolist()))
    steps, data = fitting(recorder, {}, 20_000)
    assert len(data) <= 20_000
    ring = decode(data)["optimizers"][0]
    assert ring["step"] == list(range(64 - steps, 64))
    assert 1 < steps < 64


@pytest.mark.parametrize(
    "data", [b"", b"nonsense", compress(b"[]"), compress(b"{}"), compress(b'{"format": 9}')]
)
def test_nonsense_is_told_from_a_black_box(data: bytes) -> None:
    with pytest.raises(ValueError, match="flight record"):
        decode(data)


# --- Triggers ------------------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, poison: int | None = None) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.ones(4, 8)).square().mean()
        (loss * math.nan if step == poison else loss).backward()
        optimizer.step()


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))


def black_boxes(exporter: InMemoryExporter) -> dict[Any, Any]:
    return {
        event.attributes[names.FLIGHT_TRIGGER]: decode(event.attributes[names.FLIGHT_DATA])  # type: ignore[arg-type]
        for event in exporter.find_events(names.FLIGHT_RECORD.name)
    }


def test_the_first_nan_sends_the_steps_up_to_it(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, model: nn.Module, tmp_path: Path
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, run_id="nan run/1", directory=tmp_path / "new" / "place"):
        train(model, optimizer, 6, poison=4)
    (event,) = exporter.find_events(names.FLIGHT_RECORD.name)
    assert event.attributes[names.STEP] == 4
    whole = black_boxes(exporter)["nonfinite"]
    ring = whole["optimizers"][0]
    assert set(ring["step"]) >= {0, 1, 2, 3, 4}
    assert math.isnan(ring["loss"][4])
    assert math.isnan(ring["norms"]["0.weight"][4])
    assert all(math.isfinite(norm) for norm in ring["norms"]["0.weight"][:4])
    assert event.attributes[names.FLIGHT_STEPS] == len(ring["step"])
    (file,) = (tmp_path / "new" / "place").iterdir()
    assert re.fullmatch(r"flight-nan_run_1-r0-nonfinite-[0-9a-f]{8}\.json\.gz", file.name)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert same(decode(file.read_bytes())["optimizers"], whole["optimizers"])


def holds_what_came_before(ring: dict[str, Any], bad: int) -> bool:
    """Whether a box is about this step: a hundred good ones, the bad one, and a few after it."""
    place = ring["step"].index(bad)
    good, poisoned = ring["loss"][:place], ring["loss"][place:]
    assert ring["step"] == list(range(ring["step"][0], ring["step"][-1] + 1))
    return len(good) >= 100 and all(map(math.isfinite, good)) and all(map(math.isnan, poisoned[:1]))


def test_however_fast_the_loop_the_box_of_a_nan_ends_with_it(
    exporter: InMemoryExporter, model: nn.Module
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, exporter=exporter):
        train(model, optimizer, 5000, poison=1000)
    ring = black_boxes(exporter)["nonfinite"]["optimizers"][0]
    assert holds_what_came_before(ring, 1000)
    assert ring["step"][-1] < 1030


class Slow(InMemoryExporter):
    """Keeps the export thread at its first delivery until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.released = threading.Event(), threading.Event()

    def send_events(self, resource: Attributes, events: Sequence[Event]) -> bool:
        self.reached.set()
        self.released.wait(60.0)
        return super().send_events(resource, events)


@pytest.mark.parametrize("drained_next", [True, False])
def test_steps_that_wait_for_a_slow_collector_do_not_push_out_what_came_before_a_nan(
    watching: Callable[..., gradwatch.Watch], model: nn.Module, drained_next: bool
) -> None:
    exporter = Slow()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, exporter=exporter):
        assert exporter.reached.wait(60.0)
        train(model, optimizer, 1000, poison=400)
        run = runs.current()
        assert run is not None
        if drained_next:
            run._collect(0, 0)
        exporter.released.set()
    ring = black_boxes(exporter)["nonfinite"]["optimizers"][0]
    assert holds_what_came_before(ring, 400)
    assert ring["step"][-1] == 403
    assert math.isnan(ring["norms"]["0.weight"][ring["step"].index(400)])


def test_a_box_that_another_thread_is_writing_stays_due_so_that_nobody_drains_into_it(tmp_path: Path) -> None:
    def step(number: int) -> FlightStep:
        return FlightStep(0, number, number, 1, 0.5, (0.1,))

    def export() -> None:
        box.write_if_due()
        recorder.add(step(999))

    def tail(until: int | None) -> list[FlightStep]:
        exporting.start()
        exporting.join(0.2)  # it has to wait for the box, and the box cannot wait for it
        return [step(number) for number in range(5)]

    recorder, sent = FlightRecorder(8), list[Any]()
    exporting = threading.Thread(target=export)
    box = BlackBox(recorder, tail, sent.append, tmp_path, Identity("run", 0, 0, 1, "instance"))
    box.ask("nonfinite", 2)
    box.write_if_due()
    exporting.join()
    (event,) = sent
    assert decode(event[names.FLIGHT_DATA])["optimizers"][0]["step"] == [0, 1, 2, 3, 4]


def test_the_box_of_a_nan_is_sent_while_training_goes_on(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, model: nn.Module
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, export_interval=3600.0):
        train(model, optimizer, 3, poison=2)
        deadline = time.monotonic() + 60.0
        while not black_boxes(exporter) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert black_boxes(exporter)["nonfinite"]["optimizers"][0]["step"] == [0, 1, 2]


def test_a_box_that_waits_for_the_end_of_its_step_makes_no_other_wait_or_go(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, model: nn.Module, tmp_path: Path
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError), watching(model, optimizer, directory=tmp_path / "boxes"):
        train(model, optimizer, 3)
        run = runs.current()
        assert run is not None
        run._ask_black_box("nonfinite", 3)
        run._note_sigterm()
        run._ask_black_box("nonfinite", 4)
        raise KeyError("lost")
    events = exporter.find_events(names.FLIGHT_RECORD.name)
    # The exception is SIGTERM's doing, and SIGTERM has its box.
    assert {e.attributes[names.FLIGHT_TRIGGER]: e.attributes.get(names.STEP) for e in events} == {
        "nonfinite": 3, "SIGTERM": None
    }  # fmt: skip
    assert len(events) == len(list((tmp_path / "boxes").iterdir())) == 2


def test_an_exception_sends_every_step_that_ended(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, model: nn.Module
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError), watching(model, optimizer, flight_steps=3):
        train(model, optimizer, 5)
        raise KeyError("lost")
    assert list(black_boxes(exporter)) == ["exception"]
    assert black_boxes(exporter)["exception"]["optimizers"][0]["step"] == [2, 3, 4]


@pytest.mark.parametrize("every", [1, 100])
def test_evaluation_is_in_no_optimizers_steps(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, model: nn.Module, every: int
) -> None:
    other = nn.Linear(8, 4)
    pairs = [(each, torch.optim.SGD(each.parameters(), lr=0.1)) for each in (model, other)]
    began = time.perf_counter()
    with pytest.raises(KeyError), watching([model, other], [one for _, one in pairs], every=every) as watch:
        for _ in range(6):
            for each, optimizer in pairs:
                train(each, optimizer, 1)
                with watch.evaluation():
                    time.sleep(0.05)
        raise KeyError("lost")
    lasted = time.perf_counter() - began
    for ring in black_boxes(exporter)["exception"]["optimizers"].values():
        durations = ring["duration"][1:]
        assert min(durations) > 0.0
        assert sum(durations) < lasted - 10 * 0.05


def test_a_box_written_in_the_middle_of_a_drain_has_every_step_by_its_number() -> None:
    recorder = FlightRecorder(64)
    found: list[list[FlightStep]] = []

    def keep(log: StepLog) -> None:
        for step in log.last_steps(64):
            recorder.add(step)
            if step.step == 5:
                end(log, 10)  # training goes on meanwhile

    def end(log: StepLog, number: int) -> None:
        log.losses.append(float(number))
        log.ends.append(1000 + number)

    def look() -> None:
        thread = threading.Thread(target=lambda: found.append(log.last_steps(64)))
        thread.start()
        thread.join(0.02)  # it waits for the drain to be over, or it does not

    interval = Interval(0, keep)
    log = interval.open_log(0, 0)
    log.leads = log.closed = True
    for number in range(10):
        end(log, number)
    interval.points(10**9, 1, 0, pace=look)
    interval.points(10**9, 1, 0, pace=look)
    look()
    assert all(step.step == step.loss == step.time - 1000 for steps in found for step in steps)
    assert decode(compress(recorder.document({})))["optimizers"][0]["step"] == list(range(11))


def test_a_healthy_run_writes_nothing(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, model: nn.Module, tmp_path: Path
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, directory=tmp_path / "unused"):
        train(model, optimizer, 5)
    assert black_boxes(exporter) == {}
    assert not (tmp_path / "unused").exists()


def test_a_stall_and_a_sigterm_that_was_handled_send_it_once(
    watching: Callable[..., gradwatch.Watch],
    exporter: InMemoryExporter,
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer):
        train(model, optimizer, 3)
        run = runs.current()
        assert run is not None
        monkeypatch.setattr(StallWatch, "stalled", lambda _watch, step, **_: step == 2)
        run._heartbeat()
        run._heartbeat()
        run._note_sigterm()
    triggers = [e.attributes[names.FLIGHT_TRIGGER] for e in exporter.find_events(names.FLIGHT_RECORD.name)]
    assert triggers == ["stalled", "SIGTERM"]
    assert black_boxes(exporter)["stalled"]["optimizers"][0]["step"] == [0, 1, 2]


def test_a_stall_that_passed_does_not_use_up_the_next(
    watching: Callable[..., gradwatch.Watch],
    exporter: InMemoryExporter,
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr(StallWatch, "stalled", lambda _watch, step, **_: step in {2, 5})
    with watching(model, optimizer):
        run = runs.current()
        assert run is not None
        for _ in range(2):
            train(model, optimizer, 3)
            run._heartbeat()
            run._heartbeat()
    events = exporter.find_events(names.FLIGHT_RECORD.name)
    assert [e.attributes[names.STEP] for e in events] == [2, 5]


def test_an_evaluation_is_no_stall_and_a_hang_before_the_first_sign_of_life_is_one(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, model: nn.Module
) -> None:
    clock = Hand()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watching(model, optimizer, start_step=1000) as watch:
        run = runs.current()
        assert run is not None
        run._stall._monotonic, run._stall._since = clock, clock.now
        train(model, optimizer, 50)
        with watch.evaluation():
            for _ in range(100):
                clock.now += 5
                run._heartbeat()
        assert run._thread.flush(60.0)
        assert black_boxes(exporter) == {}
        clock.now += 61
        run._heartbeat()
    assert black_boxes(exporter)["stalled"]["at_step"] == 1049


@pytest.mark.parametrize("last_step", [None, 1005], ids=["before the first step", "after few"])
def test_a_hang_in_the_first_steps_is_one_after_ten_minutes(last_step: int | None) -> None:
    clock = Hand()
    watch = StallWatch(lambda: 1.0, 1000, clock)
    assert not watch.stalled(last_step)
    clock.now += StallWatch.EARLY_SECONDS - 1
    assert not watch.stalled(last_step)
    clock.now += 2
    assert watch.stalled(last_step)


@pytest.mark.parametrize("drained_before", [True, False])
def test_evaluation_is_not_in_a_steps_duration_as_it_is_not_in_what_is_exported(
    watching: Callable[..., gradwatch.Watch],
    exporter: InMemoryExporter,
    model: nn.Module,
    drained_before: bool,
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError), watching(model, optimizer) as watch:
        train(model, optimizer, 3)
        with watch.evaluation():
            time.sleep(0.2)
        train(model, optimizer, 3)
        if drained_before:
            run = runs.current()
            assert run is not None
            assert run._thread.flush(60.0)
        raise KeyError("lost")
    ring = black_boxes(exporter)["exception"]["optimizers"][0]
    assert ring["duration"][1:] == exporter.values(names.STEP_DURATION)


def test_the_next_attempt_of_a_run_leaves_the_box_of_the_last(
    watching: Callable[..., gradwatch.Watch], model: nn.Module, tmp_path: Path
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for steps in (2, 4):
        with pytest.raises(KeyError), watching(model, optimizer, run_id="again", directory=tmp_path / "boxes"):
            train(model, optimizer, steps)
            raise KeyError("lost")
    boxes = [decode(file.read_bytes()) for file in (tmp_path / "boxes").iterdir()]
    assert sorted(len(box["optimizers"][0]["step"]) for box in boxes) == [2, 4]


def test_a_full_disk_keeps_nobody_from_hearing(
    watching: Callable[..., gradwatch.Watch],
    exporter: InMemoryExporter,
    model: nn.Module,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("in the way")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError), watching(model, optimizer, directory=tmp_path / "file"):
        train(model, optimizer, 2)
        raise KeyError("lost")
    assert list(black_boxes(exporter)) == ["exception"]
    assert "cannot write the black box" in caplog.text


def test_the_folder_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "_MOST_BYTES", 250)
    endings = [*(f"{trigger}.json.gz" for trigger in get_args(Trigger)), "step7.pt", "step12.pt"]
    for age, ending in enumerate(endings):
        kind = "bundle" if ending.endswith(".pt") else "flight"
        name = local_files.file_name(kind, "my run/3", age if age % 2 else None, 11, ending)
        file = local_files.keep(tmp_path, name, lambda file: file.write(b"x" * 100))
        os.utime(file, ns=(age, age))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bundle-my_run_3-a5-r11-step7.pt",
        "bundle-my_run_3-r11-step12.pt",
    ]


def test_nothing_but_our_own_files_is_ever_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "_MOST_FILES", 1)
    users = [
        "flight-data.csv", "flight-delays-r2-2024.json.gz", "flight-log", "bundle-of-joy.pt",
        "bundle-run-r0-step7.pt.bak", "bundle-run-r0-step.pt", "my-bundle-run-r0-step7.pt", "mine.txt",
    ]  # fmt: skip
    for name in users:
        (tmp_path / name).write_text("the user's")
    (tmp_path / "flight-folder-r0-oom.json.gz").mkdir()
    (tmp_path / "bundle-linked-r0-step7.pt").symlink_to(tmp_path / "mine.txt")
    before = {path.name for path in tmp_path.iterdir()}
    for rank in range(2):
        local_files.keep(tmp_path, f"flight-run-r{rank}-oom.json.gz", lambda file: file.write(b"box"))
    assert {path.name for path in tmp_path.iterdir()} == before | {"flight-run-r1-oom.json.gz"}


def test_a_file_that_cannot_be_tidied_away_does_not_fail_the_one_that_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_files, "_MOST_FILES", 1)

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise PermissionError("another user's")

    local_files.keep(tmp_path, "flight-run-r0-oom.json.gz", lambda file: file.write(b"box"))
    monkeypatch.setattr(Path, "unlink", refuse)
    written = local_files.keep(tmp_path, "flight-run-r1-oom.json.gz", lambda file: file.write(b"box"))
    assert written.read_bytes() == b"box"


class Hand:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_loop_that_hangs_is_told_from_one_that_pauses() -> None:
    clock = Hand()
    watch = StallWatch(lambda: 1.0, monotonic=clock)
    for step in range(20):
        clock.now += 1
        assert not watch.stalled(step)
    clock.now += 59
    assert not watch.stalled(19)
    clock.now += 2
    assert watch.stalled(19)


def test_pauses_as_long_as_earlier_ones_are_no_stall() -> None:
    clock = Hand()
    watch = StallWatch(lambda: 1.0, monotonic=clock)
    for step in range(20):
        clock.now += 100 if step == 10 else 1
        watch.stalled(step)
    clock.now += 200
    assert not watch.stalled(19)
    clock.now += 101
    assert watch.stalled(19)


def test_slow_steps_few_steps_and_an_idle_prompt_are_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Hand()
    slow, young, idle = (StallWatch(partial(float, median), monotonic=clock) for median in (60, 1, 1))
    for step in range(20):
        slow.stalled(step)
        idle.stalled(step)
        young.stalled(min(step, 3))
    clock.now += 500
    assert not slow.stalled(19)
    assert not young.stalled(3)
    assert idle.stalled(19)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert not idle.stalled(19)


def test_a_limit_of_ones_own_counts_from_the_start_of_the_run() -> None:
    clock = Hand()
    watch = StallWatch(lambda: 1.0, monotonic=clock, limit=7.0)
    assert not watch.stalled(None)
    clock.now += 8
    assert watch.stalled(None)
    assert not watch.stalled(0)
    clock.now += 6
    assert not watch.stalled(0)
    clock.now += 2
    assert watch.stalled(0)


def test_a_stall_is_told_with_the_stack_of_every_thread(
    watching: Callable[..., gradwatch.Watch], exporter: InMemoryExporter, model: nn.Module
) -> None:
    clock = Hand()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done = threading.Event()

    def stuck_in_the_loader() -> None:
        done.wait()

    thread = threading.Thread(target=stuck_in_the_loader, name="loader token=abc123")
    thread.start()
    with watching(model, optimizer, stall_after=30):
        run = runs.current()
        assert run is not None
        run._stall._monotonic, run._stall._since = clock, clock.now
        train(model, optimizer, 3)
        run._heartbeat()
        for _ in range(10):
            clock.now += 5
            run._heartbeat()
    done.set()
    thread.join()
    (event,) = exporter.find_events(names.STALLED.name)
    assert event.attributes[names.STEP] == 2
    told = str(event.attributes[names.STACKS])
    assert told.startswith("MainThread:\n")
    assert "in stuck_in_the_loader" in told
    assert told.count("in test_a_stall_is_told_with_the_stack_of_every_thread") == 1
    assert "abc123" not in told


def test_stacks_fit_into_64_kib() -> None:
    def deep(frames: int) -> str:
        return stacks() if frames == 0 else deep(frames - 1)

    assert "in deep" in deep(150)
    done = threading.Event()
    threads = [threading.Thread(target=done.wait, name=f"{'ü' * 500}-{number}") for number in range(100)]
    for thread in threads:
        thread.start()
    try:
        assert len(stacks().encode()) <= 64 << 10
    finally:
        done.set()
        for thread in threads:
            thread.join()
