"""``gradwatch runs watch``: how live runs stand, once in a pipe and again and again on a terminal."""

from __future__ import annotations

import itertools
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
from click.testing import CliRunner
from rich.cells import cell_len
from sqlalchemy import Engine

from gradwatch import conventions as c
from gradwatch.cli import main
from gradwatch_collector.commands.runs_watch import sparkline
from gradwatch_collector.findings import Observation, Severity, reconcile
from gradwatch_collector.storage.database import transaction
from tests.batches import at, batch, event, scalar, source
from tests.told_runs import tell


def train(database: Engine, run_id: str, losses: Sequence[float], since: int = 0, job: str = "digits") -> None:
    """A live run that tells of a step of a second for each loss."""
    seconds = range(since + 1, since + len(losses) + 1)
    sender = replace(source(run_id, instance=run_id), resource={c.SERVICE_NAME: job})
    tell(
        database,
        batch(
            sender, *([] if since else [event(c.RUN_STARTED, 0)]),
            frames=[
                scalar(c.STEP_INDEX, seconds, [second - 1 for second in seconds]),
                scalar(c.STEP_DURATION, seconds, [1.0] * len(losses)),
                scalar(c.LOSS, seconds, losses),
            ],
        ),
        since + len(losses),
    )  # fmt: skip


def find(database: Engine, severity: Severity, *found: tuple[str, str]) -> None:
    """Open findings, of each the run and the rule; all others are over."""
    seen = [
        Observation(run_id=run_id, attempt=1, rule=rule, severity=severity, first_seen=at(1), last_seen=at(1))
        for run_id, rule in found
    ]
    with transaction(database) as connection:
        reconcile(connection, seen, at(1))


def shown(database_url: str, *arguments: str) -> dict[str, str]:
    """Lines of the table, by the run that they begin with."""
    result = CliRunner().invoke(main, ["runs", "watch", "--db", database_url, *arguments])
    assert result.exit_code == 0, result.output
    return {line.split(" ")[0]: line for line in result.output.splitlines()[1:]}


def test_a_pipe_is_given_each_live_run_with_its_course_pace_and_findings(
    database: Engine, database_url: str
) -> None:
    train(database, "good", [8.0, 4.0, 2.0, 1.0])
    train(database, "sick", [1.0, float("nan"), float("nan")])
    find(database, Severity.PAGE, ("sick", c.RULE_NONFINITE))
    lines = shown(database_url)
    assert set(lines) == {"good", "sick"}
    assert lines["good"].split()[1:9] == [
        "digits",
        "running",
        "4",
        "1",
        "█▄▂▁",
        "1.0",
        "s",
        lines["good"].split()[8],
    ]
    assert "NaN  ▁xx" in lines["sick"]
    assert lines["sick"].endswith("nonfinite (page)")
    assert "nonfinite" not in lines["good"]


def test_runs_are_those_of_a_job_and_those_that_were_named(database: Engine, database_url: str) -> None:
    train(database, "a", [1.0])
    train(database, "b", [1.0])
    train(database, "c", [1.0], job="other")
    assert set(shown(database_url, "--job", "other")) == {"c"}
    assert set(shown(database_url, "a", "c")) == {"a", "c"}
    assert set(shown(database_url, "a", "c", "--job", "digits")) == {"a"}


def test_without_a_live_run_it_says_what_to_do(database: Engine, database_url: str) -> None:
    result = CliRunner().invoke(main, ["runs", "watch", "--db", database_url])
    assert (result.exit_code, result.output.count("\n")) == (0, 1)
    assert "gradwatch.watch(model, optimizer)" in result.output


def test_a_terminal_is_shown_what_is_new_until_it_is_interrupted(database: Engine, database_url: str) -> None:
    train(database, "digits-7", [2.0, 1.5])
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "gradwatch.cli",
        "runs",
        "watch",
        "--interval",
        "0.2",
        "--db",
        database_url,
    ]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    try:
        read_until(ours, "digits-7")
        train(database, "digits-7", [0.125], since=2)
        read_until(ours, "0.125")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert (process.returncode, errors) == (0, b"")


ALIKE = [f"sweep-2025-06-15-transformer-lr-0.001-seed-{seed}" for seed in (1, 2)]
LONG = f"{'x' * 90}-{'層' * 90}"


@pytest.mark.parametrize(
    ("columns", "left_out"),
    [(60, {"JOB", "STEP TAKES", "HEARD"}), (80, {"JOB", "STEP TAKES", "HEARD"}), (140, set()), (400, set())],
)
def test_on_a_terminal_of_any_width_a_run_takes_a_line_and_is_told_from_others(
    database: Engine, database_url: str, columns: int, left_out: set[str]
) -> None:
    for run_id in (*ALIKE, LONG):
        train(database, run_id, [123456.78, 0.00012345, float("nan")] * 20, job="a-job-of-a-longer-name")
    rules = (c.RULE_GRADIENT_EXPLOSION, c.RULE_NONFINITE)
    find(database, Severity.PAGE, *itertools.product((*ALIKE, LONG), rules))
    heading, _, *lines = (line for line in printed(database_url, columns) if line.strip())
    assert len(lines) == 3
    assert len({line.split()[0] for line in lines}) == 3
    assert {line.split()[0][:2] for line in lines} == {"sw", "xx"}
    for name in ("JOB", "STEP TAKES", "HEARD"):
        assert (name in heading) == (name not in left_out)
    for line in lines:
        assert cell_len(line.rstrip()) <= columns
        assert re.search(r" running +60 +NaN +[▁▂▃▄▅▆▇█x]{6,24} ", line)
        assert "gradi" in line


def printed(database_url: str, columns: int) -> list[str]:
    """Lines that are printed on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gradwatch.cli", "runs", "watch", "--once", "--db", database_url]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(columns), "LINES": "40"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment)
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # how Linux tells that the other side was closed
        while read := os.read(ours, 65536):
            seen += read
    os.close(ours)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, b"")
    return re.sub(r"\x1b\[[\d;]*m", "", seen.decode()).splitlines()


def read_until(terminal: int, text: str) -> None:
    """Read what is written to a terminal until a text is among it."""
    seen, give_up = b"", time.monotonic() + 60
    while text.encode() not in seen:
        assert time.monotonic() < give_up, seen.decode(errors="replace")
        if select.select([terminal], [], [], 1.0)[0]:
            seen += os.read(terminal, 65536)


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([], ""),
        ([3.0], "▁"),
        ([0.0, 7.0, 3.5], "▁█▅"),
        ([float("nan"), 1.0, float("inf")], "x▁x"),
        ([float("nan")], "x"),
    ],
)
def test_bars_reach_from_the_least_to_the_greatest(values: Sequence[float], bars: str) -> None:
    assert sparkline(values) == bars
