"""Each fault does what it says, at its step, and no healthy run has it."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from gradwatch import conventions as c
from gradwatch.checkpoints.finding import verify
from gym.fault import EVERYWHERE
from gym.faults import KINDS, machine
from gym.train import NOTE

Play = Callable[..., Any]
NONFINITE = ("division_in_forward", "division_in_loss", "division_in_backward", "corrupt_batch")
STRENGTHS = ("strong", "weak")


def bad_steps(played: Any) -> list[int]:
    return [event.attributes[c.STEP] for event in played.exporter.find_events(c.NONFINITE_STEP.name)]


def losses(played: Any) -> list[float]:
    return list(played.exporter.values(c.LOSS))


@pytest.mark.parametrize("fault", NONFINITE)
@pytest.mark.parametrize("family", EVERYWHERE)
@pytest.mark.usefixtures("one_rank")
def test_a_nan_is_born_where_the_note_says(fault: str, family: str, play: Play) -> None:
    if family not in KINDS[fault].families:
        pytest.skip("its inputs are no floats")
    played = play(fault, "weak", family=family)

    first = played.exporter.find_events(c.NONFINITE_STEP.name)[0].attributes
    note = json.loads((played.folder / NOTE).read_text())

    assert note["step"] == played.fault.step
    # What a generator does is after the critic's step.
    assert first[c.STEP] - note["step"] in ((0, 1) if family == "gan" else (0,))
    assert first[c.BORN_IN] == note["born_in"]
    layer = first.get(c.LAYER_NAME)
    assert note["layer"] == (str(layer).rpartition(".")[0] if note["born_in"] == "backward" else layer)


@pytest.mark.parametrize("fault", NONFINITE)
def test_a_strong_nan_stays_and_a_weak_one_is_passed_over(fault: str, play: Play) -> None:
    strong, weak = play(fault, "strong"), play(fault, "weak")

    assert len(bad_steps(strong)) > 3
    assert len(bad_steps(weak)) == 1
    assert all(torch.isfinite(parameter).all() for parameter in weak.training.models[""].parameters())


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_bomb_multiplies_the_learning_rate_from_its_step_on(strength: str, play: Play) -> None:
    played = play("learning_rate_bomb", strength)
    rates = played.exporter.values(c.LEARNING_RATE)
    before, after = rates[played.fault.step - 1], rates[played.fault.step]

    assert after / before > (250 if strength == "strong" else 30)
    assert min(rates[played.fault.step :]) > max(rates[: played.fault.step])


def test_a_plateau_does_not_learn(play: Play) -> None:
    sick, healthy = losses(play("plateau", steps=24)), losses(play(None, steps=24))

    assert sick[-1] > 0.95 * sick[0]
    assert healthy[-1] < 0.9 * healthy[0]


@pytest.mark.parametrize("strength", STRENGTHS)
def test_over_clipping_cuts_gradients_from_its_step_on(strength: str, play: Play) -> None:
    played = play("over_clipping", strength, family="gpt")
    ratios = played.exporter.values(c.CLIP_RATIO)

    assert min(ratios[: played.fault.step]) > 0.3
    assert max(ratios[played.fault.step :]) < 0.1


def test_stale_gradients_are_those_of_earlier_steps_and_reported_so(play: Play) -> None:
    played = play("stale_gradients", "weak", steps=30)
    told = played.exporter.points(c.LOGGED, **{c.METRIC_NAME: "gradient_staleness"})

    assert [point.value for point in told][: played.fault.step] == [0.0] * played.fault.step
    assert 6 <= told[-1].value <= 10


def test_noisy_gradients_come_of_tiny_batches(play: Play) -> None:
    assert [play("noisy_gradients", strength).recipe.batch for strength in STRENGTHS] == [1, 3]


@pytest.mark.parametrize("strength", STRENGTHS)
def test_bad_weights_are_far_from_good_ones(strength: str, play: Play) -> None:
    sick, healthy = (played.exporter.values(c.WEIGHT_NORM)[0] for played in (
        play("bad_initialisation", strength), play(None)
    ))  # fmt: skip

    assert sick > (25 if strength == "strong" else 8) * healthy


@pytest.mark.parametrize("family", ["mlp", "cnn"])
def test_gradients_vanish_in_many_sigmoids(family: str, play: Play) -> None:
    played = play("sigmoid_depth", family=family)
    weights = [each for each in played.training.models[""].parameters() if each.dim() > 1]

    assert float(weights[0].grad.norm()) < 1e-3 * float(weights[-1].grad.norm())


def test_an_overflow_makes_the_loss_scale_fall_and_fall(play: Play) -> None:
    played = play("half_overflow")
    scales = played.exporter.values(c.LOSS_SCALE)

    assert scales[0] == scales[played.fault.step]
    assert scales[-1] < scales[0] / 8


def test_labels_are_wrong_from_a_step_on(play: Play) -> None:
    played = play("label_noise", steps=80)
    course = losses(played)

    assert min(course[played.fault.step :]) > 1.2 * course[played.fault.step - 1]


@pytest.mark.parametrize("strength", STRENGTHS)
def test_inputs_are_others_from_a_step_on(strength: str, play: Play) -> None:
    fault = play("input_shift", strength).fault
    pictures = torch.rand(64, 1, 8, 8)

    fault.now = fault.step - 1
    assert torch.equal(fault.batch((pictures,))[0], pictures)
    fault.now = fault.step
    assert float(fault.batch((pictures,))[0].mean()) > 1.5 * float(pictures.mean())


@pytest.mark.parametrize("strength", STRENGTHS)
def test_overfitting_learns_a_few_samples_by_heart_and_no_others(strength: str, play: Play) -> None:
    played = play("overfitting", strength, steps=240)
    validated = [p.value for p in played.exporter.points(c.LOGGED, **{c.METRIC_NAME: "val_loss"})]

    assert losses(played)[-1] < 0.01
    assert validated[-1] > 1.1 * min(validated)


def test_without_a_seed_the_run_does_not_choose_its_own(play: Play) -> None:
    torch.manual_seed(4321)
    played = play("missing_seed")

    assert played.exporter.resource[c.SEED] == "4321"
    assert play(None).exporter.resource[c.SEED] != "4321"


def test_a_starved_loop_waits_for_batches_for_longer_than_it_trains(play: Play) -> None:
    played = play("starved_loader", steps=60)
    waited = played.exporter.values(c.DATA_WAIT)
    slept = played.fault._step_seconds * 5

    assert min(waited[played.fault.step :]) >= slept
    assert sorted(waited[: played.fault.step])[played.fault.step // 2] < slept


def test_one_rank_is_slow_and_not_the_one_that_reports(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(machine.time, "sleep", slept.append)
    fault = machine.SlowRank(step=5, is_strong=True, chance=None, rank=1, folder=None)  # type: ignore[arg-type]
    for fault.now in range(10):
        fault.batch(())
    fault.rank = 0
    fault.batch(())

    assert slept == [0.1] * 5


def test_a_rank_hangs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(machine.time, "sleep", slept.append)
    fault = machine.HungRank(step=5, is_strong=True, chance=None, rank=1, folder=None)  # type: ignore[arg-type]
    for fault.now in range(10):
        fault.batch(())

    assert slept == [3600]


def test_a_weak_leak_keeps_nine_tenths_of_what_was_left(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.control_group, "join", lambda *_: None)
    monkeypatch.setattr(machine.MemoryLeak, "_MEBIBYTES", (psutil.Process().memory_info().rss >> 20) + 200)
    kept = sum(tensor.nbytes for tensor in play("memory_leak", "weak").fault._kept)

    assert 120 << 20 < kept < 200 << 20
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_crash_raises_the_same_exception_in_every_run(play: Play) -> None:
    for _ in range(2):
        with pytest.raises(KeyError, match="classes"):
            play("repeated_crash")


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_checkpoint_is_spoiled_after_it_was_saved(strength: str, play: Play) -> None:
    played = play("truncated_checkpoint", strength)
    states = [verify(path).state for path in sorted(played.folder.glob("checkpoints/*.pt"))]

    assert len(played.exporter.find_events(c.CHECKPOINT_SAVED.name)) == 6
    assert {"good", "bad"} == set(states)


@pytest.mark.parametrize(("strength", "most"), [("strong", 6), ("weak", 1)])
def test_a_saver_fails_for_good_or_once_and_training_goes_on(strength: str, most: int, play: Play) -> None:
    played = play("failing_saver", strength)
    failed = played.exporter.find_events(c.CHECKPOINT_FAILED.name)

    assert 1 <= len(failed) <= most
    assert (len(failed) > 1) == (strength == "strong")
    assert "No space left" in str(failed[0].attributes[c.EXCEPTION_MESSAGE])
    assert len(losses(played)) == 12


def test_a_note_is_written_when_a_fault_comes(play: Play) -> None:
    played = play("label_noise")
    note = json.loads((played.folder / NOTE).read_text())

    assert note == {"step": played.fault.step, "time": note["time"], "born_in": None, "layer": None}
    assert math.isfinite(note["time"])


def test_every_fault_is_tested_here() -> None:
    tests = Path(__file__).read_text()

    assert [name for name, kind in KINDS.items() if name not in tests and kind.make.__name__ not in tests] == []
