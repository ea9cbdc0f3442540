"""`with gradwatch.run(...)`: several runs in one process, each with its own ending."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import conventions as names
from gradwatch import current_run as runs
from gradwatch.testing import InMemoryExporter


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()


def trial(steps: int, **settings: Any) -> InMemoryExporter:
    """Train a new model, watched."""
    exporter = InMemoryExporter()
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradwatch.watch(model, optimizer, every=1, exporter=exporter, **settings)
    train(model, optimizer, steps)
    return exporter


def ending(exporter: InMemoryExporter) -> tuple[object, object]:
    (event,) = exporter.find_events(names.RUN_ENDED.name)
    return event.attributes[names.STATUS], event.attributes.get(names.REASON)


def test_each_block_is_a_run_of_its_own() -> None:
    exporters = []
    for number in range(2):
        with gradwatch.run(job="sweep", run_id=f"trial-{number}", team="research"):
            exporters.append(trial(3, team="mine"))
    for number, exporter in enumerate(exporters):
        assert exporter.resource[names.RUN_ID] == f"trial-{number}"
        assert exporter.resource[names.SERVICE_NAME] == "sweep"
        assert exporter.resource[names.TEAM] == "mine"
        assert exporter.values(names.STEP_INDEX) == [0, 1, 2]
        assert ending(exporter) == ("succeeded", None)
    assert runs.current() is None


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [(ValueError("bad"), "failed", "ValueError"), (KeyboardInterrupt(), "cancelled", "interrupted")],
)
def test_it_ends_as_its_block_does(error: BaseException, status: str, reason: str) -> None:
    exporters = []
    with pytest.raises(type(error)), gradwatch.run(run_id="trial"):
        exporters.append(trial(1))
        raise error
    assert ending(exporters[0]) == (status, reason)


def test_the_run_around_it_goes_on_and_takes_nothing_from_it() -> None:
    outer = InMemoryExporter()
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, every=1, exporter=outer, run_id="outer"):
        train(model, optimizer, 2)
        with gradwatch.run(run_id="inner"):
            inner = trial(4)
        assert runs.current() is not None
        train(model, optimizer, 1)
    assert inner.values(names.STEP_INDEX) == [0, 1, 2, 3]
    assert len(inner.values(names.LOSS)) == 4
    assert outer.values(names.STEP_INDEX) == [0, 1, 2]
    assert len(outer.values(names.LOSS)) == 3
    assert [exporter.resource[names.RUN_ID] for exporter in (outer, inner)] == ["outer", "inner"]
    assert ending(outer) == ending(inner) == ("succeeded", None)


def test_a_block_in_which_nobody_watches_is_no_run() -> None:
    with gradwatch.run(job="nothing"):
        pass
    assert runs.current() is None


def test_a_setting_that_cannot_be_used_is_said_at_once() -> None:
    with pytest.raises(gradwatch.SettingsError, match="tier"), gradwatch.run(tier="gold"):
        raise AssertionError


def test_the_run_id_of_the_environment_is_not_that_of_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWATCH_RUN_ID", "of-the-process")
    monkeypatch.setenv("GRADWATCH_ATTEMPT", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of-the-launcher")
    with gradwatch.watch(nn.Linear(3, 2), exporter=InMemoryExporter()) as watch:
        assert watch.run_id == "of-the-process"
    exporters = []
    for settings in ({}, {}, {"run_id": "mine"}):
        with gradwatch.run(job="sweep", **settings):
            exporters.append(trial(1))
    ids = [exporter.resource[names.RUN_ID] for exporter in exporters]
    assert len({*ids, "of-the-process", "of-the-launcher"}) == 5
    assert ids[2] == "mine"
    assert [exporter.resource.get(names.RUN_ATTEMPT) for exporter in exporters] == [None, None, 2]


def test_a_block_beside_another_threads_is_not_watched_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    beside = []

    def other() -> None:
        with gradwatch.run(run_id="beside"):
            beside.append(trial(3))
            raise ValueError("only this trial is bad")

    def told(arguments: Any) -> None:
        assert arguments.exc_type is ValueError

    before, threading.excepthook = threading.excepthook, told
    try:
        with gradwatch.run(run_id="first"):
            first = trial(2)
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            current = runs.current()
            assert current is not None
            assert current.identity.run_id == "first"
            assert gradwatch.watch().run_id == "first"
    finally:
        threading.excepthook = before
    assert ending(first) == ("succeeded", None)
    assert beside[0].events == []
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "not watched" in caplog.text
    with gradwatch.run(run_id="after"):
        after = trial(1)
    assert ending(after) == ("succeeded", None)
