"""``gradwatch dashboards export``: what Grafana is given, with links to one's own pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gradwatch.cli import main

DASHBOARDS = Path(__file__).parents[3] / "dashboards"


def export(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["dashboards", "export", *map(str, arguments)])


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text("utf-8")
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in {".json", ".yaml", ".sql"}
    }


def constants(path: Path) -> dict[str, Any]:
    variables = json.loads(path.read_text("utf-8"))["templating"]["list"]
    return {each["name"]: each["query"] for each in variables if each["type"] == "constant"}


def test_everything_but_the_code_is_copied_as_it_is(tmp_path: Path) -> None:
    assert export(tmp_path).exit_code == 0
    assert files(tmp_path) == files(DASHBOARDS)
    assert not list(tmp_path.rglob("*.py"))


def test_links_lead_where_they_are_told_to(tmp_path: Path) -> None:
    told = export(tmp_path, "--collector-url", "https://watch/", "--runbook-url", "https://wiki/books")
    assert told.exit_code == 0
    for path in (tmp_path / "grafana").glob("*.json"):
        assert constants(path) == {"collector": "https://watch", "runbooks": "https://wiki/books"}
        shipped = json.loads((DASHBOARDS / "grafana" / path.name).read_text("utf-8"))
        given = json.loads(path.read_text("utf-8"))
        assert given["panels"] == shipped["panels"]


def test_one_address_leaves_the_other_as_it_is(tmp_path: Path) -> None:
    assert export(tmp_path, "--collector-url", "https://watch").exit_code == 0
    path = tmp_path / "grafana" / "gradwatch-run.json"
    shipped = constants(DASHBOARDS / "grafana" / "gradwatch-run.json")
    assert constants(path) == {**shipped, "collector": "https://watch"}


@pytest.mark.parametrize("url", ["javascript:alert(1)", "watch.example.org", "https://", "https://a b"])
def test_what_is_no_address_of_a_page_is_refused_before_anything_is_written(tmp_path: Path, url: str) -> None:
    told = export(tmp_path / "here", "--collector-url", url)
    assert told.exit_code == 2
    assert "expected an address such as" in told.output
    assert not (tmp_path / "here").exists()
