"""The gym as it is played: a collector, training processes of their own, and what is seen of both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FAULT = "division_in_loss"
ARGUMENTS = ("--set", "report", "--families", "lstm", "--faults", f"healthy,{FAULT}", "--healthy", "1")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What is printed of a healthy run and two with a NaN, and the folder that they were kept in."""
    folder = tmp_path_factory.mktemp("gym")
    command = [sys.executable, str(BENCHMARKS / "findings.py"), *ARGUMENTS, "--keep", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout, folder


@pytest.fixture
def outcomes(played: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from gym import outcome

    kept = outcome.load(played[1] / outcome.TRUTH)
    return {each.planned.strength: each for each in kept}


def test_a_healthy_run_ends_well_and_nothing_is_found_of_it(outcomes: dict[Any, Any]) -> None:
    assert outcomes[None].exit_codes == (0,)
    assert not outcomes[None].findings


@pytest.mark.parametrize("strength", ["strong", "weak"])
def test_a_nan_is_found_at_its_step_and_where_it_was_born(outcomes: dict[Any, Any], strength: str) -> None:
    outcome = outcomes[strength]
    found = next(each for each in outcome.findings if each.rule == "nonfinite")

    assert found.step == outcome.injection.step
    assert found.born_in == outcome.injection.born_in == "loss"
    assert found.seen > outcome.injection.time


def test_the_result_is_printed_and_can_be_judged_again(played: tuple[str, Path]) -> None:
    printed, folder = played
    command = [sys.executable, str(BENCHMARKS / "findings.py"), "--judge", str(folder)]
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert again.strip() in printed
    assert "| strong faults found | 1 of 1 (100 %) |" in again
    assert "| found of 1 healthy runs | 0 pages, 0 tickets, 0 infos |" in again
    assert (folder / "gradwatch.db").exists()


def test_a_part_of_a_set_is_not_written_into_the_page(played: tuple[str, Path]) -> None:
    page = BENCHMARKS.parent / "docs" / "findings-benchmark.md"

    assert "3 runs of the report set" in played[0]
    assert "3 runs of the report set" not in page.read_text()


def test_a_family_that_there_is_not_is_refused() -> None:
    command = [sys.executable, str(BENCHMARKS / "findings.py"), "--families", "mlp,none"]
    refused = subprocess.run(command, check=False, capture_output=True, text=True)

    assert refused.returncode == 2
    assert "none is none of mlp, cnn" in refused.stderr
