"""Bad input gives one clear line, a non-zero exit code, and leaves nothing half-written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.collector_process import gradwatch

INVALID_OBJECTIVE = """\
apiVersion: openslo/v1
kind: SLO
metadata: {name: mine}
spec:
  service: training
  indicatorRef: mine
  budgetingMethod: Ocurrences
  timeWindow: [{duration: 28d, isRolling: true}]
  objectives: [{target: 1.5}]
"""


def one_line_error(*arguments: str, **settings: str) -> str:
    done = gradwatch(*arguments, **settings)
    assert done.returncode == 1, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    "command",
    [("runs", "list"), ("runs", "show", "x"), ("slo", "report"), ("collector", "serve"), ("db", "upgrade")],
)
@pytest.mark.parametrize(
    ("url", "clue"),
    [
        ("mysql://root@localhost/runs", "mysql"),
        ("postgresql://nobody:secret@127.0.0.1:1/none", "127.0.0.1"),
        ("sqlite:////nonexistent/folder/runs.db", "/nonexistent/folder"),
        ("://", "sqlite:///PATH"),
    ],
)
def test_a_database_that_cannot_be_used(command: tuple[str, ...], url: str, clue: str) -> None:
    line = one_line_error(*command, "--db", url)
    assert clue in line
    assert "secret" not in line


def test_reading_a_database_that_is_not_there_does_not_create_it(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    assert str(path) in one_line_error("runs", "list", "--db", f"sqlite:///{path}")
    assert not path.exists()


def test_an_unknown_run(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    assert gradwatch("db", "upgrade", "--db", url).returncode == 0
    assert "gradwatch runs list" in one_line_error("runs", "show", "nope", "--db", url)


def test_a_cursor_nobody_gave_out(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    gradwatch("db", "upgrade", "--db", url)
    assert "cursor" in one_line_error("runs", "list", "--cursor", "bogus", "--db", url)


@pytest.mark.parametrize("address", ["4318", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:99999", ":4318"])
def test_an_address_that_is_none(address: str, tmp_path: Path) -> None:
    done = gradwatch("collector", "serve", "--listen", address, "--db", str(tmp_path / "runs.db"))
    assert done.returncode == 2
    assert "HOST:PORT" in done.stderr


def test_an_invalid_objective_names_file_line_field_and_what_was_expected(tmp_path: Path) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text(INVALID_OBJECTIVE)
    done = gradwatch("slo", "validate", str(path))
    assert done.returncode == 1
    assert f"{path}:7: spec.budgetingMethod: " in done.stderr
    assert "Occurrences" in done.stderr
    assert f"{path}:9: spec.objectives[0].target: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_target_that_cannot_be_parsed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import gradwatch; gradwatch.watch(target='val_loss is small')"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "val_loss is small" in done.stderr.splitlines()[-1]


def test_an_unknown_subcommand() -> None:
    done = gradwatch("slo", "guess")
    assert done.returncode == 2
    assert "guess" in done.stderr
