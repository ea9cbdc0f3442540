"""Statistics of the models' inputs against a dense computation in float64."""

from __future__ import annotations

import copy
import io
import math
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import count, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import gradwatch
from gradwatch import conventions as names
from gradwatch.loop.watched import Model
from gradwatch.measures import inputs, measures
from gradwatch.measures.inputs import InputProbe, floating_inputs, input_statistics, statistics_vector
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., gradwatch.Watch]


def check(tensor: Tensor) -> None:
    before = tensor.clone()
    found = input_statistics(statistics_vector(tensor).tolist())
    wide = before.double().flatten()
    finite = wide[wide.isfinite()]
    assert found.nonfinite == (wide.numel() - finite.numel()) / wide.numel()
    if finite.numel():
        assert found.mean == pytest.approx(finite.mean().item(), rel=1e-12, abs=1e-300)
        assert found.stddev == pytest.approx(finite.std(correction=0).item(), rel=1e-6, abs=1e-300)
    else:
        assert (found.mean, found.stddev) == (None, None)
    assert torch.equal(tensor.nan_to_num(), before.nan_to_num())  # looked at, not touched


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (2, 3, 4, 5)])
def test_every_type_and_shape_is_exact(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check((torch.randn(shape) * 3 + 1).to(dtype))
    check(torch.randn(shape).to(dtype).transpose(0, -1))


@given(st.lists(st.floats(), min_size=1, max_size=50))
@example([sys.float_info.max] * 3)
def test_whatever_is_finite_has_a_finite_mean_and_spread(values: list[float]) -> None:
    found = input_statistics(statistics_vector(torch.tensor(values, dtype=torch.float64)).tolist())
    finite = [value for value in values if math.isfinite(value)]
    assert found.nonfinite == (len(values) - len(finite)) / len(values)
    assert (found.mean is None) == (not finite)
    if found.mean is not None and found.stddev is not None:
        largest = max(map(abs, finite))
        mean = float(sum(map(Fraction, finite)) / len(finite))
        assert found.mean == pytest.approx(mean, rel=1e-9, abs=1e-12 * largest)
        assert found.stddev <= largest * (1 + 1e-9)


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_non_finite_elements_are_counted_and_spoil_nothing(values: list[float]) -> None:
    tensor = torch.tensor(values)
    found = input_statistics(statistics_vector(tensor).tolist())
    finite = [value for value in values if math.isfinite(value)]
    assert found.nonfinite == (len(values) - len(finite)) / len(values)
    assert (found.mean is None) == (not finite)
    if found.mean is not None and found.stddev is not None:
        mean = math.fsum(finite) / len(finite)
        largest = max(map(abs, finite))
        assert found.mean == pytest.approx(mean, rel=1e-9, abs=1e-12 * largest)
        spread = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / len(finite))
        assert found.stddev == pytest.approx(spread, rel=1e-6, abs=1e-12 * largest)


def test_a_small_spread_around_a_large_mean_survives() -> None:
    check(1e6 + torch.randn(1000, dtype=torch.float64) * 1e-3)


def test_a_large_input_is_sampled_evenly_and_never_beyond_the_bound() -> None:
    ramp = torch.arange(2_000_000, dtype=torch.float32).reshape(4, 5, 100_000)
    found = input_statistics(statistics_vector(ramp).tolist())
    assert found.mean == pytest.approx(999_999.5, rel=1e-3)
    assert found.stddev == pytest.approx(2_000_000 / math.sqrt(12), rel=1e-3)
    for shape in [(2_000_000,), (1, 1, 3_000_000), (600, 700, 3), (2_000_000, 1)]:
        sample = inputs._sample(torch.empty(shape))
        assert 2**16 <= sample.numel() <= 2**18
    assert inputs._sample(torch.empty(2, 2**17)).numel() == 2**18


@pytest.mark.parametrize("shape", [(512, 512, 3), (1, 786_432), (786_432,), (4, 196_608), (3, 262_144)])
def test_a_sample_of_an_image_has_all_its_channels_however_it_is_laid_out(shape: tuple[int, ...]) -> None:
    image = torch.tensor([1.0, 2.0, 6.0]).repeat(512 * 512)
    found = input_statistics(statistics_vector(image.reshape(shape)).tolist())
    assert found.mean == pytest.approx(3.0, rel=1e-3)
    assert found.stddev == pytest.approx(image.std(correction=0).item(), rel=1e-3)


def test_inputs_are_named_by_their_place_and_only_floating_tensors_count() -> None:
    image, mask, table = torch.rand(2, 2), torch.ones(2), torch.rand(3)
    found = floating_inputs(
        (image, torch.ones(2, dtype=torch.int64), {"mask": mask, "ids": torch.zeros(2, dtype=torch.bool)}),
        {"tables": [table, (table,)], "alpha": 0.5, "none": None, "empty": torch.empty(0)},
    )
    assert [(name, id(tensor)) for name, tensor in found] == [
        ("0", id(image)), ("2.mask", id(mask)), ("tables.0", id(table)), ("tables.1.0", id(table)),
    ]  # fmt: skip
    assert len(floating_inputs([image] * 100, {"batch": [image] * 100})) == 8


def train(model: nn.Module, batches: Iterator[tuple[Any, ...]], after: Callable[[], object] = bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for args in batches:
        optimizer.zero_grad()
        model(*args).square().mean().backward()
        optimizer.step()
        after()


@pytest.fixture
def one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "_LOOK_NANOSECONDS", 10**15)


