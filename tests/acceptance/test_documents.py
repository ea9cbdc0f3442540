"""What README and docs tell a person to type works."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from gradwatch.cli import main
from tests.collector_process import environment

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(main))


def typed() -> set[tuple[str, ...]]:
    """Every gradwatch command in code in the documents, as far as its words are subcommands."""
    found = set()
    for page in PAGES:
        for line in re.findall(r"^gradwatch [^\n]*|`gradwatch [^`]*`", page.read_text(), re.MULTILINE):
            words = line.strip("`").split("#")[0].split()[1:]
            path: list[str] = []
            for word in words:
                if not re.fullmatch(r"[a-z]+", word) or tuple(path) in COMMANDS:
                    break
                path.append(word)
            found.add(tuple(path))
    return found - {()}


def test_every_command_the_documents_name_exists() -> None:
    groups = {path[:length] for path in COMMANDS for length in range(1, len(path))}
    named = {tuple(part for part in path) for path in typed()}
    assert named
    assert {path for path in named if path not in COMMANDS and path not in groups} == set()


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(path: tuple[str, ...]) -> None:
    text = COMMANDS[path].help or ""
    assert text.splitlines()[0].endswith(".")
    assert f"gradwatch {' '.join(path)}" in text
    assert "Example:" in text


def test_the_loop_in_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "train.py"
    script.write_text(block)
    nobody_there = environment(None, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, str(script)], env=nobody_there, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_every_link_within_the_documents_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_that_the_documents_name_exists() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert len(named) > 30
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_the_continuous_integration_runs_the_readmes_test_command() -> None:
    last = (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1].removeprefix("exec ")
    assert f"\n{last} " in (ROOT / "README.md").read_text()
