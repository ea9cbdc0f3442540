"""Data wait: what the training thread waits for, and nothing else, by a clock that only loading moves."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import gradwatch
from gradwatch import conventions as names
from gradwatch.measures import data_wait, stopwatch
from gradwatch.measures.data_wait import _ITERATOR
from gradwatch.testing import InMemoryExporter

Watching = Callable[..., gradwatch.Watch]


class Loading:
    """The clock: nanoseconds so far."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Loading:
    loading = Loading()
    monkeypatch.setattr(data_wait, "perf_counter_ns", loading)
    return loading


class Samples(Dataset[torch.Tensor]):
    """Eight samples; the n-th takes n + 1 seconds."""

    def __init__(self, clock: Loading, nested: bool = False) -> None:
        self._clock = clock
        self._nested = nested

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        self._clock.now += (index + 1) * 10**9
        if self._nested:
            return next(iter(DataLoader(Samples(self._clock), batch_size=1)))[0]  # type: ignore[no-any-return]
        return torch.ones(4)


Loop = tuple[tuple[Any, ...], Callable[[], None]]


def loop(batches: Any, before_step: Callable[[], object] = bool) -> Loop:
    """A model and an optimizer, and what trains them."""
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run() -> None:
        for x in batches:
            optimizer.zero_grad()
            model(x).mean().backward()
            before_step()
            optimizer.step()

    return (model, optimizer), run


def waits(exporter: InMemoryExporter) -> list[float]:
    return [float(value) for value in exporter.values(names.DATA_WAIT)]


def test_each_step_has_the_wait_for_its_own_batch(
    watching: Watching, exporter: InMemoryExporter, clock: Loading
) -> None:
    objects, run = loop(DataLoader(Samples(clock), batch_size=2))
    with watching(*objects, every=3):
        run()
    assert waits(exporter) == [3, 7, 11, 15]
    steps = [point.time for point in exporter.points(names.STEP_INDEX)]
    assert [point.time for point in exporter.points(names.DATA_WAIT)] == steps


def test_a_loop_without_any_loader_reports_no_wait_rather_than_zero(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    objects, run = loop([torch.ones(2, 4)] * 3)
    with watching(*objects):
        run()
    assert waits(exporter) == []


def test_a_loader_inside_a_loader_is_counted_once(
    watching: Watching, exporter: InMemoryExporter, clock: Loading
) -> None:
    objects, run = loop(DataLoader(Samples(clock, nested=True), batch_size=8))
    with watching(*objects):
        run()
    assert waits(exporter) == [36 + 8]


@pytest.mark.parametrize("every", [1, 100])
def test_evaluation_inside_a_wait_and_a_wait_inside_evaluation_are_no_wait_and_no_phase(
    watching: Watching,
    exporter: InMemoryExporter,
    clock: Loading,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
) -> None:
    monkeypatch.setattr(stopwatch, "perf_counter_ns", clock)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with watching(model, optimizer, every=every) as watch:

        def fetch() -> torch.Tensor:
            clock.now += 10**9
            with watch.evaluation():
                clock.now += 100 * 10**9
                with watch.data_wait(), watch.evaluation():
                    clock.now += 100 * 10**9
            clock.now += 10**9
            return torch.ones(2, 4)

        for _ in range(4):
            with watch.data_wait():
                x = fetch()
            model(x).mean().backward()
            optimizer.step()
    assert waits(exporter) == [2, 2, 2, 2]
    forward = [point.value for point in exporter.points(names.PHASE_DURATION, **{names.PHASE: "forward"})]
    assert set(forward) == {0.0}


def test_workers_wait_for_themselves_and_training_for_them(
    watching: Watching, exporter: InMemoryExporter
) -> None:
    class Worker(Dataset[bool]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> bool:
            return _ITERATOR.__next__ is torch_own

    torch_own = _ITERATOR.__next__
    model = nn.Linear(4, 1)
    with watching(model, torch.optim.SGD(model.parameters(), lr=0.01)):
        assert _ITERATOR.__next__ is not torch_own
        loader = DataLoader(
            Worker(), batch_size=4, num_workers=1, multiprocessing_context=multiprocessing.get_context("fork")
        )
        assert [batch.tolist() for batch in loader] == [[True] * 4]
    assert _ITERATOR.__next__ is torch_own


class Failing(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        yield torch.ones(4)
        raise LookupError("no such sample")


def test_errors_and_the_end_of_the_data_pass_through_untouched(watching: Watching, clock: Loading) -> None:
    objects, _ = loop(())
    with watching(*objects):
        failing = iter(DataLoader(Failing(), batch_size=1))
        next(failing)
        with pytest.raises(LookupError, match="no such sample"):
            next(failing)
        short = iter(DataLoader(Samples(clock), batch_size=8))
        next(short)
        with pytest.raises(StopIteration):
            next(short)
        assert next(short, None) is None


def test_evaluation_s_waits_are_not_the_step_s(
    watching: Watching, exporter: InMemoryExporter, clock: Loading
) -> None:
    held_out = DataLoader(Samples(clock), batch_size=1)

    def evaluate() -> None:
        with torch.no_grad():
            for _ in held_out:
                pass
        assert run is not None
        run.observer.measures.suspend()
        for _ in held_out:
            pass
        run.observer.measures.resume()

    objects, train = loop(DataLoader(Samples(clock), batch_size=4), evaluate)
    with watching(*objects) as watch:
        run = watch._run
        train()
    assert waits(exporter) == [10, 26]


def test_another_thread_s_waits_are_not_training_s(
    watching: Watching, exporter: InMemoryExporter, clock: Loading
) -> None:
    def prefetch() -> None:
        for _ in DataLoader(Samples(clock), batch_size=1):
            pass

    def in_another_thread() -> None:
        thread = threading.Thread(target=prefetch)
        thread.start()
        thread.join()

    objects, run = loop(DataLoader(Samples(clock), batch_size=4), in_another_thread)
    with watching(*objects):
        run()
    assert waits(exporter) == [10, 26]


def test_a_loop_in_another_thread_than_its_watch_is_training_all_the_same(
    watching: Watching, exporter: InMemoryExporter, clock: Loading
) -> None:
    objects, run = loop(DataLoader(Samples(clock), batch_size=2))
    with watching(*objects):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert waits(exporter) == [7, 11, 15]


def test_any_other_source_is_named_by_the_user(
    watching: Watching, exporter: InMemoryExporter, clock: Loading
) -> None:
    def batches() -> Iterator[torch.Tensor]:
        for seconds in (1, 2, 3):
            with watch.data_wait():
                clock.now += seconds * 10**9
                with watch.data_wait():
                    batch = next(iter(DataLoader(Samples(clock), batch_size=4)))
            yield batch

    objects, run = loop(batches())
    watch = watching(*objects)
    run()
    watch.close()
    assert waits(exporter) == [11, 12, 13]


def test_a_watch_that_watches_nothing_still_lets_data_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWATCH_DISABLED", "1")
    with gradwatch.watch(nn.Linear(2, 1)).data_wait():
        pass


def test_a_wrapper_put_around_ours_keeps_working_after_close(watching: Watching, clock: Loading) -> None:
    torch_own = _ITERATOR.__next__
    objects, _ = loop(())
    try:
        with watching(*objects):
            ours = _ITERATOR.__next__
            _ITERATOR.__next__ = lambda iterator: ours(iterator)
        assert len(list(DataLoader(Samples(clock), batch_size=4))) == 2
    finally:
        _ITERATOR.__next__ = torch_own
