"""What is no text on a command line, and what is printed where there is no room or no such letter."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import Engine

from gradwatch.cli import main
from tests.collector_process import GRADWATCH, environment
from tests.stored_runs import run, store_runs

# As Python gets the byte 0xff.
NO_TEXT = "\udcff"
PERIOD = ("--from", "2026-01-01", "--to", "2026-01-02")


@pytest.mark.parametrize(
    "words",
    [
        ("runs", "report", NO_TEXT),
        ("runs", "compare", NO_TEXT),
        ("runs", "show", NO_TEXT),
        ("runs", "list", "--job", NO_TEXT),
        ("runs", "watch", "--once", NO_TEXT),
        ("slo", "exclude", "--run", NO_TEXT, "--reason", "a test"),
        ("slo", "exclude", *PERIOD, "--reason", NO_TEXT),
        ("slo", "exclude", *PERIOD, "--reason", "a test", "--group", f"team={NO_TEXT}"),
        ("slo", "check", "--group", f"team={NO_TEXT}"),
        ("slo", "interruptions", "--group", f"team={NO_TEXT}"),
        ("findings", "list", "--job", NO_TEXT),
        ("metrics", "list", "--name", NO_TEXT),
        ("token", "create", NO_TEXT),
        ("token", "revoke", NO_TEXT),
    ],
)
def test_an_argument_that_is_not_utf_8_is_one_clear_line(
    database: Engine, database_url: str, words: tuple[str, ...]
) -> None:
    done = CliRunner().invoke(main, [*words, "--db", database_url])
    assert done.exit_code == 2, done.exception
    assert "\\xff', expected UTF-8" in done.stderr.splitlines()[-1]


def test_a_file_may_have_a_name_that_is_not_utf_8(database_url: str, database: Engine, tmp_path: Path) -> None:
    path = tmp_path / f"report{NO_TEXT}.json"
    done = CliRunner().invoke(
        main, ["slo", "report", "--format", "json", "-o", str(path), "--db", database_url]
    )
    assert (done.exit_code, path.exists()) == (0, True)


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("runs", "list"),
        ("runs", "list", "--format", "json"),
        *(("slo", "report", "--format", name) for name in ("table", "markdown", "json", "csv", "html")),
        ("slo", "simulate"),
    ],
)
def test_output_that_finds_no_room_is_one_clear_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    settings = environment(None, GRADWATCH_DB=str(tmp_path / "runs.db"))
    subprocess.run([*GRADWATCH, "db", "upgrade"], env=settings, check=True, capture_output=True, timeout=60)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*GRADWATCH, *words], env=settings, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_letters_that_the_output_does_not_know_are_printed_escaped(database: Engine, database_url: str) -> None:
    with database.begin() as connection:
        store_runs(connection, [run(run_id="層")])
    settings = environment(None, GRADWATCH_DB=database_url, PYTHONIOENCODING="latin-1")
    done = subprocess.run(
        [*GRADWATCH, "runs", "list"], env=settings, capture_output=True, encoding="latin-1", timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].startswith("\\u5c64 ")
