"""``gradwatch runs compare`` shows what differs between runs, and what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_collector.records import NO_RANK
from gradwatch_collector.storage.database import transaction
from gradwatch_collector.storage.retention import Policy, prune
from tests.batches import at, batch, event, source
from tests.schemas import valid
from tests.told_runs import tell, tell_run

HOUR = 3600
DAY = 86_400 * 1_000_000_000


@pytest.fixture
def prices(tmp_path: Path) -> str:
    file = tmp_path / "prices.yaml"
    file.write_text("currency: EUR\ndevices:\n  NVIDIA H200: 3\ncpuHost: 0.36\n")
    return str(file)


def compare(database_url: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["runs", "compare", "--db", database_url, *arguments])


def facts(database_url: str, *arguments: str) -> dict[str, dict[str, Any]]:
    """What is compared, by name, of output that is as its schema says."""
    result = compare(database_url, *arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    valid(found, "run-comparison")
    return {fact["name"]: fact for fact in found["facts"]}


def values(fact: dict[str, Any]) -> list[Any]:
    return [each["value"] for each in fact["values"]]


def test_only_what_differs_is_shown_numbers_with_their_change(database: Engine, database_url: str) -> None:
    tell_run(database, "old", 0, seconds=20, resource={c.TORCH_VERSION: "2.9", c.SEED: "1", "lab.queue": "a"})
    tell_run(
        database, "new", 100, seconds=30, resource={c.TORCH_VERSION: "2.13", c.SEED: "1", "lab.queue": "b"}
    )
    found = facts(database_url, "old", "new")
    assert values(found["torch"]) == ["2.9", "2.13"]
    assert values(found["lab.queue"]) == ["a", "b"]
    assert values(found["duration"]) == [20.0, 30.0]
    assert [each["change"] for each in found["duration"]["values"]] == [None, 0.5]
    assert found["step time (median)"]["values"][1]["change"] == pytest.approx(0.5)
    same = {"seed", "loss (last)", "gradient norm (median)", "learning rate (first)", "model", "commit"}
    assert not same & found.keys()
    everything = facts(database_url, "old", "new", "--all")
    assert same <= everything.keys()
    assert not any(everything[name]["differs"] for name in same)
    assert values(everything["loss (lowest)"]) == [0.5, 0.5]

    lines = compare(database_url, "old", "new").output.splitlines()
    assert lines[0].split() == ["What", "old", "new"]
    assert any(line.split() == ["versions", "torch", "2.9", "2.13"] for line in lines)
    assert any("30.0 s (+50 %)" in line for line in lines)
    assert (
        "| versions | torch | 2.9 | 2.13 |"
        in compare(database_url, "old", "new", "--format", "markdown").output
    )


def test_norms_of_sharded_parameters_are_those_of_all_ranks(database: Engine, database_url: str) -> None:
    losses = [2.0, 1.0, 3.0]
    tell_run(database, "whole", 0, losses=losses)
    for rank, share in enumerate([0.25, 0.75]):
        tell_run(database, "sharded", 0, losses=losses, rank=rank, share=share)
    found = facts(database_url, "whole", "sharded", "--all")
    assert values(found["gradient norm (median)"]) == [6.0, pytest.approx(6.0)]
    assert values(found["gradient norm (highest)"]) == [9.0, pytest.approx(9.0)]


def test_any_number_of_runs_is_compared_with_the_first(database: Engine, database_url: str) -> None:
    for index, loss in enumerate([2.0, 1.0, float("nan")]):
        tell_run(database, f"run-{index}", 100 * index, losses=[2.0, loss])
    found = facts(database_url, "run-0", "run-1", "run-2")
    last = found["loss (last)"]["values"]
    assert [(each["run_id"], each["value"], each["nonfinite"], each["change"]) for each in last] == [
        ("run-0", 2.0, False, None),
        ("run-1", 1.0, False, -0.5),
        ("run-2", None, True, None),
    ]


def test_one_run_is_compared_with_the_last_good_one_of_its_job_model_and_dataset(
    database: Engine, database_url: str
) -> None:
    tell_run(database, "too-old", 0)
    tell_run(database, "good", 100, losses=[3.0, 2.0])
    tell_run(database, "failed", 200, ending={"STATUS": "failed"})
    tell_run(database, "other-model", 300, resource={c.MODEL: "other"})
    tell_run(database, "other-data", 300, resource={c.DATASET: "other"})
    tell_run(database, "other-job", 300, resource={c.SERVICE_NAME: "other"})
    tell_run(database, "not-over", 390, seconds=20)
    tell_run(database, "this", 400, seconds=30)
    assert compare(database_url, "this").output.split()[:3] == ["What", "good", "this"]
    lonely = compare(database_url, "other-job")
    assert lonely.exit_code == 1
    assert lonely.output.startswith(
        "Error: no run of job 'other' with the same model and dataset had succeeded"
    )


def test_runs_that_name_neither_model_nor_dataset_have_a_last_good_one_too(
    database: Engine, database_url: str
) -> None:
    nothing = {c.MODEL: None, c.DATASET: None}
    tell_run(database, "good", 0, resource=nothing)
    tell_run(database, "named", 100)
    tell_run(database, "this", 200, seconds=30, resource=nothing)
    assert compare(database_url, "this").output.split()[:3] == ["What", "good", "this"]


def test_runs_cost_their_devices_hours_over_all_attempts_and_ranks(
    database: Engine, database_url: str, prices: str
) -> None:
    h200 = {c.DEVICE_NAME: "NVIDIA H200"}
    # Two ranks of one device each for an hour; then one attempt more, of half an hour.
    for rank in (0, 1):
        tell_run(
            database, "two", 0, seconds=HOUR, rank=rank, resource=h200, devices=["cuda:0"],
            ending={"STATUS": "failed", "WILL_RETRY": True},
        )  # fmt: skip
        tell_run(
            database, "two", 2 * HOUR, seconds=HOUR / 2, rank=rank, attempt=2, resource=h200, devices=["cuda:0"]
        )
    supervisor = source("two", rank=NO_RANK, attempt=2, instance="supervisor", supervisor=True)
    tell(database, batch(supervisor, event(c.RUN_STARTED, 0)), 3 * HOUR)
    # One process with two devices, and two on the CPU of one host.
    tell_run(database, "both", 0, seconds=HOUR, resource=h200, devices=["cuda:0", "cuda:1"])
    for rank in (0, 1):
        tell_run(database, "cpu", 0, seconds=HOUR, rank=rank)
    found = facts(database_url, "two", "both", "cpu", "--prices", prices)
    assert values(found["time on NVIDIA H200"]) == [3.0, 2.0, None]
    assert values(found["time on CPU host"]) == [None, None, 1.0]
    assert values(found["cost"]) == [9.0, 6.0, 0.36]
    assert found["cost"]["unit"] == "EUR"
    assert "6.00 EUR (-33.3 %)" in compare(database_url, "two", "both", "--prices", prices).output


@pytest.mark.parametrize(
    "resource", [{c.DEVICE_NAME: "NVIDIA B200"}, {}], ids=["without a price", "of no name"]
)
def test_what_has_no_price_has_an_unknown_cost_and_never_none(
    database: Engine, database_url: str, prices: str, resource: dict[str, str]
) -> None:
    tell_run(database, "one", 0, seconds=HOUR, resource=resource, devices=["cuda:0"])
    tell_run(database, "other", 0, seconds=HOUR)
    found = facts(database_url, "one", "other", "--prices", prices)
    assert values(found["cost"]) == [None, 0.36]


def test_without_prices_there_is_no_cost(database: Engine, database_url: str) -> None:
    tell_run(database, "one", 0)
    tell_run(database, "other", 0, seconds=40)
    assert "cost" not in facts(database_url, "one", "other", "--all")


def test_the_price_table_may_be_named_by_the_environment_and_its_mistakes_are_told(
    database_url: str, database: Engine, tmp_path: Path
) -> None:
    tell_run(database, "one", 0)
    file = tmp_path / "wrong.yaml"
    file.write_text("currency: EUR\ncpuHost: cheap\n")
    result = CliRunner().invoke(
        main, ["runs", "compare", "one", "one", "--db", database_url], env={"GRADWATCH_PRICES": str(file)}
    )
    assert (result.exit_code, result.output) == (
        1, f"Error: {file}:2: cpuHost: found 'cheap', expected a number\n",
    )  # fmt: skip


def test_numbers_that_were_rolled_up_are_compared_as_well(database: Engine, database_url: str) -> None:
    losses = [float(step % 7 + 1) for step in range(200)]
    tell_run(database, "old", 0, losses=losses)
    tell_run(database, "new", 100, losses=losses)
    before = facts(database_url, "old", "new", "--all")
    prune(lambda: transaction(database), Policy(raw=0, rollups=1000 * DAY), at(10 * 86_400))
    after = facts(database_url, "old", "new", "--all")
    for name in ("loss (last)", "loss (lowest)", "gradient norm (highest)", "headroom (lowest)"):
        assert values(after[name]) == values(before[name]), name
    # Of the medians the means of 64 steps are left.
    assert values(after["gradient norm (median)"]) == [pytest.approx(12, rel=0.1)] * 2


def test_runs_that_do_not_differ_and_runs_that_are_not_there(database: Engine, database_url: str) -> None:
    tell_run(database, "one", 0)
    assert compare(database_url, "one", "one").output == "nothing that is known differs between one, one\n"
    missing = compare(database_url, "one", "\x1b[31mtwo")
    assert (missing.exit_code, "\x1b" in missing.output) == (1, False)
    assert "`gradwatch runs list` names them" in missing.output
    assert compare(database_url).exit_code == 2


def test_nothing_in_telemetry_steers_a_terminal_or_leaves_its_cell(database: Engine, database_url: str) -> None:
    for index, text in enumerate(["\x1b[31mred", "a | b\n| c"]):
        tell_run(database, f"run-{index}", 0, resource={c.GIT_COMMIT: text, "x\x1b[2J": text})
    table = compare(database_url, "run-0", "run-1").output
    assert "\x1b" not in table
    assert "\\x1b[31mred" in table
    markdown = compare(database_url, "run-0", "run-1", "--format", "markdown").output
    assert r"\\x1b\[31mred | a \| b\\n\| c |" in markdown