@pytest.mark.usefixtures("one_look")
def test_a_run_reports_its_inputs_early_and_with_the_time_of_their_step(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(4, 1)
    given_to_model = [(torch.randn(5, 4) + step,) for step in range(20)]
    with watching(model):
        train(model, iter(given_to_model))
    (mean,) = exporter.points(names.INPUT_MEAN)
    (stddev,) = exporter.points(names.INPUT_STDDEV)
    (nonfinite,) = exporter.points(names.INPUT_NONFINITE)
    (step,) = (point.value for point in exporter.points(names.STEP_INDEX) if point.time == mean.time)
    seen = given_to_model[int(step)][0].double()
    assert step == 1
    assert mean.attributes == {names.INPUT_NAME: "0"}
    assert mean.value == pytest.approx(seen.mean().item())
    assert stddev.value == pytest.approx(seen.std(correction=0).item())
    assert nonfinite.value == 0
    assert not model._forward_pre_hooks


@pytest.mark.usefixtures("one_look")
def test_evaluation_in_between_is_not_taken_for_training(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(4, 1)

    def evaluate() -> None:
        with torch.no_grad():
            model(torch.full((2, 4), 1e9))

    with watching(model):
        train(model, iter([(torch.ones(2, 4),)] * 15), evaluate)
    assert exporter.values(names.INPUT_MEAN) == [1.0]


@pytest.mark.usefixtures("one_look")
def test_evaluation_with_gradients_is_not_taken_for_training_where_it_is_marked(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(4, 1)
    with watching(model) as watch:

        def attack() -> None:
            with watch.evaluation():
                model(torch.full((2, 4), 1e9))

        train(model, iter([(torch.ones(2, 4),)] * 15), attack)
    assert exporter.values(names.INPUT_MEAN) == [1.0]


@pytest.mark.usefixtures("one_look")
def test_another_threads_forward_is_not_taken_for_training(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    model = nn.Linear(4, 1)

    def evaluate() -> None:
        thread = threading.Thread(target=model, args=(torch.full((2, 4), 1e9),))
        thread.start()
        thread.join()

    with watching(model):
        train(model, iter([(torch.ones(2, 4),)] * 15), evaluate)
    assert exporter.values(names.INPUT_MEAN) == [1.0]


SECOND = 10**9


def looked_at(step: int, until: int, monkeypatch: pytest.MonkeyPatch, *, look: int = 0) -> list[int]:
    """When inputs were looked at, of steps that take so long each, of which none is observed."""
    model = nn.Linear(4, 1)
    clock = count(0, look)
    monkeypatch.setattr(measures, "perf_counter_ns", lambda: next(clock))
    measuring = measures.Measures(None, [Model("net", model)], start=0)  # type: ignore[arg-type]
    watched: Any = SimpleNamespace(index=0, leads=True, reader=SimpleNamespace(devices=()))
    for now in range(step, until, step):
        if now >= measuring.look_at:
            measuring.step_ended(watched, now, now // step, optimizers=1, skipped=False)
        model(torch.ones(2, 4))
    return [
        point.time
        for batch in measuring.points(until)
        if batch.metric is names.INPUT_MEAN
        for point in batch.points
    ]


def test_inputs_are_looked_at_often_at_first_and_then_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    times = looked_at(SECOND // 100, 10 * SECOND, monkeypatch)
    assert sum(time < SECOND for time in times) >= 4
    assert {later - earlier for earlier, later in pairwise(times) if earlier > 2 * SECOND} == {SECOND}


def test_inputs_that_take_long_take_a_thousandth_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = looked_at(SECOND // 100, 20 * SECOND, monkeypatch, look=SECOND // 200)
    assert {later - earlier for earlier, later in pairwise(times)} == {5 * SECOND}


def test_two_models_have_their_names_in_front(watching: Watching, exporter: InMemoryExporter) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 1)
    model = nn.Sequential(first, second)
    with watching({"first": first, "second": second}):
        train(model, iter([(torch.ones(2, 4),)] * 15))
    found = {point.attributes[names.INPUT_NAME] for point in exporter.points(names.INPUT_MEAN)}
    assert found == {"first.0", "second.0"}


def test_one_flag_turns_inputs_off(watching: Watching, exporter: InMemoryExporter) -> None:
    model = nn.Linear(4, 1)
    with watching(model, inputs=False):
        train(model, iter([(torch.ones(2, 4),)] * 15))
    assert exporter.points(names.INPUT_NONFINITE) == []


def test_a_model_copied_or_saved_with_a_probe_on_it_works_without_gradwatch() -> None:
    model = nn.Linear(4, 1)
    taken: list[Any] = []
    probe = InputProbe(model, taken.append)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    saved = io.BytesIO()
    torch.save(model, saved)
    x = torch.ones(2, 4)
    for other in copies:
        assert other(x).shape == (2, 1)
    assert taken == []
    program = (
        "import io, sys, torch\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'gradwatch': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "model = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)\n"
        "print(tuple(model(torch.ones(2, 4)).shape))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], input=saved.getvalue(), capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == "(2, 1)"
    model(x)
    assert [name for name, _ in taken[0]] == ["0"]
    probe.remove()
    assert not model._forward_pre_hooks
