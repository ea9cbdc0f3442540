"""Rules about inputs, seeds and how runs of one kind differ."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradwatch import conventions as c
from gradwatch_collector.findings.observation import Severity
from gradwatch_collector.findings.predecessors import Predecessor
from gradwatch_collector.findings.rules import input_shift, missing_seed, run_variance
from gradwatch_slo.runs import Status
from tests.run_views import RUNNING, number, view

# --- input_shift ----------------------------------------------------------------------------------------


def shifted(means: Sequence[float], spreads: Sequence[float]) -> bool:
    inputs = {
        c.INPUT_MEAN: [number(means, INPUT_NAME="0")],
        c.INPUT_STDDEV: [number(spreads, INPUT_NAME="0")],
    }
    return input_shift.detect(view(inputs), input_shift.Parameters()) is not None


def chance(level: float, count: int, deviation: float = 0.02) -> list[float]:
    return (level + np.random.default_rng(count).normal(0, deviation, count)).tolist()


def test_inputs_with_another_zero_or_another_unit_have_shifted() -> None:
    assert shifted(chance(0, 10) + chance(0.7, 3), chance(1, 13))
    assert shifted(chance(0, 13), chance(1, 10) + chance(2, 3))
    assert shifted(chance(0, 13), chance(1, 10) + chance(0.4, 3))


def test_an_odd_batch_at_the_start_hides_no_shift() -> None:
    assert shifted([5.0, *chance(0, 9), *chance(0.7, 3)], chance(1, 13))


def test_inputs_that_drift_ever_further_have_not() -> None:
    assert not shifted(np.linspace(0, 5, 100).tolist(), chance(1, 100))


@pytest.mark.parametrize("before", [10, 700])
def test_a_shift_is_told_until_the_inputs_are_what_they_were(before: int) -> None:
    def told(after: int, again: int = 0) -> bool:
        means = chance(0, before) + chance(0.7, after) + chance(0, again)
        return shifted(means, chance(1, len(means)))

    assert all(told(after) for after in (2, 5, 20, 100, 3000))
    assert not told(100, again=1)


def test_constant_batches_are_a_shift_and_two_of_them_hide_none() -> None:
    assert shifted(chance(5, 10) + [0.0] * 2, chance(1, 10) + [0.0] * 2)
    blank = [*chance(5, 5), 0.0, 0.0, *chance(5, 5)]
    assert shifted(blank + chance(300, 2), [*chance(1, 5), 0.0, 0.0, *chance(1, 7)])


def test_one_odd_batch_and_batches_that_always_differ_have_not() -> None:
    assert not shifted([*chance(0, 10), 3.0, 0.0], chance(1, 12))
    assert not shifted(chance(0, 300, deviation=0.3), chance(1, 300, deviation=0.1))


def test_inputs_that_are_all_the_same_have_no_spread_to_be_measured_by() -> None:
    assert not shifted([0.0] * 20, [0.0] * 20)


# --- missing_seed, run_variance -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        ("67280421310721", True),  # torch's own of old
        ("8112937314548217322", True),  # the system's
        ("0", False),
        ("1234", False),
        (str(2**32 - 1), False),
        ("", False),
        ("-1", False),
        (None, False),
    ],
)
def test_a_generator_that_nobody_seeded_is_a_remark(seed: str | None, expected: bool) -> None:
    found = missing_seed.detect(view(resource={c.SEED: seed}), missing_seed.Parameters())
    assert (found is not None) is expected
    assert missing_seed.RULE.severity is Severity.INFO


def test_an_unseeded_process_of_torch_begins_with_a_seed_that_the_rule_knows() -> None:
    program = "import torch; print(torch.initial_seed())"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    unseeded = view(resource={c.SEED: told.stdout.strip()})
    assert missing_seed.detect(unseeded, missing_seed.Parameters()) is not None


def predecessors(qualities: Sequence[float | None], **resource: Any) -> list[Predecessor]:
    run = replace(RUNNING, status=Status.SUCCEEDED)
    return [
        Predecessor(run=run, resource={c.CONFIG_HASH: "a", **resource}, summary={"quality": quality})
        for quality in qualities
    ]


def varying(known: Sequence[Predecessor], resource: Mapping[str, str] = {c.CONFIG_HASH: "a"}) -> bool:
    run = view(resource=resource, predecessors=known)
    return run_variance.detect(run, run_variance.Parameters()) is not None


def test_runs_of_one_configuration_that_end_far_apart_vary() -> None:
    assert varying(predecessors([-0.2, -0.5, -0.3, -0.9, -0.4]))


@pytest.mark.parametrize(("told", "shown"), [(True, True), (False, False), ("yes", None), (None, None)])
def test_whether_torch_was_held_to_deterministic_algorithms_is_told_with_it(
    told: Any, shown: bool | None
) -> None:
    resource = {c.CONFIG_HASH: "a", c.DETERMINISTIC: told}
    run = view(resource=resource, predecessors=predecessors([-0.2, -0.5, -0.3, -0.9, -0.4]))
    sighting = run_variance.detect(run, run_variance.Parameters())
    assert sighting is not None
    assert sighting.evidence["deterministic"] is shown


def test_runs_that_end_alike_but_for_one_do_not() -> None:
    assert not varying(predecessors([-0.2, -0.21, -0.19, -0.2, -0.22, -3.0]))


def test_few_runs_other_configurations_and_runs_without_a_quality_tell_nothing() -> None:
    spread = [-0.2, -0.5, -0.3, -0.9, -0.4]
    assert not varying(predecessors(spread[:4]))
    assert not varying(predecessors(spread, **{c.CONFIG_HASH: "b"}))
    assert not varying(predecessors(spread), resource={})
    assert not varying(predecessors([None, None, *spread[:3]]))
