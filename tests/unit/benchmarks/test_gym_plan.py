"""Which runs are played, and that what is reported has nothing to do with what was tuned on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gradwatch.conventions import RULE_ALERTS
from gym import data
from gym.fault import EVERYWHERE
from gym.faults import KINDS
from gym.plan import HEALTHY, SETS, PlannedRun, plan, short_plan

TUNING, REPORT = SETS


def test_a_plan_is_the_same_each_time_it_is_made() -> None:
    assert plan(TUNING) == plan(TUNING)


def test_what_a_run_is_does_not_depend_on_what_else_is_asked_for() -> None:
    narrow = plan(TUNING, families=("gpt",), faults=("plateau", HEALTHY), healthy_seeds=2)

    assert len(narrow) == 4
    assert set(narrow) <= set(plan(TUNING))


def test_no_run_and_no_seed_is_in_both_sets() -> None:
    tuning, report = plan(TUNING, runs=3), plan(REPORT, runs=3)

    assert not {run.run_id for run in tuning} & {run.run_id for run in report}
    assert {run.seed % 2 for run in tuning} == {0}
    assert {run.seed % 2 for run in report} == {1}


def test_the_runs_of_a_set_have_seeds_of_their_own() -> None:
    planned = plan(REPORT)

    assert len({run.run_id for run in planned}) == len(planned)
    assert len({run.seed for run in planned}) == len(planned)


def test_there_are_at_least_fifty_healthy_runs() -> None:
    assert len(plan(REPORT, faults=(HEALTHY,))) >= 50


@pytest.mark.parametrize("fault", KINDS)
def test_each_fault_is_planted_strong_and_weak_in_every_family_of_its(fault: str) -> None:
    planted = [(run.family, run.strength) for run in plan(REPORT, faults=(fault,))]

    assert planted == [
        (family, strength) for family in KINDS[fault].families for strength in ("strong", "weak")
    ]


def test_every_family_has_faults() -> None:
    assert {family for kind in KINDS.values() for family in kind.families} == set(EVERYWHERE)


def test_a_fault_comes_in_the_course_of_a_run_or_is_there_from_the_start() -> None:
    for run in plan(REPORT):
        from_start = run.fault is None or KINDS[run.fault].from_start
        assert run.place == 0.0 if from_start else 0.3 <= run.place <= 0.6


def test_faults_come_at_different_steps() -> None:
    assert len({run.place for run in plan(REPORT, faults=("corrupt_batch",))}) > 6


def test_what_is_expected_of_a_fault_are_rules_that_there_are() -> None:
    for kind in KINDS.values():
        assert kind.expected
        assert kind.expected | kind.companions <= set(RULE_ALERTS)


def test_a_planned_run_can_be_told_to_a_process() -> None:
    for run in plan(TUNING):
        assert PlannedRun.from_json(run.to_json()) == run


def test_runs_whose_failures_are_counted_are_a_job_of_their_own() -> None:
    jobs = [run.job for run in plan(TUNING, families=("mlp",))]

    assert jobs.count("gym-mlp") == len(jobs) - 2


def test_a_short_plan_is_part_of_the_whole_one() -> None:
    assert set(short_plan(REPORT)) <= set(plan(REPORT))
    assert len(short_plan(REPORT)) == 13


@pytest.mark.parametrize("read", [data.digits, lambda variant: data.scan_lines(variant, 24)])
def test_no_sample_is_in_both_sets_or_both_learned_and_validated_with(
    read: Callable[[str], tuple[data.Batch, data.Batch]],
) -> None:
    parts = [tensors[0].flatten(1) for variant in SETS for tensors in read(variant)]
    rows = [{row.numpy().tobytes() for row in part if row.std() > 1e-2} for part in parts]

    for position, some in enumerate(rows):
        assert some
        for others in rows[position + 1 :]:
            assert len(some & others) <= 0.001 * len(some)


def test_the_texts_of_the_two_sets_are_different_ones() -> None:
    (tuning, _), _, _ = data.text(TUNING, 48)
    (report, _), _, _ = data.text(REPORT, 48)

    assert tuning.shape != report.shape


def test_a_loader_gives_as_many_batches_as_asked_for_and_says_when_it_reads(tmp_path: Path) -> None:
    reads = []
    batches = list(data.loader((torch.arange(10),), 4, 5, lambda: reads.append(1)))

    assert [len(rows) for (rows,) in batches] == [4] * 5
    assert len(reads) == 5
